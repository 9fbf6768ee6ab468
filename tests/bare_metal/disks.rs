//! Guests that drive a disk: a virtio-blk driver in a few dozen instructions.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use bulkhead_vmm::api::{Disk, Event, ExitReason, VmConfig};
use support::{
    guest::{ENTRY, SPIN, kernel, machine, out},
    small_file_system::SmallFileSystem,
    vmm::Vmm,
};

use super::{OFF, POWER, SOON};

/// BAR of the first disk, and the places of registers in it (virtio 1.3, 4.1.4.3).
const BAR: u32 = 0xc000_0000;
const DRIVER_FEATURE_SELECT: u32 = BAR + 8;
const DRIVER_FEATURE: u32 = BAR + 12;
const STATUS: u32 = BAR + 20;
const QUEUE_ENABLE: u32 = BAR + 28;
const QUEUE_ADDRESSES: u32 = BAR + 32;
const NOTIFY: u32 = BAR + 0x3000;

/// Guest memory behind the code, which is part of the kernel image.
const DESCRIPTORS: u32 = ENTRY + 0x1000;
const AVAILABLE: u32 = ENTRY + 0x3000;
const USED: u32 = ENTRY + 0x4000;
const HEADERS: u32 = ENTRY + 0x6000;
const STATUSES: u32 = ENTRY + 0x7000;
const DATA: u32 = ENTRY + 0x8000;
const END: u32 = ENTRY + 0x9000;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;

/// `mov dword [address], value`
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// `mov byte [address], value`
fn store_byte(address: u32, value: u8) -> Vec<u8> {
    [&[0xc6, 0x05][..], &address.to_le_bytes(), &[value]].concat()
}

