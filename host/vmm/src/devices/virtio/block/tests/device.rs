//! The whole device, with either engine.

use std::{fs::File, io::Write, os::unix::fs::FileExt, time::Duration};

use support::small_file_system::SmallFileSystem;
use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, GuestAddress};

use super::driver::{Driver, PAGE};
use crate::devices::virtio::VirtioDevice;

const SOON: Duration = Duration::from_secs(30);

fn disk(mib: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(mib << 20).unwrap();
    file
}

/// Runs a test with a ring, if the kernel offers one to the tests, and with threads.
fn with_both_engines(test: impl Fn(bool)) {
    test(false);
    test(true);
}

#[test]
fn many_requests_at_once_are_all_done_right() {
    with_both_engines(|threads| {
        let file = disk(1);
        let mut driver = Driver::new(&file, threads);
        for slot in 0..64 {
            driver.memory.write_slice(&[slot as u8 + 1; PAGE as usize], GuestAddress(Driver::data(slot))).unwrap();
            driver.start(slot, blk::VIRTIO_BLK_T_OUT, u64::from(slot) * 8);
        }
        driver.kick();
        let mut done: Vec<_> = (0..64).map(|_| driver.next(SOON).unwrap()).collect();
        done.sort_unstable();
        assert_eq!(done, (0..64).map(|slot| (slot, 0)).collect::<Vec<_>>());
        for slot in 0..64 {
            let mut page = [0; PAGE as usize];
            file.read_exact_at(&mut page, u64::from(slot) * PAGE).unwrap();
            assert_eq!(page, [slot as u8 + 1; PAGE as usize]);
            driver.start(63 - slot, blk::VIRTIO_BLK_T_IN, u64::from(slot) * 8);
        }
        driver.kick();
        for _ in 0..64 {
            let (slot, status) = driver.next(SOON).unwrap();
            let byte: u8 = driver.memory.read_obj(GuestAddress(Driver::data(slot))).unwrap();
            assert_eq!((status, byte), (0, 64 - slot as u8));
        }
    });
}

/// Returns the field `num_queues` (5.2.4).
fn num_queues(driver: &Driver) -> u16 {
    let mut bytes = [0; 2];
    driver.device.read_config(34, &mut bytes);
    u16::from_le_bytes(bytes)
}

#[test]
fn each_queue_is_served_also_if_the_driver_leaves_the_last_one_out() {
    for index in [0, 1, 2] {
        with_both_engines(|threads| {
            let file = disk(1);
            let mut driver = Driver::with_queues(&file, threads, 3, index);
            for round in 0..3 {
                for slot in 0..32 {
                    driver.start(slot, blk::VIRTIO_BLK_T_OUT, u64::from(slot) * 8);
                }
                driver.start(32, blk::VIRTIO_BLK_T_FLUSH, 0);
                driver.kick();
                let mut done: Vec<_> = (0..33).map(|_| driver.next(SOON).unwrap()).collect();
                done.sort_unstable();
                assert_eq!(done, (0..33).map(|slot| (slot, 0)).collect::<Vec<_>>(), "queue {index}, round {round}");
                driver.device.reset();
                driver.activate();
            }
        });
    }
}

#[test]
fn a_machine_has_a_queue_for_each_vcpu_but_not_more_than_four() {
    for (cpus, most) in [(1, 1), (2, 2), (4, 4), (5, 4), (32, 4)] {
        let driver = Driver::with_queues(&disk(1), false, cpus, 0);
        let count = driver.device.queue_max_sizes().len();
        // One where the kernel offers no ring.
        assert!(count == most || count == 1, "{count} queues for {cpus} vCPUs");
        assert_eq!(usize::from(num_queues(&driver)), count);
        assert_ne!(driver.device.features() & 1 << blk::VIRTIO_BLK_F_MQ, 0);
    }
}

#[test]
fn a_read_passes_a_flush_that_takes_long() {
    with_both_engines(|threads| {
        // As much as the host has to write for the flush.
        let file = disk(256);
        let mut dirty = file.try_clone().unwrap();
        for _ in 0..256 {
            dirty.write_all(&vec![7; 1 << 20]).unwrap();
        }
        let mut driver = Driver::new(&file, threads);
        driver.start(0, blk::VIRTIO_BLK_T_FLUSH, 0);
        driver.start(1, blk::VIRTIO_BLK_T_IN, 0);
        driver.kick();
        assert_eq!([driver.next(SOON).unwrap(), driver.next(SOON).unwrap()], [(1, 0), (0, 0)]);
    });
}

#[test]
fn a_reset_waits_for_requests_under_way_and_the_device_starts_again() {
    with_both_engines(|threads| {
        let file = disk(16);
        let mut driver = Driver::new(&file, threads);
        for round in 0..20 {
            for slot in 0..64 {
                driver.start(slot, blk::VIRTIO_BLK_T_OUT, u64::from(slot) * 8);
            }
            driver.start(64, blk::VIRTIO_BLK_T_FLUSH, 0);
            driver.kick();
            driver.device.reset();
            // Nothing touches this any more.
            let marks = vec![round; 65 * PAGE as usize];
            driver.memory.write_slice(&marks, GuestAddress(Driver::data(0))).unwrap();
            driver.activate();
        }
        driver.start(0, blk::VIRTIO_BLK_T_IN, 0);
        driver.kick();
        assert_eq!(driver.next(SOON), Some((0, 0)));
    });
}

/// Starts 32 writes, for which a new file system has not enough room. Needs a mount.
fn on_a_full_host(threads: bool) -> Option<(SmallFileSystem, Driver)> {
    let small = SmallFileSystem::mount()?;
    let file = File::options().read(true).write(true).create_new(true).open(small.path().join("disk")).unwrap();
    file.set_len(1 << 20).unwrap();
    let mut driver = Driver::new(&file, threads);
    for slot in 0..32 {
        driver.start(slot, blk::VIRTIO_BLK_T_OUT, u64::from(slot) * 8);
    }
    driver.kick();
    Some((small, driver))
}

#[test]
fn writes_without_room_wait_and_go_on_when_there_is_some_while_reads_pass() {
    with_both_engines(|threads| {
        let Some((small, mut driver)) = on_a_full_host(threads) else { return };
        let mut done = 0;
        while let Some((_, status)) = driver.next(Duration::from_secs(1)) {
            assert_eq!(status, 0);
            done += 1;
        }
        assert!(done < 32, "{done} of 32 pages fit into 64 KiB");
        assert_eq!(driver.room.waiting(), ["data"]);
        driver.start(40, blk::VIRTIO_BLK_T_IN, 0);
        driver.kick();
        assert_eq!(driver.next(SOON), Some((40, 0)));
        small.grow();
        for _ in done..32 {
            assert_eq!(driver.next(SOON).unwrap().1, 0);
        }
        assert!(driver.room.waiting().is_empty());
    });
}

#[test]
fn a_reset_gives_up_writes_that_have_no_room() {
    with_both_engines(|threads| {
        let Some((_small, mut driver)) = on_a_full_host(threads) else { return };
        while driver.next(Duration::from_secs(1)).is_some() {}
        assert_eq!(driver.room.waiting(), ["data"]);
        driver.device.reset();
        assert!(driver.room.waiting().is_empty());
    });
}
