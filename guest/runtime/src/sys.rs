//! The system calls that no safe wrapper offers; the only unsafe code of this program.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::process::CommandExt,
    process::Command,
};

use rustix::{
    process::Signal,
    thread::{CapabilitySets, UnshareFlags},
};

/// Id-maps a mount that is not attached anywhere yet (`mount_setattr` with `MOUNT_ATTR_IDMAP`).
///
/// With `recursive`, every mount of the detached tree is mapped, or none.
pub(crate) fn idmap_mount(mount: BorrowedFd<'_>, userns: BorrowedFd<'_>, recursive: bool) -> io::Result<()> {
    set_mount_attributes(mount, libc::MOUNT_ATTR_IDMAP, userns.as_raw_fd() as u64, recursive)
}

/// What a bind mount takes away besides devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Restrictions {
    /// Writing.
    pub(crate) read_only: bool,
    /// Running programs.
    pub(crate) no_exec: bool,
    /// Set-user-id programs.
    pub(crate) no_suid: bool,
}

/// Takes devices away from the top mount of a tree or from all of it, and what else `restrictions` say.
pub(crate) fn restrict_mount(mount: BorrowedFd<'_>, restrictions: Restrictions, recursive: bool) -> io::Result<()> {
    let Restrictions { read_only, no_exec, no_suid } = restrictions;
    let flag = |on: bool, flag: u64| if on { flag } else { 0 };
    let set = libc::MOUNT_ATTR_NODEV
        | flag(read_only, libc::MOUNT_ATTR_RDONLY)
        | flag(no_exec, libc::MOUNT_ATTR_NOEXEC)
        | flag(no_suid, libc::MOUNT_ATTR_NOSUID);
    set_mount_attributes(mount, set, 0, recursive)
}

/// Makes a mount read-only and changes nothing else about it.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>) -> io::Result<()> {
    set_mount_attributes(mount, libc::MOUNT_ATTR_RDONLY, 0, false)
}

fn set_mount_attributes(mount: BorrowedFd<'_>, set: u64, userns_fd: u64, recursive: bool) -> io::Result<()> {
    let attr = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a valid empty C string, `attr` lives across the call and its true size is passed.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Gives this process a mount namespace of its own.
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
pub(crate) fn with_filesystem_id<T>(id: u32, action: impl FnOnce() -> T) -> io::Result<T> {
    let before = rustix::thread::capabilities(None)?;
    set_filesystem_ids(id);
    // A change of the fsuid away from 0 takes the file-system capabilities out of the effective set.
    let result = rustix::thread::set_capabilities(None, CapabilitySets { ..before }).map(|()| action());
    set_filesystem_ids(0);
    rustix::thread::set_capabilities(None, before)?;
    result.map_err(Into::into)
}

fn set_filesystem_ids(id: u32) {
    // SAFETY: both calls take plain integers and always succeed for a process with CAP_SETUID and CAP_SETGID.
    unsafe {
        libc::setfsgid(id);
        libc::setfsuid(id);
    }
}

/// A new user namespace whose ids 0.. map to `start`.. for `count` ids, kept alive by the returned descriptor.
pub(crate) fn new_userns(start: u32, count: u32) -> io::Result<OwnedFd> {
    let (child_end, parent_end) = std::os::unix::net::UnixStream::pair()?;
    let flags = libc::CLONE_NEWUSER | libc::SIGCHLD;
    // SAFETY: a null stack means the child runs on a copy of ours, as after fork(2); this process has one thread.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        drop(parent_end);
        // The end of the stream tells that the parent has the descriptor, or is gone.
        let _ = (&child_end).read(&mut [0]);
        // SAFETY: ends the child at once, without running the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    drop(child_end);
    let map = format!("0 {start} {count}\n");
    let namespace = (|| {
        File::options().write(true).open(format!("/proc/{child}/uid_map"))?.write_all(map.as_bytes())?;
        File::options().write(true).open(format!("/proc/{child}/gid_map"))?.write_all(map.as_bytes())?;
        File::open(format!("/proc/{child}/ns/user"))
    })();
    drop(parent_end);
    // SAFETY: waits for the child made above; a null status pointer is allowed.
    unsafe { libc::waitpid(child as libc::pid_t, std::ptr::null_mut(), 0) };
    namespace.map(OwnedFd::from)
}

/// Adds a filter to those that judge the system calls of this process and of all that come from it.
///
/// # Errors
/// `EACCES` without `CAP_SYS_ADMIN`, `EINVAL` for a filter that is not sound or a kernel without seccomp.
pub(crate) fn add_system_call_filter(filter: &[libc::sock_filter]) -> io::Result<()> {
    let len = filter.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    // The kernel only reads it.
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` names `len` instructions that live across the call, and the kernel copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Runs `action` in a child that is root of a user namespace and of a mount namespace of its own in it, and returns the
/// descriptor that it makes.
///
/// What is mounted there belongs to the user namespace, as if a container had mounted it; what is copied from there has
/// its restrictions locked (mount_namespaces(7)), and so has each copy of it.
pub(crate) fn open_in_userns(
    userns: BorrowedFd<'_>,
    action: impl FnOnce() -> io::Result<OwnedFd>,
) -> io::Result<OwnedFd> {
    let (reader, mut writer) = io::pipe()?;
    let flags = libc::CLONE_FILES | libc::SIGCHLD;
    // SAFETY: a null stack means the child runs on a copy of ours, as after fork(2); this process has one thread.
    let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        let made = (|| -> io::Result<OwnedFd> {
            rustix::thread::move_into_link_name_space(userns, Some(rustix::thread::LinkNameSpaceType::User))?;
            // SAFETY: NEWNS unshares no memory and no descriptor table; the child has a single thread.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
            action()
        })();
        // The table of descriptors is the parent's, who takes the new one over.
        let code = |error: io::Error| -error.raw_os_error().unwrap_or(libc::EIO);
        let number = made.map_or_else(code, std::os::fd::IntoRawFd::into_raw_fd);
        let written = writer.write_all(&number.to_ne_bytes());
        // SAFETY: ends the child at once, without running the parent's exit handlers.
        unsafe { libc::_exit(i32::from(written.is_err())) };
    }
    // SAFETY: waits for the child made above; a null status pointer is allowed.
    unsafe { libc::waitpid(child as libc::pid_t, std::ptr::null_mut(), 0) };
    // A child that wrote nothing must not be waited for.
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
