//! Ways out of a directory that the host shares: to other files of the host, to Bulkhead's own, and to what is shared
//! for reading only.
//!
//! The same attempts succeed on the directory itself, without a wall in between. That a file of the host was reached
//! shows in its contents, which begin with [`SECRET`], or in what the suite finds on the host afterwards.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{
    attempt::{At, Blocked, Outcome, any, wait},
    sys,
};

/// Start of the contents of every file that may not be reached.
const SECRET: &[u8] = b"secret of the host";

/// Duration of a race.
const RACE: Duration = Duration::from_secs(2);

/// Directories that lie above one at most.
const MAX_CLIMB: usize = 12;

/// The places of a container with shares.
pub(crate) struct Places {
    /// A directory that is shared for writing; Bulkhead's own directories lie in it.
    share: PathBuf,
    /// A directory in it that is shared for reading only.
    fixed: PathBuf,
    /// `planted/bind` of the first, mounted by itself.
    bind: PathBuf,
    /// The host's path of a directory that is not shared.
    outside: PathBuf,
    /// The host's path of a directory that is shared, and not mounted in the container.
    other: PathBuf,
    /// Bulkhead's own directories, by their paths in the first.
    own: Vec<PathBuf>,
}

/// Name and what it does.
type Named = (&'static str, fn(&Places) -> Outcome);

/// Every attempt, in this order: the last ones move directories.
pub(crate) const ATTEMPTS: &[Named] = &[
    ("link to an absolute path", absolute_links),
    ("link to a relative path", relative_links),
    ("link through procfs", procfs_links),
    (".. out of a share", parents),
    ("hard link to a file outside", hard_links),
    ("directory moved out of its bind", moved_out_of_bind),
    ("read-only share: opened for writing", fixed_open),
    ("read-only share: names", fixed_names),
    ("read-only share: renames", fixed_renames),
    ("read-only share: hard links", fixed_links),
    ("read-only share: files without a name", fixed_unnamed),
    ("read-only share: owners, modes, times", fixed_attributes),
    ("read-only share: mapping", fixed_mapping),
    ("read-only share: copies between files", fixed_copies),
    ("read-only share: fallocate", fixed_allocation),
    ("read-only share: ioctl", fixed_ioctl),
    ("read-only share: remounted", fixed_remounted),
    ("own files: by path", own_by_path),
    ("own files: in a list", own_in_list),
    ("own files: hard links", own_hard_links),
    ("own files: through links", own_links),
    ("own files: directory above moved", own_moved),
    ("own files: replaced", own_replaced),
    ("race of a link and a directory", race_of_links),
    ("race with the host's renames", race_with_host),
    ("race of a directory that leaves its bind", race_of_bind),
];

impl Places {
    /// From the command line: share, fixed, bind, outside, other, own directories.
    pub(crate) fn new(words: &[&str]) -> Option<Self> {
        let [share, fixed, bind, outside, other, own @ ..] = words else { return None };
        let [share, fixed, bind, outside, other] = [share, fixed, bind, outside, other].map(PathBuf::from);
        Some(Self { share, fixed, bind, outside, other, own: own.iter().map(PathBuf::from).collect() })
    }

    /// A directory of the probe's own.
    fn work(&self, name: &str) -> PathBuf {
        self.share.join("work").join(name)
    }

    fn planted(&self, name: &str) -> PathBuf {
        self.share.join("planted").join(name)
    }

    /// The read-only share, by its own mount and inside of the one around it.
    fn all_fixed(&self) -> [PathBuf; 2] {
        [self.fixed.clone(), self.share.join("fixed")]
    }

    /// The file in each.
    fn fixed_files(&self) -> [PathBuf; 2] {
        self.all_fixed().map(|fixed| fixed.join("file"))
    }

    /// Makes what would be dangerous on the host, were it real. The suite looks there.
    pub(crate) fn make(&self) {
        let at = |name: &str| self.work(&format!("made/{name}"));
        let _ = fs::create_dir_all(self.work("made"));
        for name in ["set-user-id", "capability", "trusted", "security", "record", "owner"] {
            let _ = fs::write(at(name), "#!/bin/sh\n");
        }
        let _ = fs::set_permissions(at("set-user-id"), fs::Permissions::from_mode(0o6755));
        let _ = std::os::unix::fs::chown(at("owner"), Some(4321), Some(4321));
        for (name, kind, device) in [("null", libc::S_IFCHR, 0x103_u64), ("disk", libc::S_IFBLK, 0xfe00)] {
            if let Ok(path) = c(&at(name)) {
                let _ = sys::call(libc::SYS_mknodat, &[&libc::AT_FDCWD, &&path, &(kind | 0o666), &device]);
            }
        }
        // cap_setuid in the permitted set, and in effect (`linux/capability.h`, VFS_CAP_REVISION_2).
        let capability = [1, 0, 0, 2, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        for (file, name, value) in [
            ("capability", "security.capability", &capability[..]),
            ("trusted", "trusted.escape", b"x"),
            ("security", "security.escape", b"x"),
            ("record", "user.bulkhead.owner", b"x"),
        ] {
            let _ = set_xattr(&at(file), name, value);
        }
    }
}

/// Makes all attempts, with the name of each before its line.
pub(crate) fn all(places: &Places) {
    places.make();
    for (name, attempt) in ATTEMPTS {
        crate::attempt::report(name, || attempt(places));
    }
}

fn c(path: &Path) -> io::Result<std::ffi::CString> {
    sys::c(&path.to_string_lossy()).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) -> io::Result<()> {
    let (path, name) = (c(path)?, sys::c(name).map_err(|_| io::ErrorKind::InvalidInput)?);
    sys::call(libc::SYS_setxattr, &[&&path, &&name, &value.as_ptr(), &value.len(), &0]).map(drop)
}

fn rename(from: &Path, to: &Path, flags: u32) -> io::Result<()> {
    let (from, to) = (c(from)?, c(to)?);
    sys::call(libc::SYS_renameat2, &[&libc::AT_FDCWD, &&from, &libc::AT_FDCWD, &&to, &flags]).map(drop)
}

fn open(path: &Path, flags: i32) -> io::Result<OwnedFd> {
    let path = c(path)?;
    sys::open_call(libc::SYS_openat, &[&libc::AT_FDCWD, &&path, &(flags | libc::O_CLOEXEC), &0o600])
}

/// Opens a path below a directory.
fn open_at(directory: &OwnedFd, path: &str) -> io::Result<File> {
    let path = sys::c(path).map_err(|_| io::ErrorKind::InvalidInput)?;
    let flags = libc::O_RDONLY | libc::O_CLOEXEC;
    sys::open_call(libc::SYS_openat, &[&directory.as_raw_fd(), &&path, &flags]).map(File::from)
}

/// Success if an open file has the contents of one that may not be reached.
fn judge(file: io::Result<File>, what: &str) -> Outcome {
    let mut bytes = Vec::new();
    file.and_then(|file| file.take(64).read_to_end(&mut bytes)).at(what)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if bytes.starts_with(SECRET) {
        Ok(format!("{what}: {text}"))
    } else {
        Err(Blocked::Refused(format!("another file: {text}")))
    }
}

fn judge_path(path: &Path) -> Outcome {
    judge(File::open(path), &path.display().to_string())
}

/// Makes a link to `target`, and tries it and the one that the host has made: to read a file there, and to make one.
fn through_links(places: &Places, name: &str, target: &Path) -> Outcome {
    let made = places.work(name);
    let _ = fs::remove_file(&made);
    symlink(target, &made).at("symlink")?;
    any([made, places.planted(name)].into_iter().flat_map(|link| {
        let mark = link.join(format!("mark-{name}"));
        let marked = File::create_new(&mark).at("create").map(|_| format!("{} was made", mark.display()));
        [
            judge_path(&link.join("secret")),
            if link.is_dir() { marked } else { Err(Blocked::Absent("no directory".into())) },
        ]
    }))
}

fn absolute_links(places: &Places) -> Outcome {
    through_links(places, "absolute", &places.outside)
}

fn relative_links(places: &Places) -> Outcome {
    let target =
        format!("{}{}", "../".repeat(MAX_CLIMB), places.outside.strip_prefix("/").unwrap_or(&places.outside).display());
    through_links(places, "relative", Path::new(&target))
}

fn procfs_links(places: &Places) -> Outcome {
    let outside = places.outside.strip_prefix("/").unwrap_or(&places.outside);
    let share = open(&places.share, libc::O_PATH | libc::O_DIRECTORY).at("open the share")?;
    let above = "../".repeat(MAX_CLIMB);
    let targets = [
        Path::new("/proc/self/root").join(outside),
        Path::new("/proc/1/root").join(outside),
        Path::new("/proc/self/cwd").join(&above).join(outside),
        PathBuf::from(format!("/proc/self/fd/{}", share.as_raw_fd())).join(&above).join(outside),
    ];
    any(targets.iter().map(|target| through_links(places, "process", target)))
}

fn parents(places: &Places) -> Outcome {
    let share = open(&places.share, libc::O_PATH | libc::O_DIRECTORY).at("open the share")?;
    let outside = places.outside.strip_prefix("/").unwrap_or(&places.outside).join("secret");
    let at = |climb: usize| format!("{}{}", "../".repeat(climb), outside.display());
    any((1..MAX_CLIMB).flat_map(|climb| {
        let path = at(climb);
        [
            judge(open_at(&share, &path), &path),
            judge_path(&places.share.join(&path)),
            judge_path(&places.fixed.join(&path)),
        ]
    }))
}

fn hard_links(places: &Places) -> Outcome {
    let link = |from: &Path, name: &str, flags: i32| {
        let new = places.work(name);
        let (old, path) = (c(from).at("link")?, c(&new).at("link")?);
        sys::call(libc::SYS_linkat, &[&libc::AT_FDCWD, &&old, &libc::AT_FDCWD, &&path, &flags]).at("link")?;
        judge_path(&new)
    };
    any([
        link(&places.outside.join("secret"), "hard", 0),
        link(&places.planted("absolute/secret"), "hard-absolute", 0),
        link(&places.planted("file"), "hard-file", libc::AT_SYMLINK_FOLLOW),
    ])
}

/// The directory that is shared and not mounted, looked for from each directory above an open one.
fn climb(directory: &OwnedFd, places: &Places) -> Outcome {
    let other = places.other.strip_prefix("/").unwrap_or(&places.other).join("secret");
    any((1..MAX_CLIMB).map(|climb| {
        let path = format!("{}{}", "../".repeat(climb), other.display());
        judge(open_at(directory, &path), &path)
    }))
}

fn moved_out_of_bind(places: &Places) -> Outcome {
    let (deep, away) = (places.planted("bind/deep"), places.work("away"));
    fs::create_dir_all(deep.join("er")).at("mkdir")?;
    let held = open(&places.bind.join("deep/er"), libc::O_PATH | libc::O_DIRECTORY).at("open the bind")?;
    rename(&deep, &away, 0).at("rename")?;
    let found = climb(&held, places);
    let _ = rename(&away, &deep, 0);
    found
}

/// Success if a call on the read-only share succeeds, by any of its names.
fn on_fixed<T>(paths: [PathBuf; 2], what: &str, change: impl Fn(&Path) -> io::Result<T>) -> Outcome {
    any(paths.into_iter().map(|path| change(&path).at(what).map(|_| format!("{what} of {}", path.display()))))
}

fn fixed_open(places: &Places) -> Outcome {
    let flags =
        [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC, libc::O_WRONLY | libc::O_APPEND, libc::O_RDWR | libc::O_DIRECT];
    let opened = flags.map(|flags| on_fixed(places.fixed_files(), "open", |path| open(path, flags)));
    let truncated = on_fixed(places.fixed_files(), "truncate", |path| {
        let path = c(path)?;
        sys::call(libc::SYS_truncate, &[&&path, &0])
    });
    let again = on_fixed(places.fixed_files(), "open again", |path| {
        let file = File::open(path)?;
        File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()))
    });
    any(opened.into_iter().chain([truncated, again]))
}

