//! Performs a request in the caller's place: in its namespaces, root and working directory, with its ids and
//! capabilities, so that the kernel allows exactly what it would have allowed the caller.
//!
//! The order of steps matters. The container's files and everything of the caller are opened first, as root of the VM;
//! then the worker enters the caller's namespaces, gives its privileges up, and resolves the caller's paths. No path of
//! a container is ever resolved with more rights than the container has.
//!
//! A failure before anything was changed is reported as no result at all, and the call continues in the kernel.

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
    syscall::{Kind, MountRequest},
    worker,
};
use crate::files::NODES;

/// Maximum length of a file in `/proc/TID` that is read, in bytes.
const MAX_PROC_FILE: u64 = 4 << 20;

/// A node's path below its file system, and a mount of its file that is attached nowhere yet.
type NodeMount = (&'static str, OwnedFd);

/// The caller, with everything opened that its namespaces would hide.
struct Caller {
    /// Its directory in `/proc`, which stays that of this thread.
    directory: OwnedFd,
    root: OwnedFd,
    working_directory: OwnedFd,
    /// The descriptor at which a target below `/proc/self` starts, and the rest of that path.
    start: Option<(OwnedFd, Vec<u8>)>,
    mounts: OwnedFd,
    user: OwnedFd,
    cgroup: Option<OwnedFd>,
}

impl Caller {
    fn open(directory: OwnedFd, request: &MountRequest) -> io::Result<Self> {
        // O_PATH: opening a directory or a device of the container for real could block or have effects.
        let open = |name: &str, flags: OFlags| {
            rustix::fs::openat(&directory, name, flags | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from)
        };
        let (MountRequest::Mount { target, .. }
        | MountRequest::Bind { target, .. }
        | MountRequest::Unmount { target, .. }) = request;
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

    /// The text of a file in the caller's directory of procfs.
    fn text(&self, name: &str) -> io::Result<Vec<u8>> {
        read(&self.directory, name)
    }

    /// Returns whether a namespace belongs to the caller's user namespace.
    fn owns(&self, namespace: &OwnedFd) -> io::Result<bool> {
        Ok(Identity::of(namespace::owner(namespace.as_fd())?)? == Identity::of(&self.user)?)
    }

    /// Enters the caller's namespaces, root and working directory, and takes its privileges.
    fn enter(&self) -> io::Result<()> {
        let is_other = Identity::of(File::open("/proc/self/ns/user")?)? != Identity::of(&self.user)?;
        // While still privileged: a mount namespace is entered with CAP_SYS_ADMIN over it and CAP_SYS_CHROOT here. It
        // resets root and working directory, which are set to the caller's next.
        rustix::thread::move_into_link_name_space(self.mounts.as_fd(), Some(LinkNameSpaceType::Mount))?;
        fchdir(&self.root)?;
        chroot(".")?;
        fchdir(&self.working_directory)?;
        // setns(2) refuses the user namespace that the process is in already.
        if is_other {
            rustix::thread::move_into_link_name_space(self.user.as_fd(), Some(LinkNameSpaceType::User))?;
        }
        // Read after that: procfs translates ids into the user namespace of the reader, and they are set in there.
        let status = Status::read(&self.text("status")?).ok_or(io::ErrorKind::InvalidData)?;
        become_like(&status)
    }

    /// Opens a path of the caller without following magic links, which would lead to this process' own descriptors.
    fn find(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_MAGICLINKS;
        Ok(match &self.start {
            // `/proc/self/fd/7` names exactly what the caller has open, even if no path leads there.
            Some((start, rest)) if rest.is_empty() => start.try_clone()?,
            Some((start, rest)) => rustix::fs::openat2(start, rest.as_slice(), flags, Mode::empty(), resolve)?,
            None => rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve)?,
        })
    }
}

fn read(directory: impl AsFd, name: &str) -> io::Result<Vec<u8>> {
    let file = rustix::fs::openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    bounded::read(File::from(file), MAX_PROC_FILE)
}

/// The caller's cgroup. A process that starts in it has the kernel memory of its mounts charged to the container.
fn cgroup(directory: &OwnedFd) -> Option<OwnedFd> {
    let text = String::from_utf8(read(directory, "cgroup").ok()?).ok()?;
    let path = registry::cgroup_path(text.lines().find_map(|line| line.strip_prefix("0::"))?)?;
    let path = Path::new(crate::cgroup::CGROUPS).join(path);
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Takes the caller's ids and capabilities, and no others.
fn become_like(status: &Status) -> io::Result<()> {
    // Without this, changing ids from or to 0 drops or adds capabilities.
    rustix::thread::set_capabilities_secure_bits(CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
    let (user, group) = (Uid::from_raw(status.user), Gid::from_raw(status.group));
    let groups: Vec<_> = status.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    // A user namespace may deny setgroups(2). The worker then stays without supplementary groups, which is less.
    let _ = rustix::thread::set_thread_groups(&groups);
    rustix::thread::set_thread_res_gid(group, group, group)?;
    rustix::thread::set_thread_res_uid(user, user, user)?;
    // Last, since changing ids needs CAP_SETUID and CAP_SETGID. Effective and permitted are the caller's effective set;
    // a capability that it has dropped for now is not taken up here.
    let own = CapabilitySet::from_bits_retain(status.effective);
    let sets = CapabilitySets { effective: own, permitted: own, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets)?;
    // A change of credentials clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into)
}

/// The worker's program. The result is reported by its child; an error here means that there is none.
pub(crate) fn main(directory: i32, slot: u64, state: &Path) -> io::Result<()> {
    // Once in the container's namespaces, the worker can be found in its /proc. Not dumpable, it can be neither traced
    // nor read there, and its program and descriptors, which lead to the VM, cannot be opened.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let directory = notify::adopt(directory).ok_or(io::ErrorKind::InvalidInput)?;
    let request = worker::read_request()?;
    let caller = Caller::open(directory, &request)?;
    let (network, processes) = (caller.namespace("ns/net")?, caller.namespace("ns/pid")?);
    let slot = state.join("fs").join(slot.to_string());
    rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    // A procfs shows the pid namespace of the process that makes it, a sysfs the devices of its network namespace.
    // setns(2) puts only children into a pid namespace, hence the fork in `attempt`.
    rustix::thread::move_into_link_name_space(processes.as_fd(), Some(LinkNameSpaceType::ProcessID))?;
    // EPERM may be the container's own files' fault (`MountedBy::Service`). Only if the caller owns all that the file
    // system shows, and nothing but these files is on the existing one, the refusal protects nothing.
    if attempt(&request, &caller, &slot, MountedBy::Caller)? == TOO_REVEALING
        && let MountRequest::Mount { kind, .. } = request
    {
        let shown = match kind {
            Kind::Proc => &processes,
            Kind::Sys => &network,
        };
        if caller.owns(shown)? && caller.owns(&caller.mounts)? && mountinfo::shows_all(&caller.text("mountinfo")?, kind)
        {
            attempt(&request, &caller, &slot, MountedBy::Service)?;
        }
    }
    Ok(())
}

/// Exit status of a child to which the kernel refused a mount with `EPERM`.
const TOO_REVEALING: i32 = 2;

/// The credentials with which a file system is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MountedBy {
    /// The caller's, which the kernel judges.
    Caller,
    /// Root's of the VM. The kernel denies a user namespace a new procfs if something hides a part of the one that it
    /// has (`mount_too_revealing`), and it takes the container's own files for such a mask.
    Service,
}

/// Performs the request in a child, and returns its exit status.
fn attempt(request: &MountRequest, caller: &Caller, slot: &Path, mounted_by: MountedBy) -> io::Result<i32> {
    let child = match sys::fork(caller.cgroup.as_ref().map(AsFd::as_fd)) {
        Ok(child) => child,
        // A threaded cgroup takes threads only; the mount is charged to the VM then.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => sys::fork(None)?,
        Err(error) => return Err(error),
    };
    if child == 0 {
        let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
        // The child is single-threaded, so it may allocate and run any code.
        let done = perform(request, caller, slot, mounted_by);
        if let Ok(errno) = &done {
            worker::report(*errno);
        }
        let refused = done.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EPERM));
        sys::leave(if refused { TOO_REVEALING } else { i32::from(done.is_err()) });
    }
    let child = rustix::process::Pid::from_raw(child).ok_or(io::ErrorKind::InvalidData)?;
    let ended = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty())?;
    Ok(ended.and_then(|(_, status)| status.exit_status()).unwrap_or(1))
}

