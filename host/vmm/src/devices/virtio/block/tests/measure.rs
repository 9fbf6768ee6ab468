//! Requests of 4 KiB in a second, by queue depth, alone and beside a stream of flushes. To run by hand:
//! `cargo nextest run --release -p bulkhead-vmm --run-ignored only --no-capture measure`.

use std::{
    io::Write,
    time::{Duration, Instant},
};

use virtio_bindings::virtio_blk as blk;

use super::driver::Driver;

const SOON: Duration = Duration::from_secs(60);
const MIB: u64 = 256;
/// The slot of the flush.
const FLUSH: u16 = 64;

/// Returns requests per second, and the longest time between two that were done.
fn rate(driver: &mut Driver, kind: u32, depth: u16, flushes: bool) -> (u64, Duration) {
    let (begun, mut last, mut longest) = (Instant::now(), Instant::now(), Duration::ZERO);
    let (mut count, mut random, mut flying) = (0_u64, 1_u64, depth);
    let mut sector = move || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % (MIB << 8) * 8
    };
    (0..depth).for_each(|slot| driver.start(slot, kind, sector()));
    if flushes {
        driver.start(FLUSH, blk::VIRTIO_BLK_T_FLUSH, 0);
        flying += 1;
    }
    driver.kick();
    while flying > 0 {
        let (slot, status) = driver.next(SOON).unwrap();
        assert_eq!(status, 0);
        flying -= 1;
        if slot != FLUSH {
            count += 1;
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
        if begun.elapsed() < Duration::from_secs(2) {
            let kind = if slot == FLUSH { blk::VIRTIO_BLK_T_FLUSH } else { kind };
            driver.start(slot, kind, if slot == FLUSH { 0 } else { sector() });
            driver.kick();
            flying += 1;
        }
    }
    (count * 1000 / begun.elapsed().as_millis().max(1) as u64, longest)
}

#[test]
#[ignore = "measures, and checks nothing"]
fn measure_random_pages() {
    for threads in [false, true] {
        let mut file = tempfile::tempfile().unwrap();
        for _ in 0..MIB {
            file.write_all(&vec![1; 1 << 20]).unwrap();
        }
        file.sync_all().unwrap();
        let mut driver = Driver::new(&file, threads);
        for (name, kind) in [("read", blk::VIRTIO_BLK_T_IN), ("write", blk::VIRTIO_BLK_T_OUT)] {
            for depth in [1, 32] {
                for flushes in [false, true] {
                    let (rate, longest) = rate(&mut driver, kind, depth, flushes);
                    println!(
                        "threads {threads}, {name}, depth {depth}, flushes {flushes}: {rate}/s, longest {longest:?}"
                    );
                }
            }
        }
    }
}