fn fixed_names(places: &Places) -> Outcome {
    let fixed = || places.all_fixed();
    any([
        on_fixed(fixed(), "mkdir", |at| fs::create_dir(at.join("new-directory"))),
        on_fixed(fixed(), "create", |at| File::create_new(at.join("sub/new"))),
        on_fixed(fixed(), "symlink", |at| symlink("x", at.join("new-link"))),
        on_fixed(fixed(), "mknod", |at| {
            let path = c(&at.join("new-pipe"))?;
            sys::call(libc::SYS_mknodat, &[&libc::AT_FDCWD, &&path, &(libc::S_IFIFO | 0o600), &0])
        }),
        on_fixed(fixed(), "unlink", |at| fs::remove_file(at.join("sub/victim"))),
        on_fixed(fixed(), "rmdir", |at| fs::remove_dir(at.join("empty"))),
    ])
}

fn fixed_renames(places: &Places) -> Outcome {
    let (mine, taken) = (places.work("mine"), places.work("taken"));
    fs::write(&mine, "mine").at("write")?;
    let fixed = || places.all_fixed();
    let there_and_back = |from: &Path, to: &Path, flags: u32| {
        rename(from, to, flags)?;
        rename(to, from, flags)
    };
    any([
        on_fixed(fixed(), "rename within", |at| rename(&at.join("sub/file"), &at.join("sub/other"), 0)),
        on_fixed(fixed(), "rename into", |at| there_and_back(&mine, &at.join("mine"), 0)),
        on_fixed(fixed(), "rename out of", |at| there_and_back(&at.join("file"), &taken, 0)),
        on_fixed(fixed(), "exchange", |at| there_and_back(&at.join("file"), &mine, libc::RENAME_EXCHANGE)),
        on_fixed(fixed(), "rename", |at| there_and_back(at, &places.work("fixed"), 0)),
    ])
}

