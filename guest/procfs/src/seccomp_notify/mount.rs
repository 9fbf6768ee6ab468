//! Carries an order out where the caller is: in its namespaces, root and working directory, with its ids and its
//! capabilities, so that the kernel allows what it would have allowed the caller.
//!
//! Whatever goes wrong before something was changed ends in no answer, and the kernel goes on with the call.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_guest_common::{
    bounded,
    namespace::{self, Identity},
    notify,
    process::Status,
    registry,
};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
    },
    process::{DumpableBehavior, Gid, Signal, Uid, chroot, fchdir},
    thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets, LinkNameSpaceType},
};

use super::{
    mountinfo,
    path::Start,
    sys,
    syscall::{Kind, Order},
    worker,
};
use crate::files::NODES;

/// Longest text of procfs that is read, in bytes.
const MAX_TEXT: u64 = 4 << 20;

/// A file of the warden, not mounted yet, and its place in the file system.
type Own = (&'static str, OwnedFd);

/// What is opened of the caller before anything is entered.
struct Caller {
    /// Its directory in `/proc`; it names this thread and never a later one.
    directory: OwnedFd,
    root: OwnedFd,
    working_directory: OwnedFd,
    /// What the target begins at, if not at one of these.
    start: Option<(OwnedFd, Vec<u8>)>,
    mounts: OwnedFd,
    user: OwnedFd,
    cgroup: Option<OwnedFd>,
}

impl Caller {
    fn open(directory: OwnedFd, order: &Order) -> io::Result<Self> {
        let open = |name: &str, flags: OFlags| {
            rustix::fs::openat(&directory, name, flags | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from)
        };
        let (Order::Mount { target, .. } | Order::Bind { target, .. } | Order::Unmount { target, .. }) = order;
        let start = match Start::of(target) {
            Start::Link(name, rest) => Some((open(&name, OFlags::PATH)?, rest)),
            Start::Path => None,
        };
        let root = open("root", OFlags::PATH | OFlags::DIRECTORY)?;
        let working_directory = open("cwd", OFlags::PATH | OFlags::DIRECTORY)?;
        let (mounts, user) = (open("ns/mnt", OFlags::RDONLY)?, open("ns/user", OFlags::RDONLY)?);
        let cgroup = cgroup(&directory);
        Ok(Self { directory, root, working_directory, start, mounts, user, cgroup })
    }

    fn namespace(&self, name: &str) -> io::Result<OwnedFd> {
        rustix::fs::openat(&self.directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(Into::into)
    }

    /// A file about the caller, as far as it is read.
    fn text(&self, name: &str) -> io::Result<Vec<u8>> {
        read(&self.directory, name)
    }

    /// Whether a namespace belongs to the caller's user namespace.
    fn owns(&self, namespace: &OwnedFd) -> io::Result<bool> {
        Ok(Identity::of(namespace::owner(namespace.as_fd())?)? == Identity::of(&self.user)?)
    }

    /// Goes where the caller is.
    fn enter(&self) -> io::Result<()> {
        let is_other = Identity::of(File::open("/proc/self/ns/user")?)? != Identity::of(&self.user)?;
        rustix::thread::move_into_link_name_space(self.mounts.as_fd(), Some(LinkNameSpaceType::Mount))?;
        fchdir(&self.root)?;
        chroot(".")?;
        fchdir(&self.working_directory)?;
        // The one that this process is in already can't be entered.
        if is_other {
            rustix::thread::move_into_link_name_space(self.user.as_fd(), Some(LinkNameSpaceType::User))?;
        }
        // Read here, so that the ids are as this user namespace numbers them.
        let status = Status::read(&self.text("status")?).ok_or(io::ErrorKind::InvalidData)?;
        become_like(&status)
    }

    /// What a path of the caller's means, without following links that mean something else to each process.
    fn find(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_MAGICLINKS;
        Ok(match &self.start {
            Some((start, rest)) if rest.is_empty() => start.try_clone()?,
            Some((start, rest)) => rustix::fs::openat2(start, rest.as_slice(), flags, Mode::empty(), resolve)?,
            None => rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)?,
        })
    }
}

fn read(directory: impl AsFd, name: &str) -> io::Result<Vec<u8>> {
    let file = rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    bounded::read(File::from(file), MAX_TEXT)
}

/// The caller's cgroup: what the mounts cost in memory is the container's.
fn cgroup(directory: &OwnedFd) -> Option<OwnedFd> {
    let text = String::from_utf8(read(directory, "cgroup").ok()?).ok()?;
    let path = registry::cgroup_path(text.lines().find_map(|line| line.strip_prefix("0::"))?)?;
    let path = Path::new(crate::generated::CGROUPS).join(path);
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Takes the caller's ids and capabilities, no more.
fn become_like(status: &Status) -> io::Result<()> {
    // Else a change of ids would drop capabilities, or a later one give some.
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    let (user, group) = (Uid::from_raw(status.user), Gid::from_raw(status.group));
    let groups: Vec<_> = status.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    // A user namespace may forbid this, and then the groups are those of this process, which has none.
    let _ = rustix::thread::set_thread_groups(&groups);
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    let own = CapabilitySet::from_bits_retain(status.effective);
    let sets = CapabilitySets { effective: own, permitted: own, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    // A change of ids takes this away.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)
}

/// The program, as the warden starts it.
pub(crate) fn main(directory: i32, slot: u64, state: &Path) -> io::Result<()> {
    // Nobody in the container may look into this process or at its program, whatever they are allowed there.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let directory = notify::adopt(directory).ok_or(io::ErrorKind::InvalidInput)?;
    let order = worker::read_order()?;
    let caller = Caller::open(directory, &order)?;
    let (network, processes) = (caller.namespace("ns/net")?, caller.namespace("ns/pid")?);
    let slot = state.join("fs").join(slot.to_string());
    rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    // A procfs shows the processes of the namespace that its maker is in, which only a child is.
    rustix::thread::move_into_link_name_space(processes.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    if attempt(&order, &caller, &slot, Maker::Caller)? == TOO_REVEALING
        && let Order::Mount { kind, .. } = order
    {
        let shown = match kind {
            Kind::Proc => &processes,
            Kind::Sys => &network,
        };
        if caller.owns(shown)? && caller.owns(&caller.mounts)? && mountinfo::shows_all(&caller.text("mountinfo")?, kind)
        {
            attempt(&order, &caller, &slot, Maker::Warden)?;
        }
    }
    Ok(())
}

/// The status of a child to which the kernel refused a mount.
const TOO_REVEALING: i32 = 2;

/// Who makes the file system, as the kernel sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maker {
    /// The caller, which the kernel judges.
    Caller,
    /// The warden, in the place of a caller that is refused because of the warden's own files: it may see all that the
    /// file system shows, but the kernel takes what is mounted on the one that it has for a mask.
    Warden,
}

/// Carries the order out in a child, and returns its status.
fn attempt(order: &Order, caller: &Caller, slot: &Path, maker: Maker) -> io::Result<i32> {
    let child = match sys::fork(caller.cgroup.as_ref().map(AsFd::as_fd)) {
        Ok(child) => child,
        // A threaded cgroup takes no processes of others.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => sys::fork(None)?,
        Err(error) => return Err(error),
    };
    if child == 0 {
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        let done = carry_out(order, caller, slot, maker);
        if let Ok(errno) = &done {
            worker::tell(*errno);
        }
        let refused = done.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM));
        sys::leave(if refused { TOO_REVEALING } else { i32::from(done.is_err()) });
    }
    let child = rustix::process::Pid::from_raw(child).ok_or(io::ErrorKind::InvalidData)?;
    let ended = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty())?;
    Ok(ended.and_then(|(_, status)| status.exit_status()).unwrap_or(1))
}