/// Returns whether the source of a bind may be a whole procfs or sysfs. A guess, by a judge and before a worker is
/// started: most binds are of something else. Waits for the container's own file systems.
pub(super) fn may_be_whole(directory: &OwnedFd, source: &[u8]) -> bool {
    // Resolved with root's rights but confined to the caller's root, and only to ask for the file system type.
    // `BENEATH` is stricter than the kernel for relative paths with `..`: such a bind continues in the kernel.
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

/// Performs the request. Returns 0 or the error number for the caller, or an error if the call is to continue in the
/// kernel.
fn perform(request: &MountRequest, caller: &Caller, slot: &Path, mounted_by: MountedBy) -> io::Result<i32> {
    match request {
        MountRequest::Mount { kind, source, target, flags, options } => {
            let attributes = attributes(*flags);
            let files = files(*kind, slot, attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY));
            // The container is gone from the registry, or was never in it.
            if files.is_empty() {
                return Err(io::ErrorKind::NotFound.into());
            }
            let is_read_only = attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY);
            let make = || -> io::Result<OwnedFd> {
                let context = configure(*kind, source.as_deref(), options, is_read_only)?;
                Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
            };
            // The service makes it before it enters the user namespace. As the caller the paths come first: mount(2)
            // has the error of the path before that of the options.
            let made = if mounted_by == MountedBy::Service { Some(make()?) } else { None };
            caller.enter()?;
            let target = caller.find(target, OFlags::empty())?;
            let mount = made.map_or_else(make, Ok)?;
            refuse_same(&target, &mount)?;
            // From here on the file system is visible, so there is no way back: files that cannot be mounted are left
            // out.
            attach(mount.as_fd(), "", target.as_fd(), "")?;
            mount_nodes(files, mount.as_fd());
            Ok(0)
        }
        MountRequest::Bind { source, target } => {
            let all = [Kind::Proc, Kind::Sys].map(|kind| files(kind, slot, false));
            caller.enter()?;
            bind(caller, source, target, all)?;
            Ok(0)
        }
        MountRequest::Unmount { target, flags } => {
            let all = [Kind::Proc, Kind::Sys].map(|kind| files(kind, slot, false));
            caller.enter()?;
            // The caller's own descriptor keeps such a target busy, so the kernel refuses it in any case.
            if caller.start.is_some() {
                return Err(io::ErrorKind::ResourceBusy.into());
            }
            unmount_with_nodes(caller, target, *flags, all)
        }
    }
}