fn fixed_links(places: &Places) -> Outcome {
    let link = |old: &Path, new: &str, flags: i32| {
        let new = places.work(new);
        let _ = fs::remove_file(&new);
        let (old, path) = (c(old)?, c(&new)?);
        sys::call(libc::SYS_linkat, &[&libc::AT_FDCWD, &&old, &libc::AT_FDCWD, &&path, &flags])?;
        File::options().append(true).open(&new)?.write_all(b"written")
    };
    any([
        on_fixed(places.fixed_files(), "link", |path| link(path, "linked", 0)),
        on_fixed(places.fixed_files(), "link by descriptor", |path| {
            let file = File::open(path)?;
            let by = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            link(&by, "linked-by-descriptor", libc::AT_SYMLINK_FOLLOW)
        }),
        on_fixed(places.all_fixed(), "link into", |at| {
            let mine = places.work("mine-too");
            fs::write(&mine, "mine")?;
            fs::hard_link(&mine, at.join("linked"))
        }),
    ])
}

fn fixed_unnamed(places: &Places) -> Outcome {
    let link = |file: &OwnedFd, at: &Path| {
        let (old, new) = (c(Path::new(&format!("/proc/self/fd/{}", file.as_raw_fd())))?, c(&at.join("unnamed"))?);
        sys::call(libc::SYS_linkat, &[&libc::AT_FDCWD, &&old, &libc::AT_FDCWD, &&new, &libc::AT_SYMLINK_FOLLOW])
    };
    any([
        on_fixed(places.all_fixed(), "unnamed", |at| open(at, libc::O_TMPFILE | libc::O_RDWR)),
        on_fixed(places.all_fixed(), "named", |at| link(&open(&places.work("."), libc::O_TMPFILE | libc::O_RDWR)?, at)),
    ])
}

