//! System calls without a safe wrapper; the only unsafe code of this program.
//!
//! rustix has no per-thread `setfsuid` and no `clone`, so these go through libc.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::process::CommandExt,
    process::Command,
};

use bulkhead_guest_common::mount;
use rustix::{
    process::Signal,
    thread::{CapabilitySets, UnshareFlags},
};

/// Id-maps a mount that is not attached anywhere yet (`mount_setattr` with `MOUNT_ATTR_IDMAP`).
///
/// With `recursive`, every mount of the detached tree is mapped, or none.
pub(crate) fn idmap_mount(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    let attributes = libc::mount_attr { userns_fd: userns.as_raw_fd() as u64, ..attributes(libc::MOUNT_ATTR_IDMAP) };
    mount::set_attributes(mount, attributes, recursive)
}

/// The restrictions of a bind mount besides `nodev`, which every bind mount has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restrictions {
    pub(crate) read_only: bool,
    pub(crate) no_exec: bool,
    pub(crate) no_suid: bool,
}

/// Adds `nodev` and `restrictions` to the top mount of a tree, or to all of its mounts, and takes it out of the
/// propagation of mounts.
pub(crate) fn restrict_mount(mount: BorrowedFd<'_>, restrictions: Restrictions, recursive: bool) -> io::Result<()> {
    let Restrictions { read_only, no_exec, no_suid } = restrictions;
    let flag = |on: bool, flag: u64| if on { flag } else { 0 };
    let set = libc::MOUNT_ATTR_NODEV
        | flag(read_only, libc::MOUNT_ATTR_RDONLY)
        | flag(no_exec, libc::MOUNT_ATTR_NOEXEC)
        | flag(no_suid, libc::MOUNT_ATTR_NOSUID);
    // Private: what the VM mounts below the source later was not judged, and must not appear in the container.
    mount::set_attributes(mount, libc::mount_attr { propagation: libc::MS_PRIVATE, ..attributes(set) }, recursive)
}

/// Makes a mount read-only and keeps its other attributes.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    mount::set_attributes(mount, attributes(libc::MOUNT_ATTR_RDONLY), false)
}

/// Attributes to set. A restriction is never cleared, so a source that is read-only in the VM stays read-only in the
/// container, except the one that keeps the engine from following the links of containers, which follow their own.
fn attributes(set: u64) -> libc::mount_attr {
    libc::mount_attr { attr_set: set, attr_clr: libc::MOUNT_ATTR_NOSYMFOLLOW, propagation: 0, userns_fd: 0 }
}

/// Moves this process into a new mount namespace, a copy of the VM's.
pub(crate) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: NEWNS unshares no memory and no descriptor table; the process has a single thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(Into::into)
}

/// Has the kernel kill the command when this process is killed.
pub(crate) fn end_with_parent(command: &mut Command) {
    let signal = || rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Into::into);
    // SAFETY: between fork and exec there is one system call, no allocation and no lock.
    unsafe { command.pre_exec(signal) };
}

/// Runs `action` with fsuid and fsgid `id` and every capability kept, then goes back to id 0.
///
/// New files on an id-mapped mount need this: the VM's uid 0 is not in the map, so the kernel would refuse to create
/// them (`EOVERFLOW`).
pub(crate) fn with_filesystem_id<T>(id: u32, action: impl FnOnce() -> T) -> io::Result<T> {
    let before = rustix::thread::capabilities(None)?;
    set_filesystem_ids(id);
    // A change of the fsuid from 0 drops the file-system capabilities (CAP_DAC_OVERRIDE and the like) from the
    // effective set (capabilities(7)); without them the image's directories could refuse us.
    let result = rustix::thread::set_capabilities(None, CapabilitySets { ..before }).map(|()| action());
    // Both steps back happen even when `action` was not run: no later file may belong to the container by accident.
    set_filesystem_ids(0);
    rustix::thread::set_capabilities(None, before)?;
    result.map_err(Into::into)
}

fn set_filesystem_ids(id: u32) {
    // Neither call reports a failure: both return the previous id in any case (setfsuid(2)).
    // SAFETY: both calls take plain integers and always succeed for a process with CAP_SETUID and CAP_SETGID.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
    }
}