/// The container's files for a file system, each cloned into a detached mount of its own.
fn files(kind: Kind, slot: &Path, read_only: bool) -> Vec<NodeMount> {
    // NODIRATIME marks the mounts that this module makes, see `mountinfo`.
    let set = libc::MOUNT_ATTR_NODIRATIME | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 };
    let open = |path: PathBuf| {
        let file = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC).ok()?;
        sys::add_mount_attributes(file.as_fd(), set).ok()?;
        Some(file)
    };
    // A file that the kernel of this VM lacks has no place to be mounted on.
    let nodes = NODES.iter().filter(|node| node.path.starts_with(kind.prefix()) && node.exists());
    nodes.filter_map(|node| Some((&node.path[kind.prefix().len()..], open(slot.join(node.file_name()))?))).collect()
}

/// Makes a file system as mount(2) would with these arguments.
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

/// Translates mount(2)'s flags to attributes of fsmount(2).
fn attributes(flags: u64) -> MountAttrFlags {
    let has = |flag: libc::c_ulong| flags & flag != 0;
    let mut attributes = MountAttrFlags::empty();
    attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, has(libc::MS_RDONLY));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSUID, has(libc::MS_NOSUID));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODEV, has(libc::MS_NODEV));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOEXEC, has(libc::MS_NOEXEC));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NODIRATIME, has(libc::MS_NODIRATIME));
    attributes.set(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW, has(libc::MS_NOSYMFOLLOW));
    // A field and not flags; its zero is RELATIME, which is the default of mount(2) as well.
    if has(libc::MS_STRICTATIME) {
        attributes |= MountAttrFlags::MOUNT_ATTR_STRICTATIME;
    } else if has(libc::MS_NOATIME) {
        attributes |= MountAttrFlags::MOUNT_ATTR_NOATIME;
    }
    attributes
}

