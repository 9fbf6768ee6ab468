//! mkdir, rmdir, unlink, link, symlink, readlink, mkfifo, mknod.

use rustix::{
    fs::{AtFlags, CWD, FileType, Mode, linkat, mknodat, readlink},
    io::Errno,
};

use super::{deep, fails, ok, too_long};
use crate::{
    Row,
    place::{ONE, OTHER, check},
};

pub(crate) const ROWS: &[Row] = &[
    ok("mkdir: makes an empty directory with two links", |p| {
        p.mkdir("d")?;
        let of = p.stat("d")?;
        check(of.st_mode & libc::S_IFMT == libc::S_IFDIR && of.st_uid == 0 && of.st_gid == 0)
    }),
    fails("mkdir: the name exists", Errno::EXIST, |p| p.mkdir("d").and_then(|()| p.mkdir("d"))),
    fails("mkdir: the name is a file", Errno::EXIST, |p| p.file("f", 0o644).and_then(|()| p.mkdir("f"))),
    fails("mkdir: the name is a link to nothing", Errno::EXIST, |p| {
        p.symlink("none", "l")?;
        p.mkdir("l")
    }),
    fails("mkdir: a directory of the path is missing", Errno::NOENT, |p| p.mkdir("none/d")),
    fails("mkdir: a directory of the path is a file", Errno::NOTDIR, |p| {
        p.file("f", 0o644)?;
        p.mkdir("f/d")
    }),
    fails("mkdir: the name is too long", Errno::NAMETOOLONG, |p| p.mkdir(&too_long())),
    ok("mkdir: the name is as long as it may be", |p| p.mkdir(&too_long()[1..])),
    fails("mkdir: the path is too long", Errno::NAMETOOLONG, |p| p.mkdir(&deep())),
    fails("mkdir: the path has a loop of links", Errno::LOOP, |p| {
        p.symlink("b", "a")?;
        p.symlink("a", "b")?;
        p.mkdir("a/d")
    }),
    fails("mkdir: the parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.as_user(ONE, |p| p.mkdir("d/e"))
    }),
    fails("mkdir: the parent may not be searched", Errno::ACCESS, |p| {
        p.directory("d", 0o666)?;
        p.as_user(ONE, |p| p.mkdir("d/e"))
    }),
    ok("mkdir: belongs to the user who makes it", |p| {
        p.as_user(ONE, |p| p.mkdir("d"))?;
        let of = p.stat("d")?;
        check((of.st_uid, of.st_gid) == (ONE, ONE))
    }),
    ok("mkdir: a set-group-id parent gives its group and the bit", |p| {
        p.directory("d", 0o777)?;
        p.chown("d", None, Some(OTHER))?;
        p.chmod("d", 0o2777)?;
        p.as_user(ONE, |p| p.mkdir("d/e"))?;
        let of = p.stat("d/e")?;
        check((of.st_uid, of.st_gid, of.st_mode & 0o2000) == (ONE, OTHER, 0o2000))
    }),
    // A file system gives it the number of the file, and its clock may have the same time still.
    ok("mkdir: a file was removed just before", |p| {
        for _ in 0..100 {
            p.file("f", 0o644)?;
            p.unlink("f")?;
            p.mkdir("d")?;
            p.file("d/f", 0o644)?;
            p.unlink("d/f")?;
            p.rmdir("d")?;
        }
        Ok(())
    }),
    ok("mkdir, rmdir: the parent's count of links follows", |p| {
        let before = p.stat(".")?.st_nlink;
        p.mkdir("d")?;
        let between = p.stat(".")?.st_nlink;
        p.rmdir("d")?;
        // Some file systems do not count.
        check((between == before + 1 || before == 1) && p.stat(".")?.st_nlink == before)
    }),
    fails("rmdir: it is missing", Errno::NOENT, |p| p.rmdir("d")),
    fails("rmdir: it is a file", Errno::NOTDIR, |p| p.file("f", 0o644).and_then(|()| p.rmdir("f"))),
    fails("rmdir: it is a link to a directory", Errno::NOTDIR, |p| {
        p.mkdir("d")?;
        p.symlink("d", "l")?;
        p.rmdir("l")
    }),
    fails("rmdir: it is not empty", Errno::NOTEMPTY, |p| {
        p.mkdir("d")?;
        p.file("d/f", 0o644)?;
        p.rmdir("d")
    }),
    fails("rmdir: its name is `.`", Errno::INVAL, |p| p.mkdir("d").and_then(|()| p.rmdir("d/."))),
    fails("rmdir: its name is `..`", Errno::NOTEMPTY, |p| p.mkdir("d").and_then(|()| p.rmdir("d/.."))),
    fails("rmdir: the parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.directory("d/e", 0o777)?;
        p.as_user(ONE, |p| p.rmdir("d/e"))
    }),
    fails("rmdir: it is another user's in a sticky directory", Errno::PERM, |p| {
        p.directory("d", 0o1777)?;
        p.as_user(OTHER, |p| p.mkdir("d/e"))?;
        p.as_user(ONE, |p| p.rmdir("d/e"))
    }),
    fails("unlink: it is missing", Errno::NOENT, |p| p.unlink("f")),
    fails("unlink: it is a directory", Errno::ISDIR, |p| p.mkdir("d").and_then(|()| p.unlink("d"))),
    fails("unlink: the path has a file as a directory", Errno::NOTDIR, |p| {
        p.file("f", 0o644)?;
        p.unlink("f/g")
    }),
    fails("unlink: the name is too long", Errno::NAMETOOLONG, |p| p.unlink(&too_long())),
    ok("unlink: removes a link and not its target", |p| {
        p.file("f", 0o644)?;
        p.symlink("f", "l")?;
        p.unlink("l")?;
        check(p.stat("f").is_ok() && p.stat("l").err() == Some(Errno::NOENT))
    }),
    ok("unlink: a read-only file of one's own", |p| {
        p.as_user(ONE, |p| {
            p.directory("d", 0o755)?;
            p.file("d/f", 0)?;
            p.unlink("d/f")
        })
    }),
    fails("unlink: the parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.file("d/f", 0o666)?;
        p.as_user(ONE, |p| p.unlink("d/f"))
    }),
    fails("unlink: it is another user's in a sticky directory", Errno::PERM, |p| {
        p.directory("d", 0o1777)?;
        p.as_user(OTHER, |p| p.file("d/f", 0o666))?;
        p.as_user(ONE, |p| p.unlink("d/f"))
    }),
    ok("unlink: it is one's own in a sticky directory", |p| {
        p.directory("d", 0o1777)?;
        p.as_user(ONE, |p| {
            p.file("d/f", 0o600)?;
            p.unlink("d/f")
        })
    }),
    ok("link: both names are one file", |p| {
        p.write("a", b"x")?;
        p.link("a", "b")?;
        let (a, b) = (p.stat("a")?, p.stat("b")?);
        check((a.st_ino, a.st_nlink, b.st_nlink) == (b.st_ino, 2, 2))?;
        p.unlink("a")?;
        check(p.stat("b")?.st_nlink == 1 && p.read("b")? == b"x")
    }),
    fails("link: the source is missing", Errno::NOENT, |p| p.link("a", "b")),
    fails("link: the new name exists", Errno::EXIST, |p| {
        p.file("a", 0o644)?;
        p.file("b", 0o644)?;
        p.link("a", "b")
    }),
    fails("link: the source is a directory", Errno::PERM, |p| p.mkdir("d").and_then(|()| p.link("d", "e"))),
    fails("link: the parent may not be written", Errno::ACCESS, |p| {
        p.as_user(ONE, |p| p.file("a", 0o644))?;
        p.directory("d", 0o755)?;
        p.as_user(ONE, |p| p.link("a", "d/b"))
    }),
    ok("link: a symbolic link itself", |p| {
        p.symlink("none", "l")?;
        p.link("l", "m")?;
        check(p.stat("m")?.st_mode & libc::S_IFMT == libc::S_IFLNK && p.stat("l")?.st_nlink == 2)
    }),
    ok("link: the target of a symbolic link", |p| {
        p.file("f", 0o644)?;
        p.symlink("f", "l")?;
        linkat(CWD, p.path("l"), CWD, p.path("m"), AtFlags::SYMLINK_FOLLOW)?;
        check(p.stat("m")?.st_ino == p.stat("f")?.st_ino)
    }),
    ok("symlink, readlink: any target is kept", |p| {
        for (name, target) in [("a", "/etc/passwd"), ("b", "../../x"), ("c", "no such thing"), ("d", "\u{fc}\n")] {
            p.symlink(target, name)?;
            check(readlink(p.path(name), Vec::new())?.as_bytes() == target.as_bytes())?;
            check(p.stat(name)?.st_size == target.len() as i64)?;
        }
        Ok(())
    }),
    fails("symlink: the name exists", Errno::EXIST, |p| {
        p.file("f", 0o644)?;
        p.symlink("x", "f")
    }),
    fails("symlink: the target is empty", Errno::NOENT, |p| p.symlink("", "l")),
    fails("symlink: the target is too long", Errno::NAMETOOLONG, |p| p.symlink(&deep(), "l")),
    fails("symlink: the parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.as_user(ONE, |p| p.symlink("x", "d/l"))
    }),
    fails("readlink: it is a file", Errno::INVAL, |p| {
        p.file("f", 0o644)?;
        readlink(p.path("f"), Vec::new()).map(drop)
    }),
    fails("readlink: it is missing", Errno::NOENT, |p| readlink(p.path("l"), Vec::new()).map(drop)),
    ok("mkfifo: makes a pipe that can be given away", |p| {
        p.mkfifo("p")?;
        p.chown("p", Some(ONE), Some(OTHER))?;
        p.chmod("p", 0o620)?;
        let of = p.stat("p")?;
        check((of.st_mode, of.st_uid, of.st_gid, of.st_size) == (libc::S_IFIFO | 0o620, ONE, OTHER, 0))
    }),
    fails("mkfifo: the name exists", Errno::EXIST, |p| p.mkfifo("p").and_then(|()| p.mkfifo("p"))),
    fails("mkfifo: the parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.as_user(ONE, |p| p.mkfifo("d/p"))
    }),
    ok("mknod: makes a file and a socket", |p| {
        for (name, kind, bits) in [("f", FileType::RegularFile, libc::S_IFREG), ("s", FileType::Socket, libc::S_IFSOCK)]
        {
            mknodat(CWD, p.path(name), kind, Mode::from_raw_mode(0o640), 0)?;
            check(p.stat(name)?.st_mode == bits | 0o640)?;
        }
        Ok(())
    }),
    fails("mknod: a device by a user without privileges", Errno::PERM, |p| {
        p.as_user(ONE, |p| mknodat(CWD, p.path("n"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), 0x103))
    }),
];
