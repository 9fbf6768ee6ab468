//! open, read, write, truncate, and directories' lists.

use std::{os::unix::fs::FileExt, thread};

use rustix::{
    fs::{FallocateFlags, Mode, OFlags, SeekFrom, fallocate, ftruncate, openat, seek},
    io::{Errno, pread, pwrite},
};

use super::{fails, ok, too_long};
use crate::{
    Row,
    place::{ONE, check},
};

/// A block that may pass the cache wherever it lies in memory, its size in bytes, and the blocks of each thread.
#[repr(align(4096))]
struct Block([u8; BLOCK as usize]);
const BLOCK: u64 = 4096;
const PARTS: u64 = 16;

pub(crate) const ROWS: &[Row] = &[
    ok("open: O_CREAT makes an empty file of the caller's", |p| {
        p.as_user(ONE, |p| p.open("f", OFlags::WRONLY | OFlags::CREATE).map(drop))?;
        let of = p.stat("f")?;
        check((of.st_uid, of.st_gid, of.st_size, of.st_nlink) == (ONE, ONE, 0, 1))
    }),
    fails("open: it is missing", Errno::NOENT, |p| p.open("f", OFlags::RDONLY).map(drop)),
    fails("open: O_CREAT in a directory that is missing", Errno::NOENT, |p| {
        p.open("d/f", OFlags::RDWR | OFlags::CREATE).map(drop)
    }),
    fails("open: the path has a file as a directory", Errno::NOTDIR, |p| {
        p.file("f", 0o644)?;
        p.open("f/g", OFlags::RDONLY).map(drop)
    }),
    fails("open: O_DIRECTORY on a file", Errno::NOTDIR, |p| {
        p.file("f", 0o644)?;
        p.open("f", OFlags::RDONLY | OFlags::DIRECTORY).map(drop)
    }),
    fails("open: O_CREAT and O_EXCL, and the name exists", Errno::EXIST, |p| {
        p.file("f", 0o644)?;
        p.open("f", OFlags::RDWR | OFlags::CREATE | OFlags::EXCL).map(drop)
    }),
    fails("open: O_CREAT and O_EXCL on a link to nothing", Errno::EXIST, |p| {
        p.symlink("none", "l")?;
        p.open("l", OFlags::RDWR | OFlags::CREATE | OFlags::EXCL).map(drop)
    }),
    ok("open: O_CREAT through a link makes its target", |p| {
        p.symlink("f", "l")?;
        p.open("l", OFlags::RDWR | OFlags::CREATE)?;
        p.stat("f").map(drop)
    }),
    fails("open: O_NOFOLLOW on a link", Errno::LOOP, |p| {
        p.symlink("none", "l")?;
        p.open("l", OFlags::RDONLY | OFlags::NOFOLLOW).map(drop)
    }),
    fails("open: the links form a loop", Errno::LOOP, |p| {
        p.symlink("l", "l")?;
        p.open("l", OFlags::RDONLY).map(drop)
    }),
    fails("open: a directory for writing", Errno::ISDIR, |p| {
        p.mkdir("d")?;
        p.open("d", OFlags::WRONLY).map(drop)
    }),
    fails("open: a directory with O_CREAT", Errno::ISDIR, |p| {
        p.mkdir("d")?;
        p.open("d", OFlags::RDONLY | OFlags::CREATE).map(drop)
    }),
    fails("open: the name is too long", Errno::NAMETOOLONG, |p| p.open(&too_long(), OFlags::RDONLY).map(drop)),
    fails("open: may not be read", Errno::ACCESS, |p| {
        p.file("f", 0o600)?;
        p.as_user(ONE, |p| p.open("f", OFlags::RDONLY).map(drop))
    }),
    fails("open: may not be written", Errno::ACCESS, |p| {
        p.file("f", 0o644)?;
        p.as_user(ONE, |p| p.open("f", OFlags::RDWR).map(drop))
    }),
    fails("open: O_TRUNC of a file that may not be written", Errno::ACCESS, |p| {
        p.file("f", 0o644)?;
        p.as_user(ONE, |p| p.open("f", OFlags::RDONLY | OFlags::TRUNC).map(drop))
    }),
    fails("open: O_CREAT in a parent that may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.as_user(ONE, |p| p.open("d/f", OFlags::RDWR | OFlags::CREATE).map(drop))
    }),
    fails("open: an own file without access", Errno::ACCESS, |p| {
        p.as_user(ONE, |p| {
            p.file("f", 0)?;
            p.open("f", OFlags::RDONLY).map(drop)
        })
    }),
    ok("open: root opens a file without access", |p| {
        p.file("f", 0)?;
        p.chown("f", Some(ONE), None)?;
        p.open("f", OFlags::RDWR).map(drop)
    }),
    fails("open: a pipe without a reader for writing, O_NONBLOCK", Errno::NXIO, |p| {
        p.mkfifo("p")?;
        p.open("p", OFlags::WRONLY | OFlags::NONBLOCK).map(drop)
    }),
    ok("open: O_TRUNC empties it", |p| {
        p.write("f", b"xyz")?;
        p.open("f", OFlags::WRONLY | OFlags::TRUNC)?;
        check(p.stat("f")?.st_size == 0)
    }),
    ok("open: O_APPEND writes at the end, wherever the position is", |p| {
        p.write("f", b"one")?;
        let file = p.open("f", OFlags::RDWR | OFlags::APPEND)?;
        seek(&file, SeekFrom::Start(0))?;
        rustix::io::write(&file, b"two")?;
        check(p.read("f")? == b"onetwo")
    }),
    ok("open: a file that is created read-only is written by that descriptor", |p| {
        p.as_user(ONE, |p| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let file = rustix::fs::open(p.path("f"), flags, Mode::from_raw_mode(0o444))?;
            rustix::io::write(&file, b"x")?;
            ftruncate(&file, 9)?;
            check(p.open("f", OFlags::WRONLY).err() == Some(Errno::ACCESS))
        })
    }),
    ok("open: O_TMPFILE makes a file without a name", |p| {
        let file = openat(rustix::fs::CWD, p.path("."), OFlags::RDWR | OFlags::TMPFILE, Mode::from_raw_mode(0o600))?;
        rustix::io::write(&file, b"x")?;
        check(rustix::fs::fstat(&file)?.st_nlink == 0 && pread(&file, &mut [0; 4], 0)? == 1)
    }),
    ok("write: far behind the end leaves a hole of zeroes", |p| {
        let file = p.open("f", OFlags::RDWR | OFlags::CREATE)?;
        pwrite(&file, b"x", 1 << 20)?;
        let mut bytes = [1; 8];
        check(pread(&file, &mut bytes, 100)? == 8 && bytes == [0; 8] && p.stat("f")?.st_size == (1 << 20) + 1)
    }),
    fails("write: to a descriptor that is open for reading", Errno::BADF, |p| {
        p.file("f", 0o644)?;
        pwrite(p.open("f", OFlags::RDONLY)?, b"x", 0).map(drop)
    }),
    fails("read: of a directory", Errno::ISDIR, |p| {
        p.mkdir("d")?;
        pread(p.open("d", OFlags::RDONLY)?, &mut [0; 4], 0).map(drop)
    }),
    ok("read: of a file that was removed", |p| {
        p.write("f", b"xyz")?;
        let file = std::fs::File::from(p.open("f", OFlags::RDWR)?);
        p.unlink("f")?;
        let mut bytes = [0; 3];
        check(file.read_exact_at(&mut bytes, 0).is_ok() && &bytes == b"xyz")?;
        check(file.metadata().is_ok_and(|of| std::os::unix::fs::MetadataExt::nlink(&of) == 0))
    }),
    ok("truncate: shorter and longer, with zeroes", |p| {
        p.write("f", b"abcdef")?;
        p.truncate("f", 3)?;
        check(p.read("f")? == b"abc")?;
        p.truncate("f", 5)?;
        check(p.read("f")? == b"abc\0\0")
    }),
    fails("truncate: it is missing", Errno::NOENT, |p| p.truncate("f", 0)),
    fails("truncate: it is a directory", Errno::ISDIR, |p| p.mkdir("d").and_then(|()| p.truncate("d", 0))),
    fails("truncate: to less than nothing", Errno::INVAL, |p| {
        p.file("f", 0o644)?;
        p.truncate("f", u64::MAX)
    }),
    fails("truncate: the path has a file as a directory", Errno::NOTDIR, |p| {
        p.file("f", 0o644)?;
        p.truncate("f/g", 0)
    }),
    fails("truncate: may not be written", Errno::ACCESS, |p| {
        p.file("f", 0o644)?;
        p.as_user(ONE, |p| p.truncate("f", 0))
    }),
    fails("ftruncate: a descriptor that is open for reading", Errno::INVAL, |p| {
        p.file("f", 0o644)?;
        ftruncate(p.open("f", OFlags::RDONLY)?, 1)
    }),
    ok("ftruncate: a file that was removed", |p| {
        p.write("f", b"xyz")?;
        let file = p.open("f", OFlags::RDWR)?;
        p.unlink("f")?;
        ftruncate(&file, 1)?;
        check(rustix::fs::fstat(&file)?.st_size == 1)
    }),
    ok("pwrite: four threads past the cache (O_DIRECT) at once, and one behind the end", |p| {
        let file = p.open("f", OFlags::RDWR | OFlags::CREATE | OFlags::DIRECT)?;
        ftruncate(&file, 4 * PARTS * BLOCK)?;
        let write = |thread: u64| {
            (0..PARTS).try_for_each(|part| {
                let block = Block([thread as u8 + 1; BLOCK as usize]);
                check(pwrite(&file, &block.0, (4 * part + thread) * BLOCK)? == block.0.len())
            })
        };
        thread::scope(|scope| {
            let threads = [0, 1, 2, 3].map(|thread| scope.spawn(move || write(thread)));
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(Errno::INTR)))
        })?;
        check(pwrite(&file, &Block([5; BLOCK as usize]).0, 4 * PARTS * BLOCK)? == BLOCK as usize)?;
        let bytes = std::fs::read(p.path("f")).map_err(|_| Errno::INTR)?;
        let expected = (0..4 * PARTS).map(|part| part as u8 % 4 + 1).chain([5]);
        check(bytes.chunks(BLOCK as usize).eq(expected.map(|byte| [byte; BLOCK as usize])))
    }),
    ok("fallocate: makes room, with and without a new size", |p| {
        let file = p.open("f", OFlags::RDWR | OFlags::CREATE)?;
        fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1 << 20)?;
        check(p.stat("f")?.st_size == 0 && p.stat("f")?.st_blocks >= 2048)?;
        fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
        check(p.stat("f")?.st_size == 1 << 20)
    }),
    ok("readdir: every name once, also while names are removed", |p| {
        for number in 0..300 {
            p.file(&format!("f{number}"), 0o644)?;
        }
        let mut names = Vec::new();
        for entry in std::fs::read_dir(p.path(".")).map_err(|_| Errno::INTR)? {
            let name = entry.map_err(|_| Errno::INTR)?.file_name().into_string().map_err(|_| Errno::INTR)?;
            p.unlink(&name)?;
            names.push(name);
        }
        names.sort();
        names.dedup();
        check(names.len() == 300)
    }),
    fails("readdir: may not be read", Errno::ACCESS, |p| {
        p.directory("d", 0o311)?;
        p.as_user(ONE, |p| p.open("d", OFlags::RDONLY | OFlags::DIRECTORY).map(drop))
    }),
];
