//! Runs one process for each request, with a time limit and without trust in its result.
//!
//! A process and not a thread: setns(2) into a user namespace needs a single thread, and a thread with the caller's
//! root and ids could never be used again. In the caller's namespaces anything can block it, a FUSE file system of the
//! container for one. It is killed then, and the call continues in the kernel. That is right even when the mount was
//! made meanwhile: a plain procfs comes on top of it, and the files protect nothing. An error would break a program
//! that did nothing wrong.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::bounded;

use super::{
    left_behind,
    sys::{self, Answer},
    syscall::MountRequest,
};

/// Time for a request, from start to the worker's end.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum length of a request in bytes: the capacity of a pipe, so that writing it never blocks.
pub(super) const MAX_REQUEST: u64 = 64 * 1024;

/// Performs a request for the thread whose directory in `/proc` is `thread`.
pub(super) fn perform(request: &MountRequest, thread: &OwnedFd, slot: u64, state: &Path) -> Answer {
    match start(request, thread, slot, state) {
        Ok((child, pipe)) => wait(child, &pipe, slot),
        Err(error) => {
            eprintln!("bulkhead-procfs: cannot start a worker, the call continues in the kernel: {error}");
            Answer::Continue
        }
    }
}

fn start(request: &MountRequest, thread: &OwnedFd, slot: u64, state: &Path) -> io::Result<(Child, io::PipeReader)> {
    let text = serde_json::to_vec(request)?;
    if text.len() as u64 >= MAX_REQUEST {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    // The request goes through the standard streams. Command lines are readable by any user of the VM, and nobody can
    // add to a pipe.
    let (input, mut request) = io::pipe()?;
    request.write_all(&text)?;
    let (output, answer) = io::pipe()?;
    let number = thread.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(format!("--worker={number}"))
        .arg(format!("--slot={slot}"))
        .arg(format!("--state={}", state.display()))
        // Nothing of init's: NOTIFY_SOCKET and the stored descriptors are for the service alone.
        .env_clear()
        .current_dir("/")
        // The worker forks; both are killed by their group.
        .process_group(0)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(answer));
    // SAFETY: between fork and exec this makes one system call that takes plain integers.
    unsafe { command.pre_exec(move || sys::inherit(number)) };
    Ok((command.spawn()?, output))
}

fn wait(mut child: Child, mut pipe: &io::PipeReader, slot: u64) -> Answer {
    let deadline = Instant::now() + REQUEST_TIMEOUT;
    let mut errno = [0; size_of::<i32>()];
    let answer = if sys::is_readable(pipe, deadline) {
        // Four bytes are written at once, so either all of them are there or the worker ended without a result.
        match pipe.read_exact(&mut errno).map(|()| i32::from_ne_bytes(errno)) {
            Ok(0) => Answer::Done,
            // The kernel takes anything; to libc a number outside of this range would look like success.
            Ok(errno) if (1..4096).contains(&errno) => Answer::Failed(errno),
            _ => Answer::Continue,
        }
    } else {
        Answer::Continue
    };
    // The result stands, but the caller continues only when the worker is gone: until then it holds the caller's root
    // and the target open, and an unmount right after this call would fail with EBUSY.
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(None) => thread::sleep(Duration::from_micros(200)),
            Ok(Some(status)) => {
                // It waits for what it forks, unless something has killed it.
                if status.code().is_none() {
                    left_behind::count(child.id(), slot);
                }
                return answer;
            }
            Err(_) => return answer,
        }
    }
    left_behind::kill(child.id(), slot);
    answer
}

/// Reads the request, in the worker.
pub(super) fn read_request() -> io::Result<MountRequest> {
    let text = bounded::read(File::from(io::stdin().as_fd().try_clone_to_owned()?), MAX_REQUEST)?;
    serde_json::from_slice(&text).map_err(Into::into)
}

/// Reports the result, in the worker: 0 or the error number with which the call fails.
pub(super) fn report(errno: i32) {
    let mut output = io::stdout();
    // A service that is gone has left the call to the next one, which continues it.
    let _ = output.write_all(&errno.to_ne_bytes()).and_then(|()| output.flush());
}
