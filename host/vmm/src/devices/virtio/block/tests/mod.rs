//! Requests as a driver lays them out, on real queues in real guest memory and over a real file.

mod device;
mod driver;
mod measure;

use std::{
    fs::File,
    io::Write,
    os::unix::fs::{FileExt, MetadataExt},
};

use proptest::prelude::*;
use virtio_bindings::virtio_blk as blk;
use virtio_queue::{
    desc::{RawDescriptor, split::Descriptor},
    mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress};

use super::{
    MAX_RANGE_SECTORS, SECTOR,
    cached::Cached,
    disk::DiskFile,
    job::{Job, Operation, Progress},
    perform,
    request::Request,
};
use crate::memory::{self, GuestRam};

const WRITABLE: u16 = 2;
const DATA: u64 = 0x10_0000;
const SECTORS: u64 = 64;

fn file() -> File {
    let mut file = tempfile::tempfile().unwrap();
    let pattern: Vec<u8> = (0..SECTORS * SECTOR).map(|i| (i / SECTOR) as u8 + 1).collect();
    file.write_all(&pattern).unwrap();
    file
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Lays out `readable` and then `writable` bytes of buffer, split at the given lengths, and executes the request.
/// Returns the bytes of the writable part and the used length.
fn request(
    memory: &GuestRam,
    disk: &DiskFile,
    readable: &[u8],
    writable: usize,
    pieces: &[usize],
) -> Option<(Vec<u8>, u32)> {
    memory.write_slice(readable, GuestAddress(DATA)).unwrap();
    let answer = GuestAddress(DATA + readable.len() as u64);
    memory.write_slice(&vec![0xee; writable], answer).unwrap();
    let mut descriptors = Vec::new();
    let mut sizes = pieces.iter().copied().cycle();
    for (start, len, flags) in [(DATA, readable.len(), 0), (answer.0, writable, WRITABLE)] {
        let mut at = 0;
        while at < len {
            // At most about 100 pieces for each part: the queue has 256 descriptors.
            let piece = sizes.next().unwrap_or(len).max(len.div_ceil(100)).clamp(1, len - at);
            descriptors.push(RawDescriptor::from(Descriptor::new(start + at as u64, piece as u32, flags, 0)));
            at += piece;
        }
    }
    let queue = MockSplitQueue::new(memory, 256);
    let chain = queue.build_desc_chain(&descriptors).unwrap();
    let mut job = Job::new(0, Request::parse(chain, memory)?, disk, memory, false);
    perform::run(disk, &mut job, memory);
    let used = job.finish(memory);
    let mut bytes = vec![0; writable];
    memory.read_slice(&mut bytes, answer).unwrap();
    Some((bytes, used))
}

fn status(memory: &GuestRam, disk: &DiskFile, readable: &[u8]) -> u8 {
    request(memory, disk, readable, 1, &[4096]).unwrap().0[0]
}

fn ranges(kind: u32, ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = header(kind, 0);
    for (sector, sectors, flags) in ranges {
        bytes.extend(sector.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
    }
    bytes
}

/// Performs a request as far as the page cache can; `None` if an engine has to go on.
fn from_cache(disk: &DiskFile, memory: &GuestRam, kind: u32, writable: u32) -> Option<Progress> {
    let data = if kind == blk::VIRTIO_BLK_T_OUT { SECTOR as usize } else { 0 };
    let readable = [header(kind, 0), vec![7; data]].concat();
    memory.write_slice(&readable, GuestAddress(DATA)).unwrap();
    let descriptors = [(DATA, readable.len() as u32, 0), (DATA + 0x1000, writable + 1, WRITABLE)]
        .map(|(address, len, flags)| RawDescriptor::from(Descriptor::new(address, len, flags, 0)));
    let queue = MockSplitQueue::new(memory, 256);
    let request = Request::parse(queue.build_desc_chain(&descriptors).unwrap(), memory).unwrap();
    let mut job = Job::new(0, request, disk, memory, false);
    Cached::new().perform(disk, &mut job, memory)
}

#[test]
fn what_the_page_cache_has_takes_no_engine_and_a_flush_takes_one() {
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), false, "").unwrap());
    assert_eq!(from_cache(&disk, &memory, blk::VIRTIO_BLK_T_OUT, 0), Some(Progress::Next));
    assert_eq!(from_cache(&disk, &memory, blk::VIRTIO_BLK_T_IN, SECTOR as u32), Some(Progress::Next));
    let mut read = [0; SECTOR as usize];
    memory.read_slice(&mut read, GuestAddress(DATA + 0x1000)).unwrap();
    assert_eq!(read, [7; SECTOR as usize]);
    assert_eq!(from_cache(&disk, &memory, blk::VIRTIO_BLK_T_FLUSH, 0), None);
}