/// `mov word [address], value`
fn store_word(address: u32, value: u16) -> Vec<u8> {
    [&[0x66, 0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// Loops until the word at `address` is `value`.
fn await_word(address: u32, value: u16) -> Vec<u8> {
    // pause; cmp word [address], value; jne back
    let mut code = vec![0xf3, 0x90, 0x66, 0x81, 0x3d];
    code.extend(address.to_le_bytes());
    code.extend(value.to_le_bytes());
    code.extend([0x75, 0x100_u16.wrapping_sub(code.len() as u16 + 2) as u8]);
    code
}

/// Loops forever unless the byte at `address` is `value`.
fn expect_byte(address: u32, value: u8) -> Vec<u8> {
    // cmp byte [address], value; jne to itself
    [&[0x80, 0x3d][..], &address.to_le_bytes(), &[value, 0x75, 0xfe]].concat()
}

/// A guest that starts the first disk, makes these requests of a page available at once, and then runs `check`.
fn guest(requests: &[(u32, u64)], check: &[u8]) -> Vec<u8> {
    let mut code = Vec::new();
    code.extend(store_byte(STATUS, 3));
    // VIRTIO_F_VERSION_1 and VIRTIO_BLK_F_FLUSH.
    code.extend(store(DRIVER_FEATURE_SELECT, 0));
    code.extend(store(DRIVER_FEATURE, 1 << 9));
    code.extend(store(DRIVER_FEATURE_SELECT, 1));
    code.extend(store(DRIVER_FEATURE, 1));
    code.extend(store_byte(STATUS, 11));
    for (index, address) in [DESCRIPTORS, AVAILABLE, USED].into_iter().enumerate() {
        code.extend(store(QUEUE_ADDRESSES + 8 * index as u32, address));
    }
    code.extend(store_word(QUEUE_ENABLE, 1));
    code.extend(store_byte(STATUS, 15));
    code.extend(store_word(NOTIFY, 0));
    code.extend(check);
    code.extend(out(POWER, OFF));
    code.extend(SPIN);
    assert!(code.len() < (DESCRIPTORS - ENTRY) as usize);
    code.resize((END - ENTRY) as usize, 0);
    let mut put = |address: u32, bytes: &[u8]| {
        let at = (address - ENTRY) as usize;
        code[at..at + bytes.len()].copy_from_slice(bytes);
    };
    for (slot, (kind, sector)) in (0_u32..).zip(requests) {
        put(HEADERS + 16 * slot, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
        put(STATUSES + slot, &[0xee]);
        // Flags: 1 for a next descriptor, 2 for a writable one.
        let (header, status) = ((HEADERS + 16 * slot, 16, 1), (STATUSES + slot, 1, 2));
        let chain = match *kind {
            FLUSH => vec![header, status],
            READ => vec![header, (DATA, 4096, 3), status],
            _ => vec![header, (DATA, 4096, 1), status],
        };
        for (index, (address, len, flags)) in (slot * 3..).zip(chain) {
            let next = index as u16 + 1;
            let descriptor = [
                &u64::from(address).to_le_bytes()[..],
                &u32::to_le_bytes(len),
                &u16::to_le_bytes(flags),
                &next.to_le_bytes(),
            ];
            put(DESCRIPTORS + 16 * index, &descriptor.concat());
        }
        put(AVAILABLE + 4 + 2 * slot, &(slot as u16 * 3).to_le_bytes());
    }
    // No interrupts.
    put(AVAILABLE, &1_u16.to_le_bytes());
    put(AVAILABLE + 2, &(requests.len() as u16).to_le_bytes());
    code
}

fn with_disk(dir: &Path, code: &[u8], disk: PathBuf) -> VmConfig {
    let disks = vec![Disk { path: disk, readonly: false, serial: "data".into() }];
    VmConfig { disks, ..machine(kernel(dir, code)) }
}

fn message(reason: ExitReason) -> String {
    match reason {
        ExitReason::Error { message } => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_disk_that_a_machine_writes_is_refused_to_another_until_the_first_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    let config = with_disk(dir.path(), &SPIN, disk);
    let first = Vmm::boot(config.clone());
    assert!(matches!(first.event(SOON), Some(Event::Started { .. })));
    let error = message(Vmm::boot(config.clone()).exit(SOON));
    assert!(error.contains("disk") && error.contains("in use"), "{error}");
    drop(first);
    let second = Vmm::boot(config);
    assert!(matches!(second.event(SOON), Some(Event::Started { .. })));
}

#[test]
fn a_guests_read_is_done_while_its_flush_waits_for_the_host() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let disk = dir.path().join("disk");
    // The flush has all of this to write.
    let mut dirty = File::create(&disk).unwrap();
    for _ in 0..512 {
        dirty.write_all(&vec![7; 1 << 20]).unwrap();
    }
    let check = [
        // The first chain that comes back is the second that was made available.
        await_word(USED + 2, 1),
        expect_byte(USED + 4, 3),
        expect_byte(DATA, 7),
        await_word(USED + 2, 2),
        expect_byte(USED + 12, 0),
        expect_byte(STATUSES, 0),
        expect_byte(STATUSES + 1, 0),
    ];
    let code = guest(&[(FLUSH, 0), (READ, 8)], &check.concat());
    assert_eq!(Vmm::boot(with_disk(dir.path(), &code, disk)).exit(SOON), ExitReason::PowerOff);
}

#[test]
fn a_guests_writes_wait_for_room_on_the_host_and_the_backend_hears_of_it() {
    let Some(small) = SmallFileSystem::mount() else { return };
    let dir = tempfile::tempdir().unwrap();
    let disk = small.path().join("disk");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let requests: Vec<_> = (0..32).map(|page| (WRITE, page * 8)).collect();
    let mut check = await_word(USED + 2, 32);
    (0..32).for_each(|slot| check.extend(expect_byte(STATUSES + slot, 0)));
    let vmm = Vmm::boot(with_disk(dir.path(), &guest(&requests, &check), disk));
    assert!(matches!(vmm.event(SOON), Some(Event::Started { .. })));
    assert_eq!(vmm.event(SOON), Some(Event::NoRoom { disks: vec!["data".into()] }));
    small.grow();
    assert_eq!(vmm.event(SOON), Some(Event::NoRoom { disks: Vec::new() }));
    assert_eq!(vmm.exit(SOON), ExitReason::PowerOff);
}
