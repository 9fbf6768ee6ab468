//! Starting a child process that inherits one descriptor, its log and nothing else.
//!
//! A child must not outlive the backend: a VM without one would keep the data disk open behind the next backend's back.
//! Three things see to that. The kernel kills the child when the thread that started it dies, our own programs exit when
//! their control socket closes, and tokio kills a child when its [`Child`] is dropped.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::{
    fcntl::{FcntlArg, fcntl},
    sys::{prctl, signal::Signal},
};
use tokio::process::{Child, Command};

use super::log_file::LogFile;
use bulkhead_ipc::inherited::FD;

/// Failure of a child process or of the connection to it; each variant begins with the child's name.
#[derive(Debug, thiserror::Error)]
pub enum ChildError {
    /// The process or its descriptors could not be made.
    #[error("cannot start the {0} process")]
    Start(&'static str, #[source] io::Error),
    /// Its control socket failed.
    #[error("the connection to the {0} process failed")]
    Socket(&'static str, #[source] io::Error),
    /// A command is not valid JSON, because a path in it is not UTF-8.
    #[error("cannot encode a packet for the {0} process")]
    Encode(&'static str, #[source] serde_json::Error),
    /// The child sent something that is not one of its messages.
    #[error("the {0} process sent an invalid packet")]
    Decode(&'static str, #[source] serde_json::Error),
    /// A packet in either direction exceeds this many bytes.
    #[error("a packet to or from the {0} process is longer than {1} bytes")]
    TooLong(&'static str, usize),
}

/// Returns the path of the running program, even after its file was replaced.
pub(super) fn current_program() -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    // An upgrade unlinks the file of a running backend. The link in procfs still opens the same program, which the
    // child must be: the packets between the two have no version.
    let replaced = program.to_string_lossy().ends_with(" (deleted)");
    Ok(if replaced { "/proc/self/exe".into() } else { program })
}

/// Starts `program` with `theirs` as its descriptor 3 and its output in `log`; `name` is its name in errors.
///
/// The child dies with the *thread* that calls this (prctl(2), `PR_SET_PDEATHSIG`): call it on the main thread.
pub(super) fn spawn(
    name: &'static str,
    program: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    theirs: BorrowedFd<'_>,
    log: &LogFile,
) -> Result<Child, ChildError> {
    let output = log.child(name);
    output
        .and_then(|output| spawn_program(program, arguments, theirs, output))
        .map_err(|error| ChildError::Start(name, error))
}

fn spawn_program(
    program: &Path,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    theirs: BorrowedFd<'_>,
    output: OwnedFd,
) -> io::Result<Child> {
    // The standard library reports a failed exec through a pipe that it opens before the fork. If that pipe got number
    // FD, `take` would overwrite it in the child and a failed exec would look like a success. So the lowest free number
    // from FD on stays occupied until the child exists.
    let reserved = fcntl(theirs, FcntlArg::F_DUPFD_CLOEXEC(FD))?;
    let parent = nix::unistd::getpid();
    let number = theirs.as_raw_fd();
    let mut process = Command::new(program);
    process
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        // Keeps no mount busy.
        .current_dir("/")
        // Ctrl-C in a terminal signals the foreground group. Only the backend may act on it: it has to ask the guest
        // first, while the child still runs.
        .process_group(0)
        .kill_on_drop(true);
    // SAFETY: between fork and exec only system calls are made; nothing is allocated or locked.
    unsafe {
        process.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The setting has no effect for a parent that died before it; the child then has another parent by now.
            if nix::unistd::getppid() != parent {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            take(number)?;
            close_on_exec_from(FD.cast_unsigned() + 1)
        });
    }
    let child = process.spawn();
    // SAFETY: the number came from fcntl above, is open and has no other owner.
    drop(unsafe { OwnedFd::from_raw_fd(reserved) });
    child
}

/// Makes `number` descriptor [`FD`] and lets only that one survive exec.
fn take(number: RawFd) -> io::Result<()> {
    // dup2 clears FD_CLOEXEC on the copy, but does nothing when both numbers are equal; the flag is cleared by hand
    // then.
    // SAFETY: plain system calls on a descriptor that the caller holds open; no memory is passed.
    let result = unsafe { if number == FD { libc::fcntl(number, libc::F_SETFD, 0) } else { libc::dup2(number, FD) } };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets no descriptor from `first` on survive the coming exec. Only makes a system call.
///
/// A shell may have left descriptors open that are not the child's business: a pipe's end that stays open there keeps
/// its reader waiting forever.
pub(super) fn close_on_exec_from(first: libc::c_uint) -> io::Result<()> {
    // Marked, not closed: one of them is the pipe that reports a failed exec.
    // SAFETY: a plain system call; no memory is passed and no descriptor is closed yet.
    let result = unsafe { libc::close_range(first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC.cast_signed()) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            // Linux before 5.11 lacks the call or its flag. The descriptors of the standard library and tokio are
            // closed on exec anyway.
            error if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EINVAL)) => Ok(()),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use bulkhead_ipc::report::chain;

    #[tokio::test]
    async fn a_program_that_is_missing_is_reported_once_and_by_the_childs_name() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let log = LogFile::open(&directory.path().join("backend.log"), false).unwrap();
        let error = spawn("test", Path::new("/nonexistent"), ["verb"], theirs.as_fd(), &log).unwrap_err();
        assert_eq!(chain(&error), "cannot start the test process: No such file or directory (os error 2)");
        drop(ours);
    }
}