proptest! {
    // 2.7.4.1: the device must not make assumptions about the arrangement of descriptors.
    #[test]
    fn a_read_is_right_however_its_buffers_are_split(
        sector in 0..SECTORS, count in 1u64..8, pieces in proptest::collection::vec(7usize..700, 1..8)
    ) {
        let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), true, "").unwrap());
        let len = (count * SECTOR) as usize;
        let (bytes, used) = request(&memory, &disk, &header(blk::VIRTIO_BLK_T_IN, sector), len + 1, &pieces).unwrap();
        if sector + count <= SECTORS {
            prop_assert_eq!((bytes[len], used as usize), (0, len + 1));
            prop_assert!(bytes[..len].chunks(SECTOR as usize).zip(sector..)
                .all(|(chunk, sector)| chunk.iter().all(|byte| *byte == sector as u8 + 1)));
        } else {
            prop_assert_eq!((bytes[len], used), (1, 1));
        }
    }

    #[test]
    fn what_is_written_reads_back_however_its_buffers_are_split(
        sector in 0..SECTORS - 4, seed in any::<u8>(), pieces in proptest::collection::vec(7usize..700, 1..8)
    ) {
        let file = file();
        let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file.try_clone().unwrap(), false, "").unwrap());
        let data: Vec<u8> = (0..4 * SECTOR).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect();
        let readable = [header(blk::VIRTIO_BLK_T_OUT, sector), data.clone()].concat();
        prop_assert_eq!(request(&memory, &disk, &readable, 1, &pieces).unwrap(), (vec![0], 1));
        let mut back = vec![0; data.len()];
        file.read_exact_at(&mut back, sector * SECTOR).unwrap();
        prop_assert_eq!(back, data);
    }

    #[test]
    fn no_chain_of_any_kind_panics_or_grows_the_disk(
        kind in 0u32..20, sector in any::<u64>(), body in proptest::collection::vec(any::<u8>(), 0..600),
        writable in 0usize..600, pieces in proptest::collection::vec(1usize..64, 1..8)
    ) {
        let file = file();
        let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file.try_clone().unwrap(), false, "").unwrap());
        let readable = [header(kind, sector), body].concat();
        let _ = request(&memory, &disk, &readable, writable, &pieces);
        prop_assert_eq!(file.metadata().unwrap().len(), SECTORS * SECTOR);
    }
}

proptest! {
    #[test]
    fn no_queue_makes_the_device_panic_or_grows_the_disk(bytes in bulkhead_queue::testing::queue(), readonly: bool) {
        super::fuzzing::requests(&file(), readonly, &bytes);
    }
}

#[test]
fn requests_past_the_end_or_of_half_sectors_are_errors() {
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), false, "").unwrap());
    for (sector, len) in [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)] {
        let readable = [header(blk::VIRTIO_BLK_T_OUT, sector), vec![0; len]].concat();
        assert_eq!(status(&memory, &disk, &readable), 1, "{sector} {len}");
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), true, "").unwrap());
    let write = [header(blk::VIRTIO_BLK_T_OUT, 0), vec![0; 512]].concat();
    for readable in
        [write, ranges(blk::VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)])]
    {
        assert_eq!(status(&memory, &disk, &readable), 2);
    }
}