/// Fails where move_mount(2) has another result than mount(2): for the root of the same file system as target, and for
/// one that is not a directory.
fn refuse_same(target: &OwnedFd, mount: &OwnedFd) -> io::Result<()> {
    let stat = |of: &OwnedFd| rustix::fs::statx(of, "", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS);
    let (target, mount) = (stat(target)?, stat(mount)?);
    let same = (target.stx_dev_major, target.stx_dev_minor) == (mount.stx_dev_major, mount.stx_dev_minor);
    let is_directory = u32::from(target.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
    if !is_directory || (same && target.stx_attributes.contains(StatxAttributes::MOUNT_ROOT)) {
        // Only makes the call continue in the kernel, which finds the right error number.
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    Ok(())
}

fn attach(from: BorrowedFd<'_>, from_path: &str, to: BorrowedFd<'_>, to_path: &str) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(from, from_path, to, to_path, flags)
}

/// Mounts the files on those of a new file system. With `subset=pid` a procfs has none of them, and that is not an
/// error.
fn mount_nodes(files: Vec<NodeMount>, mount: BorrowedFd<'_>) {
    for (name, file) in files {
        let _ = attach(file.as_fd(), "", mount, name);
    }
}

/// Binds a whole procfs or sysfs, and mounts the files on the new place: a bind without `MS_REC` leaves mounts behind.
fn bind(caller: &Caller, source: &[u8], target: &[u8], [of_proc, of_sys]: [Vec<NodeMount>; 2]) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let source = rustix::fs::openat2(CWD, source, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)?;
    let stat = rustix::fs::statx(&source, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    // Both must hold: the mount shows its file system from the top, and the source is the root of that mount. A
    // directory inside has the same mount id.
    let whole = mountinfo::whole(&caller.text("mountinfo")?, stat.stx_mnt_id);
    let kind = whole.filter(|_| stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT));
    let files = match kind.ok_or(io::ErrorKind::InvalidInput)? {
        Kind::Proc => of_proc,
        Kind::Sys => of_sys,
    };
    let target = caller.find(target, OFlags::DIRECTORY)?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(&source, "", flags)?;
    // The files are mounts of their own and would stay writable on a read-only procfs.
    if rustix::fs::fstatvfs(&source)?.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        for (_, file) in &files {
            sys::add_mount_attributes(file.as_fd(), libc::MOUNT_ATTR_RDONLY)?;
        }
    }
    attach(mount.as_fd(), "", target.as_fd(), "")?;
    mount_nodes(files, mount.as_fd());
    Ok(())
}

/// Unmounts a procfs or sysfs together with the files that this module has put on it, if nothing else is on it.
fn unmount_with_nodes(
    caller: &Caller,
    target: &[u8],
    flags: u64,
    [of_proc, of_sys]: [Vec<NodeMount>; 2],
) -> io::Result<i32> {
    let no_follow = flags & u64::from(libc::UMOUNT_NOFOLLOW.unsigned_abs()) != 0;
    let look = || caller.find(target, if no_follow { OFlags::NOFOLLOW } else { OFlags::empty() });
    let found = look()?;
    let stat = rustix::fs::statx(&found, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    let is_root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    if !is_root || !mountinfo::has_only_ours(&caller.text("mountinfo")?, stat.stx_mnt_id) {
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    // Nodes are unmounted by paths relative to what was found, a procfs or sysfs with nothing else on it: no path of
    // the container's is resolved a second time.
    fchdir(&found)?;
    // Paths of the other file system do not exist here, and mounts that a less privileged user namespace inherited are
    // locked. Those that were unmounted are remembered.
    let taken = |(name, _): &NodeMount| unmount(*name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok();
    let taken: Vec<NodeMount> = of_proc.into_iter().chain(of_sys).filter(taken).collect();
    // This process must not be the one that keeps it busy.
    fchdir(&caller.working_directory)?;
    drop(found);
    let flags = UnmountFlags::from_bits_retain(flags as u32);
    let Err(error) = unmount(target, flags) else { return Ok(0) };
    // Still in use by the container: put the files back and return the kernel's error.
    mount_nodes(taken, look()?.as_fd());
    Ok(error.raw_os_error())
}