/// Whether what a caller binds may be the whole of a procfs or sysfs. A guess, which saves a process for all others.
pub(super) fn may_be_whole(directory: &OwnedFd, source: &[u8]) -> bool {
    let (from, resolve) = if source.starts_with(b"/") {
        ("root", ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    } else {
        ("cwd", ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let look = || {
        let from = rustix::fs::openat(directory, from, flags, Mode::empty())?;
        rustix::fs::fstatfs(rustix::fs::openat2(from, source, flags, Mode::empty(), resolve)?)
    };
    look().is_ok_and(|stat| stat.f_type == libc::PROC_SUPER_MAGIC || stat.f_type == libc::SYSFS_MAGIC)
}

/// Carries it out; returns what the call is to return, or an error when the kernel shall do it.
fn carry_out(order: &Order, caller: &Caller, slot: &Path, maker: Maker) -> io::Result<i32> {
    match order {
        Order::Mount { kind, source, target, flags, options } => {
            let attributes = attributes(*flags);
            let files = files(*kind, slot, attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY));
            if files.is_empty() {
                return Err(io::ErrorKind::NotFound.into());
            }
            let is_read_only = attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY);
            let make = || -> io::Result<OwnedFd> {
                let context = configure(*kind, source.as_deref(), options, is_read_only)?;
                Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
            };
            let made = if maker == Maker::Warden { Some(make()?) } else { None };
            caller.enter()?;
            let target = caller.find(target, OFlags::empty())?;
            let mount = made.map_or_else(make, Ok)?;
            refuse_same(&target, &mount)?;
            attach(mount.as_fd(), "", target.as_fd(), "")?;
            put(files, mount.as_fd());
            Ok(0)
        }
        Order::Bind { source, target } => {
            let all = [Kind::Proc, Kind::Sys].map(|kind| files(kind, slot, false));
            caller.enter()?;
            bind(caller, source, target, all)?;
            Ok(0)
        }
        Order::Unmount { target, flags } => {
            let all = [Kind::Proc, Kind::Sys].map(|kind| files(kind, slot, false));
            caller.enter()?;
            // What is reached through a descriptor is in use by it.
            if caller.start.is_some() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            undo(caller, target, *flags, all)
        }
    }
}

/// The files that belong into a file system, each in a mount of its own.
fn files(kind: Kind, slot: &Path, read_only: bool) -> Vec<Own> {
    let set = libc::MOUNT_ATTR_NODIRATIME | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let open = |path: PathBuf| {
        let file = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).ok()?;
        sys::add_mount_attributes(file.as_fd(), set).ok()?;
        Some(file)
    };
    let nodes = NODES.iter().filter(|node| node.path.starts_with(kind.prefix()) && node.exists());
    nodes.filter_map(|node| Some((&node.path[kind.prefix().len()..], open(slot.join(node.file_name()))?))).collect()
}