fn fixed_attributes(places: &Places) -> Outcome {
    let files = || places.fixed_files();
    any([
        on_fixed(files(), "chmod", |path| fs::set_permissions(path, fs::Permissions::from_mode(0o777))),
        on_fixed(files(), "chown", |path| std::os::unix::fs::chown(path, Some(7), Some(7))),
        on_fixed(files(), "utimes", |path| File::open(path)?.set_modified(std::time::UNIX_EPOCH)),
        on_fixed(files(), "setxattr", |path| set_xattr(path, "user.escape", b"x")),
        on_fixed(places.all_fixed(), "chmod", |path| fs::set_permissions(path, fs::Permissions::from_mode(0o777))),
    ])
}

/// The file open for writing if that is possible, and for reading else.
fn best(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path).or_else(|_| File::open(path))
}

fn fixed_mapping(places: &Places) -> Outcome {
    on_fixed(places.all_fixed().map(|fixed| fixed.join("mapped")), "mapping", |path| {
        let at = sys::map(best(path)?.as_raw_fd(), 4096, 0, libc::MAP_SHARED)?;
        // SAFETY: the first byte of a mapping of a file that is longer, made for this alone.
        unsafe { at.cast::<u8>().write_volatile(b'M') };
        sys::call(libc::SYS_msync, &[&at, &4096, &libc::MS_SYNC])
    })
}

fn fixed_copies(places: &Places) -> Outcome {
    let source = places.work("source");
    fs::write(&source, "copied").at("write")?;
    let copy = |number: libc::c_long| {
        on_fixed(places.fixed_files(), "copy", |path| {
            let (from, to) = (File::open(&source)?, best(path)?);
            let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
            if number == libc::SYS_sendfile {
                sys::call(number, &[&to, &from, &0, &4])
            } else {
                sys::call(number, &[&from, &0, &to, &0, &4, &0])
            }
        })
    };
    let cloned = on_fixed(places.fixed_files(), "clone", |path| {
        let (from, to) = (File::open(&source)?, best(path)?);
        sys::call(libc::SYS_ioctl, &[&to.as_raw_fd(), &libc::FICLONE, &from.as_raw_fd()])
    });
    any([copy(libc::SYS_copy_file_range), copy(libc::SYS_sendfile), cloned])
}

