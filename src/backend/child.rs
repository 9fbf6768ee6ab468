//! Children that are handed one descriptor and nothing else.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::Path,
    process::Stdio,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{prctl, signal::Signal},
};
use tokio::process::{Child, Command};

use bulkhead_ipc::inherited::FD;

/// Starts `bulkhead VERB` as [`spawn_program`] does.
pub(super) fn spawn(verb: &str, theirs: BorrowedFd<'_>, log: std::fs::File) -> io::Result<Child> {
    spawn_program(&super::launch::program()?, [verb], theirs, log)
}

/// Starts a program with `theirs` as its descriptor 3 and its output in `log`.
///
/// The child dies with the *thread* that calls this (prctl(2), `PR_SET_PDEATHSIG`): call it on the main thread.
pub(super) fn spawn_program(
    program: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    theirs: BorrowedFd<'_>,
    log: std::fs::File,
) -> io::Result<Child> {
    // The standard library reports a failed exec through a pipe of its own, whose number must not be FD: whatever
    // number is the lowest free one from there on is taken until the child exists.
    let reserved = fcntl(theirs, FcntlArg::F_DUPFD_CLOEXEC(FD))?;
    let parent = nix::unistd::getpid();
    let number = theirs.as_raw_fd();
    let mut process = Command::new(program);
    process
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir("/")
        .process_group(0)
        .kill_on_drop(true);
    // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
    unsafe {
        process.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The backend may have died before the line above.
            if nix::unistd::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            take(number)?;
            super::launch::close_on_exec_from(FD.cast_unsigned() + 1)
        });
    }
    let child = process.spawn();
    // SAFETY: the number came from fcntl above, is open and belongs to nobody else.
    drop(unsafe { OwnedFd::from_raw_fd(reserved) });
    child
}

/// Makes `number` descriptor [`FD`] and lets only that one survive exec.
fn take(number: RawFd) -> io::Result<()> {
    // SAFETY: plain system calls on a descriptor that the caller holds open; no memory is passed.
    let result = unsafe { if number == FD { libc::fcntl(number, libc::F_SETFD, 0) } else { libc::dup2(number, FD) } };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
