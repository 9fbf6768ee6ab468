//! chmod, chown, utimens and what else depends on the owner.

use rustix::io::Errno;

use super::{fails, ok, too_long};
use crate::{
    Row,
    place::{ONE, OTHER, check},
};

pub(crate) const ROWS: &[Row] = &[
    ok("chmod: every bit is kept", |p| {
        p.file("f", 0o644)?;
        p.mkdir("d")?;
        for mode in [0, 0o1, 0o70, 0o400, 0o777, 0o1777, 0o2755, 0o4755, 0o7777] {
            for name in ["f", "d"] {
                p.chmod(name, mode)?;
                check(p.mode(name)? == mode)?;
            }
        }
        p.chmod("d", 0o755)
    }),
    ok("chmod: changes the time of change and no other", |p| {
        p.file("f", 0o644)?;
        p.utimens("f", Some(1_000_000))?;
        p.chmod("f", 0o600)?;
        let of = p.stat("f")?;
        check(of.st_mtime == 1_000_000 && of.st_ctime > 1_000_000)
    }),
    fails("chmod: it is missing", Errno::NOENT, |p| p.chmod("f", 0o644)),
    fails("chmod: the path has a file as a directory", Errno::NOTDIR, |p| {
        p.file("f", 0o644)?;
        p.chmod("f/g", 0o644)
    }),
    fails("chmod: the name is too long", Errno::NAMETOOLONG, |p| p.chmod(&too_long(), 0o644)),
    fails("chmod: the links form a loop", Errno::LOOP, |p| {
        p.symlink("l", "l")?;
        p.chmod("l", 0o644)
    }),
    fails("chmod: of another user's file", Errno::PERM, |p| {
        p.file("f", 0o666)?;
        p.as_user(ONE, |p| p.chmod("f", 0o600))
    }),
    fails("chmod: the path may not be searched", Errno::ACCESS, |p| {
        p.directory("d", 0o666)?;
        p.file("d/f", 0o666)?;
        p.as_user(ONE, |p| p.chmod("d/f", 0o600))
    }),
    ok("chmod: an own file without any access, and back", |p| {
        p.as_user(ONE, |p| {
            p.file("f", 0)?;
            p.chmod("f", 0o600)
        })
    }),
    ok("chmod: drops set-group-id of a group that one is not in", |p| {
        p.file("f", 0o755)?;
        p.chown("f", Some(ONE), Some(OTHER))?;
        p.as_user(ONE, |p| p.chmod("f", 0o2755))?;
        check(p.mode("f")? == 0o755)
    }),
    ok("chown: root gives anything to anybody", |p| {
        p.file("f", 0o644)?;
        p.mkdir("d")?;
        p.symlink("f", "l")?;
        for name in ["f", "d"] {
            p.chown(name, Some(ONE), Some(OTHER))?;
            let of = p.stat(name)?;
            check((of.st_uid, of.st_gid) == (ONE, OTHER))?;
            p.chown(name, Some(OTHER), None)?;
            check(p.stat(name)?.st_gid == OTHER)?;
        }
        p.chown("l", Some(ONE), Some(ONE))
    }),
    fails("chown: it is missing", Errno::NOENT, |p| p.chown("f", Some(ONE), None)),
    fails("chown: away by its owner", Errno::PERM, |p| {
        p.as_user(ONE, |p| {
            p.file("f", 0o644)?;
            p.chown("f", Some(OTHER), None)
        })
    }),
    fails("chown: to a group that the owner is not in", Errno::PERM, |p| {
        p.as_user(ONE, |p| {
            p.file("f", 0o644)?;
            p.chown("f", None, Some(OTHER))
        })
    }),
    ok("chown: to a group of the owner", |p| {
        p.as_user_in(ONE, &[OTHER], |p| {
            p.file("f", 0o644)?;
            p.chown("f", None, Some(OTHER))
        })?;
        check(p.stat("f")?.st_gid == OTHER)
    }),
    fails("chown: of another user's file", Errno::PERM, |p| {
        p.file("f", 0o666)?;
        p.as_user(ONE, |p| p.chown("f", Some(ONE), None))
    }),
    ok("chown: clears set-user-id and set-group-id of a program", |p| {
        p.file("f", 0o6755)?;
        p.chown("f", Some(ONE), Some(ONE))?;
        p.chmod("f", 0o6755)?;
        p.as_user_in(ONE, &[OTHER], |p| p.chown("f", None, Some(OTHER)))?;
        check(p.mode("f")? == 0o755)
    }),
    ok("write: by another user clears set-user-id and set-group-id", |p| {
        p.file("f", 0o777)?;
        p.chmod("f", 0o6777)?;
        p.as_user(ONE, |p| p.write("f", b"x"))?;
        check(p.mode("f")? == 0o777)
    }),
    ok("utimens: both times, to the nanosecond", |p| {
        p.file("f", 0o644)?;
        p.utimens("f", Some(1_234_567_890))?;
        let of = p.stat("f")?;
        check((of.st_mtime, of.st_atime, of.st_mtime_nsec) == (1_234_567_890, 1_234_567_890, 7))
    }),
    ok("utimens: times before 1970 and after 2038", |p| {
        p.file("f", 0o644)?;
        for time in [-1_000_000, 5_000_000_000] {
            p.utimens("f", Some(time))?;
            check(p.stat("f")?.st_mtime == time)?;
        }
        Ok(())
    }),
    fails("utimens: it is missing", Errno::NOENT, |p| p.utimens("f", None)),
    fails("utimens: a time on another user's file", Errno::PERM, |p| {
        p.file("f", 0o666)?;
        p.as_user(ONE, |p| p.utimens("f", Some(1)))
    }),
    fails("utimens: now, on a file that may not be written", Errno::ACCESS, |p| {
        p.file("f", 0o644)?;
        p.as_user(ONE, |p| p.utimens("f", None))
    }),
    ok("utimens: now, on another user's file that may be written", |p| {
        p.file("f", 0o666)?;
        p.as_user(ONE, |p| p.utimens("f", None))
    }),
    ok("utimens: a time on an own file that may not be written", |p| {
        p.as_user(ONE, |p| {
            p.file("f", 0o444)?;
            p.utimens("f", Some(1))
        })
    }),
];