fn fixed_allocation(places: &Places) -> Outcome {
    let modes = [0, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, libc::FALLOC_FL_ZERO_RANGE];
    any(modes.map(|mode| {
        on_fixed(places.fixed_files(), "fallocate", |path| {
            sys::call(libc::SYS_fallocate, &[&best(path)?.as_raw_fd(), &mode, &0, &4096])
        })
    }))
}

fn fixed_ioctl(places: &Places) -> Outcome {
    // FS_NODUMP_FL: harmless, and kept by every disk file system (`linux/fs.h`).
    const NO_DUMP: libc::c_int = 0x40;
    on_fixed(places.fixed_files(), "FS_IOC_SETFLAGS", |path| {
        let (file, mut flags) = (File::open(path)?, 0);
        sys::call(libc::SYS_ioctl, &[&file.as_raw_fd(), &libc::FS_IOC_GETFLAGS, &&raw mut flags])?;
        flags |= NO_DUMP;
        sys::call(libc::SYS_ioctl, &[&file.as_raw_fd(), &libc::FS_IOC_SETFLAGS, &&raw const flags])
    })
}

fn fixed_remounted(places: &Places) -> Outcome {
    let fixed = places.fixed.display().to_string();
    let again = sys::unshare(libc::CLONE_NEWNS).at("unshare").and_then(|()| {
        sys::mount("none", &fixed, "", libc::MS_REMOUNT | libc::MS_BIND, "")
            .or_else(|_| sys::mount("none", &fixed, "", libc::MS_REMOUNT, ""))
    });
    let why = again.err().map_or("remounted".to_owned(), |blocked| blocked.to_string());
    let written =
        on_fixed(places.fixed_files(), "write", |path| File::options().append(true).open(path)?.write_all(b"x"));
    written.map_err(|blocked| Blocked::Refused(format!("{why}; {blocked}")))
}

/// The spellings of a path below the share.
fn spellings(places: &Places, own: &Path) -> Vec<PathBuf> {
    let (parent, name) = (own.parent().unwrap_or(Path::new("")), own.file_name().unwrap_or_default().to_string_lossy());
    let share = places.share.display();
    let parent = parent.display();
    [
        format!("{share}/{parent}/{name}"),
        format!("{share}/{parent}/{name}/"),
        format!("{share}//{parent}/.//{name}/."),
        format!("{share}/{parent}/../{parent}/{name}"),
        format!("{share}/{parent}/{}", name.to_uppercase()),
        format!("/proc/self/root{share}/{parent}/{name}"),
        format!("/host_mnt{share}/{parent}/{name}"),
    ]
    .map(PathBuf::from)
    .into()
}

fn own_by_path(places: &Places) -> Outcome {
    any(places.own.iter().flat_map(|own| spellings(places, own)).map(|path| {
        let text = path.display().to_string();
        fs::read_dir(&path).at(&text).map(|_| format!("{text} is there"))
    }))
}

fn own_in_list(places: &Places) -> Outcome {
    any(places.own.iter().map(|own| {
        let path = places.share.join(own);
        let (parent, name) = (path.parent().unwrap_or(&path), path.file_name().unwrap_or_default());
        let mut names = fs::read_dir(parent).at("list")?.flatten().map(|entry| entry.file_name());
        let found = names.any(|found| found.eq_ignore_ascii_case(name));
        if found { Ok(format!("{} is listed", path.display())) } else { Err(Blocked::Absent("not listed".into())) }
    }))
}

/// Reads what the host has linked to a file of Bulkhead's own.
fn own_hard_links(places: &Places) -> Outcome {
    any(["hard-settings", "hard-disk"].map(|name| {
        let path = places.planted(name);
        File::open(&path).at(name).map(|_| format!("{} is there", path.display()))
    }))
}

fn own_links(places: &Places) -> Outcome {
    let leads = |link: &Path| fs::read_dir(link).at("list").map(|_| format!("{} leads there", link.display()));
    let made = places.own.iter().enumerate().flat_map(|(number, own)| {
        let targets = [places.share.join(own), Path::new("..").join(own)];
        targets.into_iter().enumerate().map(move |(at, target)| {
            let link = places.work(&format!("own-{number}-{at}"));
            let _ = fs::remove_file(&link);
            symlink(target, &link).at("symlink")?;
            leads(&link)
        })
    });
    any(made.chain([leads(&places.planted("own"))]))
}

