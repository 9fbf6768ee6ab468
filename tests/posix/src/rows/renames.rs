//! rename and renameat2.

use rustix::{fs::RenameFlags, io::Errno};

use super::{fails, ok, too_long};
use crate::{
    Row,
    place::{ONE, OTHER, check},
};

pub(crate) const ROWS: &[Row] = &[
    ok("rename: a file keeps its number, owner and data", |p| {
        p.write("a", b"x")?;
        p.chown("a", Some(ONE), Some(OTHER))?;
        let before = p.stat("a")?;
        p.mkdir("d")?;
        p.rename("a", "d/b")?;
        let after = p.stat("d/b")?;
        check((before.st_ino, before.st_uid, before.st_gid) == (after.st_ino, after.st_uid, after.st_gid))?;
        check(p.stat("a").err() == Some(Errno::NOENT) && p.read("d/b")? == b"x")
    }),
    ok("rename: replaces a file", |p| {
        p.write("a", b"new")?;
        p.write("b", b"old")?;
        p.rename("a", "b")?;
        check(p.read("b")? == b"new")
    }),
    ok("rename: replaces a link and not its target", |p| {
        p.write("a", b"new")?;
        p.write("f", b"old")?;
        p.symlink("f", "l")?;
        p.rename("a", "l")?;
        check(p.read("f")? == b"old" && p.stat("l")?.st_mode & libc::S_IFMT == libc::S_IFREG)
    }),
    ok("rename: replaces an empty directory", |p| {
        p.mkdir("a")?;
        p.file("a/f", 0o644)?;
        p.mkdir("b")?;
        p.rename("a", "b")?;
        check(p.stat("b/f").is_ok())
    }),
    ok("rename: two names of one file both stay", |p| {
        p.file("a", 0o644)?;
        p.link("a", "b")?;
        p.rename("a", "b")?;
        check(p.stat("a")?.st_nlink == 2 && p.stat("b").is_ok())
    }),
    ok("rename: a name to itself", |p| p.file("a", 0o644).and_then(|()| p.rename("a", "a"))),
    fails("rename: the source is missing", Errno::NOENT, |p| p.rename("a", "b")),
    fails("rename: the new parent is missing", Errno::NOENT, |p| {
        p.file("a", 0o644)?;
        p.rename("a", "none/b")
    }),
    fails("rename: a directory of the path is a file", Errno::NOTDIR, |p| {
        p.file("a", 0o644)?;
        p.file("f", 0o644)?;
        p.rename("a", "f/b")
    }),
    fails("rename: a directory onto a file", Errno::NOTDIR, |p| {
        p.mkdir("d")?;
        p.file("f", 0o644)?;
        p.rename("d", "f")
    }),
    fails("rename: a file onto a directory", Errno::ISDIR, |p| {
        p.mkdir("d")?;
        p.file("f", 0o644)?;
        p.rename("f", "d")
    }),
    fails("rename: onto a directory that is not empty", Errno::NOTEMPTY, |p| {
        p.mkdir("a")?;
        p.mkdir("b")?;
        p.file("b/f", 0o644)?;
        p.rename("a", "b")
    }),
    fails("rename: a directory into itself", Errno::INVAL, |p| {
        p.mkdir("a")?;
        p.mkdir("a/b")?;
        p.rename("a", "a/b/c")
    }),
    fails("rename: the new name is too long", Errno::NAMETOOLONG, |p| {
        p.file("a", 0o644)?;
        p.rename("a", &too_long())
    }),
    fails("rename: the old parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.file("d/a", 0o666)?;
        p.as_user(ONE, |p| p.rename("d/a", "b"))
    }),
    fails("rename: the new parent may not be written", Errno::ACCESS, |p| {
        p.directory("d", 0o755)?;
        p.as_user(ONE, |p| {
            p.file("a", 0o666)?;
            p.rename("a", "d/a")
        })
    }),
    fails("rename: a directory that may not be written gets another parent", Errno::ACCESS, |p| {
        p.as_user(ONE, |p| {
            p.directory("a", 0o555)?;
            p.directory("b", 0o755)?;
            p.rename("a", "b/a")
        })
    }),
    ok("rename: root moves a directory that may not be written", |p| {
        p.directory("a", 0o555)?;
        p.mkdir("b")?;
        p.rename("a", "b/a")?;
        check(p.mode("b/a")? == 0o555)
    }),
    ok("rename: a directory that may not be written within its parent", |p| {
        p.as_user(ONE, |p| {
            p.directory("a", 0o555)?;
            p.rename("a", "b")
        })
    }),
    fails("rename: another user's file in a sticky directory", Errno::PERM, |p| {
        p.directory("d", 0o1777)?;
        p.as_user(OTHER, |p| p.file("d/a", 0o666))?;
        p.as_user(ONE, |p| p.rename("d/a", "d/b"))
    }),
    fails("rename: onto another user's file in a sticky directory", Errno::PERM, |p| {
        p.directory("d", 0o1777)?;
        p.as_user(OTHER, |p| p.file("d/b", 0o666))?;
        p.as_user(ONE, |p| {
            p.file("d/a", 0o666)?;
            p.rename("d/a", "d/b")
        })
    }),
    fails("renameat2: RENAME_NOREPLACE onto a name that exists", Errno::EXIST, |p| {
        p.file("a", 0o644)?;
        p.file("b", 0o644)?;
        p.rename_with("a", "b", RenameFlags::NOREPLACE)
    }),
    ok("renameat2: RENAME_NOREPLACE", |p| {
        p.file("a", 0o644)?;
        p.rename_with("a", "b", RenameFlags::NOREPLACE)
    }),
    ok("renameat2: RENAME_EXCHANGE of a file and a directory", |p| {
        p.write("a", b"x")?;
        p.mkdir("b")?;
        p.file("b/f", 0o644)?;
        p.rename_with("a", "b", RenameFlags::EXCHANGE)?;
        check(p.read("b")? == b"x" && p.stat("a/f").is_ok())
    }),
    fails("renameat2: RENAME_EXCHANGE with a name that is missing", Errno::NOENT, |p| {
        p.file("a", 0o644)?;
        p.rename_with("a", "b", RenameFlags::EXCHANGE)
    }),
];