#[test]
fn a_read_only_disk_has_nothing_to_flush() {
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), true, "").unwrap());
    assert_eq!(status(&memory, &disk, &header(blk::VIRTIO_BLK_T_FLUSH, 0)), 0);
}

#[test]
fn a_driver_without_flushes_has_its_writes_committed() {
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), false, "").unwrap());
    let write = [header(blk::VIRTIO_BLK_T_OUT, 0), vec![0; 512]].concat();
    for (write_through, expected) in [(false, 1), (true, 2)] {
        memory.write_slice(&write, GuestAddress(DATA)).unwrap();
        let descriptors = [(DATA, write.len() as u32, 0), (DATA + 4096, 1, WRITABLE)]
            .map(|(address, len, flags)| RawDescriptor::from(Descriptor::new(address, len, flags, 0)));
        let queue = MockSplitQueue::new(&memory, 256);
        let chain = queue.build_desc_chain(&descriptors).unwrap();
        let mut job = Job::new(0, Request::parse(chain, &memory).unwrap(), &disk, &memory, write_through);
        let mut operations = Vec::new();
        while let Some(operation) = job.operation() {
            operations.push(operation);
            job.result(Ok(512));
        }
        assert_eq!(operations.len(), expected);
        assert_eq!(operations[1..], [Operation::Sync][..expected - 1]);
    }
}

#[test]
fn the_serial_is_padded_with_zeroes_and_cut_at_twenty_bytes() {
    let memory = memory::create(64).unwrap();
    for (serial, expected) in [("data", "data"), ("0123456789012345678901234", "01234567890123456789")] {
        let disk = DiskFile::new(file(), true, serial).unwrap();
        let (bytes, _) = request(&memory, &disk, &header(blk::VIRTIO_BLK_T_GET_ID, 0), 21, &[9]).unwrap();
        assert_eq!(std::str::from_utf8(&bytes[..20]).unwrap().trim_end_matches('\0'), expected);
        assert_eq!(bytes[20], 0);
    }
}

#[test]
fn a_discard_punches_a_hole_and_write_zeroes_reads_as_zero() {
    let file = file();
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file.try_clone().unwrap(), false, "").unwrap());
    file.sync_all().unwrap();
    let before = file.metadata().unwrap().blocks();
    assert_eq!(status(&memory, &disk, &ranges(blk::VIRTIO_BLK_T_DISCARD, &[(0, 32, 0)])), 0);
    assert!(file.metadata().unwrap().blocks() < before);
    assert_eq!(status(&memory, &disk, &ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(40, 2, 0), (50, 2, 1)])), 0);
    let mut all = vec![0; (SECTORS * SECTOR) as usize];
    file.read_exact_at(&mut all, 0).unwrap();
    for (sector, chunk) in all.chunks(SECTOR as usize).enumerate() {
        let zeroed = sector < 32 || (40..42).contains(&sector) || (50..52).contains(&sector);
        assert!(chunk.iter().all(|byte| *byte == if zeroed { 0 } else { sector as u8 + 1 }), "{sector}");
    }
}

#[test]
fn one_bad_range_leaves_all_ranges_untouched() {
    let file = file();
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file.try_clone().unwrap(), false, "").unwrap());
    let bad = ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0), (SECTORS - 1, 2, 0)]);
    assert_eq!(status(&memory, &disk, &bad), 1);
    let long = ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, MAX_RANGE_SECTORS + 1, 0)]);
    assert_eq!(status(&memory, &disk, &long), 1);
    // 5.2.6.2: a discard does not have the flag.
    assert_eq!(status(&memory, &disk, &ranges(blk::VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)])), 2);
    let unknown_flag = ranges(blk::VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 2)]);
    assert_eq!(status(&memory, &disk, &unknown_flag), 2);
    let mut first = [0];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [1]);
}

#[test]
fn an_unknown_type_is_unsupported() {
    let (memory, disk) = (memory::create(64).unwrap(), DiskFile::new(file(), false, "").unwrap());
    assert_eq!(status(&memory, &disk, &header(99, 0)), 2);
}