/// Starts a child that runs on a copy of this process's memory, as after fork(2); the result is 0 in the child.
///
/// The child must call nothing but system calls and code without locks, and end with [`end_child`].
fn fork(flags: libc::c_int) -> io::Result<libc::pid_t> {
    // SAFETY: a null stack means the child runs on a copy of ours; this process has one thread, so no lock is held.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    if child == 0 {
        // A child in a container's user namespace still has the VM's root as its user and its descriptors. A process of
        // the container that may trace must not get at it. This is the child's own memory, so the parent is not
        // affected.
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
    }
    // The kernel's process ids fit.
    if child < 0 { Err(io::Error::last_os_error()) } else { Ok(child as libc::pid_t) }
}

/// Ends a child at once, without the exit handlers of its parent.
fn end_child(failed: bool) -> ! {
    // SAFETY: takes a plain integer and does not return.
    unsafe { libc::_exit(i32::from(failed)) }
}

/// Waits for a child to end.
fn reap(child: libc::pid_t) {
    // SAFETY: waits for a child that is ours; a null status pointer is allowed.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
}

/// The child's answer if a process of another user namespace counts for the id already; no errno is that high.
const IN_USE: i32 = i32::MAX;

/// Creates a user namespace whose ids 0.. map to `start`.. for `count` ids; the returned descriptor keeps it alive.
///
/// The namespace belongs to its own first id. The kernel counts message queues, inotify instances, timers, nested
/// namespaces and more for the owner of a user namespace: with one owner for all, a container could take them from the
/// others. `None` if a process already lives in a user namespace of this id.
pub(crate) fn new_userns(start: u32, count: u32) -> io::Result<Option<OwnedFd>> {
    // This process stays in the VM's user namespace, so a short-lived child is the namespace's first member.
    let (child_end, parent_end) = std::os::unix::net::UnixStream::pair()?;
    let child = fork(0)?;
    if child == 0 {
        // The child's own copy of the parent's end would keep the stream open forever.
        drop(parent_end);
        let answer = match unshare_user_as(start) {
            Ok(true) => 0,
            Ok(false) => IN_USE,
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        let written = (&child_end).write_all(&answer.to_ne_bytes());
        // End of file means that the parent has the descriptor, or has died.
        let _ = (&child_end).read(&mut [0]);
        end_child(written.is_err());
    }
    drop(child_end);
    let namespace = (|| {
        let mut answer = [0; size_of::<i32>()];
        (&parent_end).read_exact(&mut answer)?;
        match i32::from_ne_bytes(answer) {
            0 => {}
            IN_USE => return Ok(None),
            error => return Err(io::Error::from_raw_os_error(error)),
        }
        // Written from outside, with CAP_SETUID and CAP_SETGID in the VM: that allows a map of more than one id, and
        // leaves setgroups(2) allowed in the namespace (user_namespaces(7)).
        let map = format!("0 {start} {count}\n");
        File::options().write(true).open(format!("/proc/{child}/uid_map"))?.write_all(map.as_bytes())?;
        File::options().write(true).open(format!("/proc/{child}/gid_map"))?.write_all(map.as_bytes())?;
        File::open(format!("/proc/{child}/ns/user")).map(|file| Some(OwnedFd::from(file)))
    })();
    drop(parent_end);
    reap(child);
    namespace
}

/// Takes the id `id` and moves into a new user namespace of it; `false` if a process counts for this id already.
///
/// RLIMIT_NPROC counts the processes of a user namespace for its owner as well, and so those of all containers whose
/// namespaces `id` owns. A change of the user beyond the limit is reported by the next execve(2), before it looks for
/// the program. That is the kernel's own knowledge, which no lost file can contradict.
fn unshare_user_as(id: u32) -> io::Result<bool> {
    use rustix::{
        process::{Gid, Resource, Rlimit, Uid, getrlimit, setrlimit},
        thread::{set_thread_res_gid, set_thread_res_uid},
    };
    let maximum = getrlimit(Resource::Nproc).maximum;
    setrlimit(Resource::Nproc, Rlimit { current: Some(0), maximum })?;
    let (user, group) = (Uid::from_raw(id), Gid::from_raw(id));
    set_thread_res_gid(group, group, group)?;
    // Takes all capabilities with it. None is needed for a user namespace.
    set_thread_res_uid(user, user, user)?;
    let (arguments, directory) = ([std::ptr::null()], c"/");
    // SAFETY: the path is a C string and both lists end with their null pointer. A directory cannot be executed, so the
    // call returns.
    unsafe { libc::execve(directory.as_ptr(), arguments.as_ptr(), arguments.as_ptr()) };
    if io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN) {
        return Ok(false);
    }
    // The kernel gives the new namespace the limit of its creator, for all of the container's processes together. In
    // the VM there is none.
    setrlimit(Resource::Nproc, Rlimit { current: maximum, maximum })?;
    // SAFETY: NEWUSER unshares no memory and no descriptor table; the child has a single thread.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }?;
    Ok(true)
}