/// Makes the file system as mount(2) would with these arguments.
fn configure(kind: Kind, source: Option<&[u8]>, options: &[u8], read_only: bool) -> io::Result<OwnedFd> {
    let context = fsopen(kind.name(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    if let Some(source) = source {
        fsconfig_set_string(&context, "source", source)?;
    }
    if read_only {
        fsconfig_set_flag(&context, "ro")?;
    }
    for option in options.split(|byte| *byte == b',').filter(|option| !option.is_empty()) {
        match option.iter().position(|byte| *byte == b'=') {
            Some(at) => fsconfig_set_string(&context, &option[..at], &option[at + 1..])?,
            None => fsconfig_set_flag(&context, option)?,
        }
    }
    fsconfig_create(&context)?;
    Ok(context)
}

/// The attributes that mount(2)'s flags stand for.
fn attributes(flags: u64) -> MountAttrFlags {
    let has = |flag: libc::c_ulong| flags & flag != 0;
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, has(libc::MS_RDONLY));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, has(libc::MS_NOSUID));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, has(libc::MS_NODEV));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, has(libc::MS_NOEXEC));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODIRATIME, has(libc::MS_NODIRATIME));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW, has(libc::MS_NOSYMFOLLOW));
    // One of three; without any it is by modification.
    if has(libc::MS_STRICTATIME) {
        attributes |= MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    } else if has(libc::MS_NOATIME) {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOATIME;
    }
    attributes
}

/// mount(2) refuses the same file system once more on itself, and what is no directory.
fn refuse_same(target: &OwnedFd, mount: &OwnedFd) -> io::Result<()> {
    let stat = |of: &OwnedFd| rustix::fs::statx(of, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
    let (target, mount) = (stat(target)?, stat(mount)?);
    let same = (target.stx_dev_major, target.stx_dev_minor) == (mount.stx_dev_major, mount.stx_dev_minor);
    let is_directory = u32::from(target.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
    if !is_directory || (same && target.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    Ok(())
}

fn attach(from: BorrowedFd<'_>, from_path: &str, to: BorrowedFd<'_>, to_path: &str) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(from, from_path, to, to_path, flags)
}

/// Mounts the files on theirs, where there are such: the options of a procfs decide.
fn put(files: Vec<Own>, mount: BorrowedFd<'_>) {
    for (name, file) in files {
        let _ = attach(file.as_fd(), "", mount, name);
    }
}

/// Binds the whole of a procfs or sysfs, and its files once more.
fn bind(caller: &Caller, source: &[u8], target: &[u8], [of_proc, of_sys]: [Vec<Own>; 2]) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let source = rustix::fs::openat2(CWD, source, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)?;
    let stat = rustix::fs::statx(&source, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    let whole = mountinfo::whole(&caller.text("mountinfo")?, stat.stx_mnt_id);
    let kind = whole.filter(|_| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    let files = match kind.ok_or(io::ErrorKind::InvalidInput)? {
        Kind::Proc => of_proc,
        Kind::Sys => of_sys,
    };
    let target = caller.find(target, OFlags::DIRECTORY)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&source, "", flags)?;
    if rustix::fs::fstatvfs(&source)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        for (_, file) in &files {
            sys::add_mount_attributes(file.as_fd(), libc::MOUNT_ATTR_RDONLY)?;
        }
    }
    attach(mount.as_fd(), "", target.as_fd(), "")?;
    put(files, mount.as_fd());
    Ok(())
}

/// Unmounts something together with the warden's files, if these are all that is on it.
fn undo(caller: &Caller, target: &[u8], flags: u64, [of_proc, of_sys]: [Vec<Own>; 2]) -> io::Result<i32> {
    let no_follow = flags & u64::from(libc::UMOUNT_NOFOLLOW.unsigned_abs()) != 0;
    let look = || caller.find(target, if no_follow { OFlags::NOFOLLOW } else { OFlags::empty() });
    let found = look()?;
    let stat = rustix::fs::statx(&found, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    let is_root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    if !is_root || !mountinfo::has_only_ours(&caller.text("mountinfo")?, stat.stx_mnt_id) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    fchdir(&found)?;
    // Some are of the other file system, are not there, or may not be taken away by a user namespace inside.
    let taken = |(name, _): &Own| unmount(*name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok();
    let taken: Vec<Own> = of_proc.into_iter().chain(of_sys).filter(taken).collect();
    // This process must not be who keeps it busy.
    fchdir(&caller.working_directory)?;
    drop(found);
    let flags = UnmountFlags::from_bits_retain(flags as u32);
    let Err(error) = unmount(target, flags) else { return Ok(0) };
    // Still in use: it stays as it was.
    put(taken, look()?.as_fd());
    Ok(error.raw_os_error())
}
