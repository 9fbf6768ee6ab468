//! Files of a directory, as programs use them, and the rates.
//!
//! Data goes past the guest's page cache. Before each row that only looks, the guest's caches are emptied, so that it
//! asks the other side for every name.

use std::{
    ffi::CString,
    fs::{self, File, FileTimes, OpenOptions, Permissions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant, SystemTime},
};

use crate::Result;

/// Directory at which the file system is mounted.
const MOUNT: &str = "/mnt";

/// Size of the file of the data rows, in bytes.
const DATA: u64 = 64 << 20;
/// Bytes of a small and of a large request.
const SMALL: usize = 4096;
const LARGE: usize = 1 << 20;
/// Alignment in bytes of the memory of direct requests.
const ALIGNMENT: usize = 4096;

/// Threads of the rows that have several.
const THREADS: usize = 4;
/// Bytes of a small file.
const CONTENTS: [u8; 200] = [b'x'; 200];
/// Files in a directory of an archive.
const ARCHIVED: usize = 20;

/// Mounts a file system of this type: the share by its tag, anything else from the second disk.
fn mount(kind: &str) -> Result<()> {
    let source = if kind == "virtiofs" { "bulkhead" } else { "/dev/vdb" };
    let [source, target, kind] = [source, MOUNT, kind].map(CString::new);
    let (source, target, kind) = (source?, target?, kind?);
    // SAFETY: the strings end in zeroes and live throughout the call; the file system takes no data.
    let mounted = unsafe { libc::mount(source.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if mounted < 0 { Err(format!("cannot mount {kind:?}: {}", io::Error::last_os_error()).into()) } else { Ok(()) }
}

/// Empties the guest's caches of data, names and attributes.
fn forget() -> io::Result<()> {
    // SAFETY: a plain system call.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// Lets `threads` threads do `work`, which returns the number of things done; prints their sum.
fn row(key: &str, threads: usize, work: impl Fn(usize) -> io::Result<u64> + Sync) -> Result<()> {
    let count = AtomicU64::new(0);
    println!("bench begin {key}");
    let begun = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let (count, work) = (&count, &work);
        let run = |number| scope.spawn(move || work(number).map(|done| count.fetch_add(done, Ordering::Relaxed)));
        let running: Vec<_> = (0..threads).map(run).collect();
        for thread in running {
            thread.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })?;
    println!("bench {key} {} {}", count.into_inner(), begun.elapsed().as_micros());
    Ok(())
}

/// Reads or writes a file of [`DATA`] bytes in requests of `size` for so long, in order or at random places.
fn transfer(path: &Path, number: usize, size: usize, writes: bool, duration: Duration) -> io::Result<u64> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)?;
    let mut buffer = vec![7; size + ALIGNMENT];
    let start = buffer.as_ptr().align_offset(ALIGNMENT);
    let (blocks, begun, mut done) = (DATA / size as u64, Instant::now(), 0);
    let mut place = number as u64 * 2 + 1;
    while begun.elapsed() < duration {
        // A linear congruential generator (Knuth's MMIX); its upper bits are the better ones.
        place = if size == LARGE {
            place.wrapping_add(1)
        } else {
            place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
        };
        let block = if size == LARGE { place % blocks } else { (place >> 33) % blocks };
        let (bytes, offset) = (&mut buffer[start..start + size], block * size as u64);
        if writes { file.write_all_at(bytes, offset) } else { file.read_exact_at(bytes, offset) }?;
        done += 1;
    }
    Ok(done)
}

fn data(directory: &Path, duration: Duration) -> Result<()> {
    let path = directory.join("data");
    let block = vec![7; LARGE];
    let mut file = File::create(&path)?;
    for _ in 0..DATA / LARGE as u64 {
        io::Write::write_all(&mut file, &block)?;
    }
    file.sync_all()?;
    // A file that is open through the cache has its direct writes one after the other.
    drop(file);
    for (name, size, writes) in [
        ("sequential_read", LARGE, false),
        ("sequential_write", LARGE, true),
        ("random_read", SMALL, false),
        ("random_write", SMALL, true),
    ] {
        row(&format!("{name}_1"), 1, |number| transfer(&path, number, size, writes, duration))?;
        let key = format!("{name}_{THREADS}");
        row(&key, THREADS, |number| transfer(&path, number, size, writes, duration))?;
    }
    Ok(fs::remove_file(path)?)
}

/// Does something with each of the files of a thread; returns their number.
fn each(directory: &Path, number: usize, files: usize, act: impl Fn(&Path) -> io::Result<()>) -> io::Result<u64> {
    let own = directory.join(format!("t{number}"));
    for file in 0..files {
        act(&own.join(format!("file-{file}")))?;
    }
    Ok(files as u64)
}

fn names(directory: &Path, threads: usize, files: usize) -> Result<()> {
    let own = files / threads;
    for number in 0..threads {
        fs::create_dir(directory.join(format!("t{number}")))?;
    }
    row(&format!("create_{threads}"), threads, |number| {
        each(directory, number, own, |path| {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o644).open(path)?;
            io::Write::write_all(&mut file, &CONTENTS)
        })
    })?;
    forget()?;
    row(&format!("stat_{threads}"), threads, |number| {
        each(directory, number, own, |path| fs::symlink_metadata(path).map(drop))
    })?;
    forget()?;
    row(&format!("read_{threads}"), threads, |number| {
        each(directory, number, own, |path| {
            if fs::read(path)? == CONTENTS { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
        })
    })?;
    row(&format!("unlink_{threads}"), threads, |number| each(directory, number, own, |path| fs::remove_file(path)))?;
    for number in 0..threads {
        fs::remove_dir(directory.join(format!("t{number}")))?;
    }
    Ok(())
}

/// Makes files as an unpacking program does: with mode and times.
fn unpack(directory: &Path, files: usize) -> io::Result<u64> {
    let block = [b'y'; SMALL];
    for number in 0..files {
        let own = directory.join(format!("d{}", number / ARCHIVED));
        if number % ARCHIVED == 0 {
            fs::create_dir(&own)?;
        }
        let path = own.join(format!("file-{number}"));
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        io::Write::write_all(&mut file, &block)?;
        file.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)))?;
        file.set_permissions(Permissions::from_mode(0o644))?;
    }
    Ok(files as u64)
}

/// Looks at each file below a directory, as `git status` does; returns their number.
fn walk(directory: &Path) -> io::Result<u64> {
    let mut count = 0;
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        count += if fs::symlink_metadata(&path)?.is_dir() { walk(&path)? } else { 1 };
    }
    Ok(count)
}

/// Measures all rows in a directory of the file system.
pub(crate) fn measure(kind: &str, place: &str, files: usize, duration: Duration) -> Result<()> {
    mount(kind)?;
    let directory = PathBuf::from(MOUNT).join(place.trim_start_matches('/')).join("measured");
    fs::create_dir(&directory)?;
    data(&directory, duration)?;
    names(&directory, 1, files)?;
    names(&directory, THREADS, files)?;
    let tree = directory.join("tree");
    fs::create_dir(&tree)?;
    row("unpack", 1, |_| unpack(&tree, files))?;
    forget()?;
    row("walk", 1, |_| walk(&tree))?;
    row("remove", 1, |_| fs::remove_dir_all(&tree).map(|()| files as u64))?;
    Ok(fs::remove_dir(&directory)?)
}
