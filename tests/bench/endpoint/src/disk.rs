//! Requests to the second disk, past the guest's page cache, and their rates.

use std::{
    fs::{File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileExt, OpenOptionsExt},
    },
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::Result;

/// The disk.
const DISK: &str = "/dev/vdb";

/// Bytes of a small and of a large request.
const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;

/// Alignment in bytes of the memory of direct requests.
const ALIGNMENT: usize = 4096;

/// A request.
#[derive(Clone, Copy)]
enum Request {
    Read(usize),
    Write(usize),
    /// A small write that is on the medium when it has ended.
    Sync,
}

/// A request in an endless row of them.
struct Worker {
    disk: File,
    blocks: u64,
    buffer: Vec<u8>,
    request: Request,
    random: u64,
}

impl Worker {
    fn new(request: Request, seed: u64) -> io::Result<Self> {
        let disk = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(DISK)?;
        let size = io::Seek::seek(&mut &disk, io::SeekFrom::End(0))?;
        let length = match request {
            Request::Read(length) | Request::Write(length) => length,
            Request::Sync => SMALL,
        };
        let buffer = vec![7; LARGE + ALIGNMENT];
        Ok(Self { disk, blocks: size / length as u64, buffer, request, random: seed * 2 + 1 })
    }

    fn next(&mut self) -> io::Result<()> {
        let block = match self.request {
            // In order, around and around.
            Request::Read(LARGE) | Request::Write(LARGE) => {
                self.random = self.random.wrapping_add(1);
                self.random % self.blocks
            }
            // A linear congruential generator (Knuth's MMIX); its upper bits are the better ones.
            _ => {
                self.random =
                    self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (self.random >> 33) % self.blocks
            }
        };
        let start = self.buffer.as_ptr().align_offset(ALIGNMENT);
        let bytes = &mut self.buffer[start..start + LARGE];
        match self.request {
            Request::Read(length) => self.disk.read_exact_at(&mut bytes[..length], block * length as u64),
            Request::Write(length) => self.disk.write_all_at(&bytes[..length], block * length as u64),
            Request::Sync => {
                self.disk.write_all_at(&bytes[..SMALL], block * SMALL as u64)?;
                // SAFETY: a plain system call.
                let synced = unsafe { libc::fdatasync(self.disk.as_raw_fd()) };
                if synced < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
            }
        }
    }
}

/// Runs `workers` and those of `beside` at once for so long; prints the number of requests that `workers` ended.
fn row(key: &str, duration: Duration, workers: Vec<Worker>, beside: Vec<Worker>) -> Result<()> {
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    // Written before the row begins: else its first fdatasync writes all that earlier rows left in the host's page cache.
    File::open(DISK)?.sync_data()?;
    println!("bench begin {key}");
    let begun = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let run = |mut worker: Worker, counts: bool| {
            let (stop, count) = (&stop, &count);
            scope.spawn(move || -> io::Result<()> {
                while !stop.load(Ordering::Relaxed) {
                    worker.next()?;
                    count.fetch_add(u64::from(counts), Ordering::Relaxed);
                }
                Ok(())
            })
        };
        let others = beside.into_iter().map(|worker| run(worker, false));
        let running: Vec<_> = others.chain(workers.into_iter().map(|worker| run(worker, true))).collect();
        thread::sleep(duration);
        stop.store(true, Ordering::Relaxed);
        for thread in running {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })?;
    println!("bench {key} {} {}", count.into_inner(), begun.elapsed().as_micros());
    Ok(())
}

/// Measures all rows, each for so long.
pub(crate) fn measure(duration: Duration) -> Result<()> {
    let workers = |request, count: u64| (1..=count).map(|seed| Worker::new(request, seed)).collect::<io::Result<_>>();
    let alone = |key, request, count| row(key, duration, workers(request, count)?, Vec::new());
    alone("random_read", Request::Read(SMALL), 1)?;
    alone("random_read_16", Request::Read(SMALL), 16)?;
    alone("random_write", Request::Write(SMALL), 1)?;
    alone("random_write_16", Request::Write(SMALL), 16)?;
    alone("write_sync", Request::Sync, 1)?;
    row("read_beside_sync", duration, workers(Request::Read(SMALL), 1)?, workers(Request::Sync, 1)?)?;
    alone("sequential_read", Request::Read(LARGE), 1)?;
    alone("sequential_write", Request::Write(LARGE), 1)
}