/// Runs `action` in a child that is root of `userns` and of a new mount namespace in it, and returns the descriptor
/// that `action` opens.
///
/// A file system mounted there belongs to the user namespace, as if a container had mounted it. A mount cloned from
/// there has its restrictions locked (mount_namespaces(7)), and so has each further clone.
pub(crate) fn open_in_userns(
    userns: BorrowedFd<'_>,
    action: impl FnOnce() -> io::Result<OwnedFd>,
) -> io::Result<OwnedFd> {
    let (reader, mut writer) = io::pipe()?;
    // CLONE_FILES puts the descriptor that the child opens into our table. CLONE_FS must not be there: setns(2) refuses
    // a user namespace to a process that shares its root directory with another.
    let child = fork(libc::CLONE_FILES)?;
    if child == 0 {
        let made = (|| -> io::Result<OwnedFd> {
            rustix::thread::move_into_link_name_space(userns, Some(rustix::thread::LinkNameSpaceType::User))?;
            // The kernel locks the copied mounts because the new namespace belongs to a less privileged user namespace.
            // SAFETY: NEWNS unshares no memory and no descriptor table; the child has a single thread.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
            action()
        })();
        // A negative number is an errno. A descriptor is not closed here: the shared table hands it to the parent.
        let code = |error: io::Error| -error.raw_os_error().unwrap_or(libc::EIO);
        let number = made.map_or_else(code, std::os::fd::IntoRawFd::into_raw_fd);
        let written = writer.write_all(&number.to_ne_bytes());
        end_child(written.is_err());
    }
    reap(child);
    // With the last writer closed, a child that died without writing is an end of file below instead of a hang.
    drop(writer);
    let mut number = [0; size_of::<i32>()];
    (&reader).read_exact(&mut number)?;
    let number = i32::from_ne_bytes(number);
    if number < 0 {
        return Err(io::Error::from_raw_os_error(-number));
    }
    // SAFETY: the child made it in our table and is gone.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Lets the descriptor survive execve(2).
pub(crate) fn keep_across_exec(fd: impl AsFd) -> io::Result<()> {
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty()).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use rustix::{
        fs::{Mode, OFlags},
        io::Errno,
        mount::{MountFlags, MountPropagationFlags},
    };

    use super::*;
    use crate::mount_fd;

    #[test]
    fn containers_follow_the_links_of_a_volume_in_which_the_engine_follows_none() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        // In a thread, since the namespace is its own and ends with it.
        let test = || {
            unshare_mounts().unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            rustix::mount::mount_change("/", private).unwrap();
            rustix::mount::mount("t", directory.path(), "tmpfs", MountFlags::NOSYMFOLLOW, None).unwrap();
            std::fs::create_dir(directory.path().join("d")).unwrap();
            File::create(directory.path().join("d/f")).unwrap();
            std::os::unix::fs::symlink("d", directory.path().join("link")).unwrap();
            let read =
                |tree: BorrowedFd<'_>| rustix::fs::openat(tree, "link/f", OFlags::RDONLY, Mode::empty()).map(drop);
            let volume = mount_fd::open_path(directory.path()).unwrap();
            assert_eq!(read(volume.as_fd()), Err(Errno::LOOP));
            let tree = mount_fd::clone_tree(&volume, false).unwrap();
            restrict_mount(tree.as_fd(), Restrictions::default(), false).unwrap();
            assert_eq!(read(tree.as_fd()), Ok(()));
        };
        std::thread::scope(|scope| scope.spawn(test).join()).unwrap();
    }
}