fn own_moved(places: &Places) -> Outcome {
    let (aside, mine) = (places.work("aside"), places.work("empty"));
    any(places.own.iter().map(|own| {
        let _ = fs::create_dir_all(&mine);
        let path = places.share.join(own);
        let parent = path.parent().unwrap_or(&path);
        let name = own.file_name().unwrap_or_default();
        let reached = |parent: &Path| {
            fs::read_dir(parent.join(name)).at("list").map(|_| format!("{} is there", parent.display()))
        };
        let moved = rename(parent, &aside, 0).at("rename").and_then(|()| {
            let found = reached(&aside);
            let _ = rename(&aside, parent, 0);
            found.map_err(|_| Blocked::Refused("moved, and not in it".into()))
        });
        let exchanged = rename(parent, &mine, libc::RENAME_EXCHANGE).at("exchange").map(|()| {
            let _ = rename(parent, &mine, libc::RENAME_EXCHANGE);
            format!("{} was exchanged", parent.display())
        });
        let renamed = rename(&path, &aside, 0).at("rename").map(|()| {
            let _ = rename(&aside, &path, 0);
            format!("{} was renamed", path.display())
        });
        any([moved, exchanged, renamed])
    }))
}

fn own_replaced(places: &Places) -> Outcome {
    any(places.own.iter().map(|own| {
        let (path, mine) = (places.share.join(own), places.work("replacement"));
        let _ = fs::create_dir_all(&mine);
        let text = path.display().to_string();
        let put = |done: io::Result<()>| done.at("replace").map(|()| format!("{text} is the container's"));
        let exchanged = put(rename(&mine, &path, libc::RENAME_EXCHANGE));
        if exchanged.is_ok() {
            let _ = rename(&mine, &path, libc::RENAME_EXCHANGE);
            return exchanged;
        }
        any([
            exchanged,
            put(fs::create_dir(&path)),
            put(symlink(&mine, &path)),
            put(File::create_new(&path).map(drop)),
            put(rename(&mine, &path, 0)),
        ])
    }))
}

/// Runs `change` over and over in a child while `look` is tried; returns the first success.
fn race(change: impl Fn(), look: impl Fn() -> Outcome) -> Outcome {
    // SAFETY: this process has one thread, so the child may go on as it is.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error()).at("fork");
    }
    let until = Instant::now() + RACE;
    if child == 0 {
        while Instant::now() < until {
            change();
        }
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    let (mut tries, mut last) = (0, Err(Blocked::Absent("nothing was tried".into())));
    while Instant::now() < until && last.is_err() {
        last = look();
        tries += 1;
    }
    wait(child);
    last.map_err(|blocked| Blocked::Refused(format!("{tries} tries, the last: {blocked}")))
}

/// Reads and makes a file by a path whose directory is a link by turns.
fn reach(turn: &Path, mark: &str) -> Outcome {
    let made = turn.join("deep").join(mark);
    let _ = File::create(&made);
    let _ = fs::remove_file(turn.join("deep").join("kept"));
    any([judge_path(&turn.join("deep/secret")), judge_path(&turn.join("deep/link/secret"))])
}

fn race_of_links(places: &Places) -> Outcome {
    let (turn, link) = (places.work("turn"), places.work("turn-link"));
    fs::create_dir_all(turn.join("deep")).at("mkdir")?;
    fs::write(turn.join("deep/secret"), "public").at("write")?;
    let _ = fs::remove_file(&link);
    symlink(&places.outside, &link).at("symlink")?;
    race(|| drop(rename(&turn, &link, libc::RENAME_EXCHANGE)), || reach(&turn, "mark-race"))
}

/// The host does the renames meanwhile.
fn race_with_host(places: &Places) -> Outcome {
    race(|| std::thread::sleep(Duration::from_millis(50)), || reach(&places.planted("turn"), "mark-host-race"))
}

fn race_of_bind(places: &Places) -> Outcome {
    let (inside, away) = (places.planted("bind/way"), places.work("way"));
    fs::create_dir_all(inside.join("in")).at("mkdir")?;
    let other = places.other.strip_prefix("/").unwrap_or(&places.other).join("secret");
    let path = places.bind.join("way/in").join("../".repeat(MAX_CLIMB)).join(other);
    race(
        || {
            let _ = rename(&inside, &away, 0);
            let _ = rename(&away, &inside, 0);
        },
        || judge_path(&path),
    )
}
