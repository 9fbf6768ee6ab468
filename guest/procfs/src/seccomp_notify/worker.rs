//! A process of its own for each order, which the warden starts, waits for with a bound, and believes little.
//!
//! It enters the caller's namespaces, where anything can make it wait: it is killed then, and the kernel goes on with
//! the call. That is right also when the mount was made meanwhile: what comes on top is a procfs as the kernel makes it,
//! and nothing is protected by the warden's files. An error instead would break a program that did nothing wrong.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Child, Command, Stdio},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::bounded;
use rustix::event::{PollFd, PollFlags, Timespec};

use super::{
    sys::{self, Answer},
    syscall::Order,
};

/// How long an order may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Helpers that were killed and have not ended yet, over which there are no new ones.
const MOST_STUCK: usize = 32;

/// Longest order in bytes; a pipe takes it without anybody reading.
pub(super) const MAX_ORDER: u64 = 64 * 1024;

/// Killed ones, to be waited for when they end.
static STUCK: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Has an order carried out for the thread whose directory in `/proc` is `thread`.
pub(super) fn carry_out(order: &Order, thread: &OwnedFd, slot: u64, state: &Path) -> Answer {
    match start(order, thread, slot, state) {
        Ok((child, pipe)) => wait(child, &pipe),
        Err(error) => {
            eprintln!("bulkhead-procfs: can't start a helper: {error}");
            Answer::Continue
        }
    }
}

fn start(order: &Order, thread: &OwnedFd, slot: u64, state: &Path) -> io::Result<(Child, io::PipeReader)> {
    {
        let mut stuck = STUCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        stuck.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        if stuck.len() >= MOST_STUCK {
            return Err(io::Error::other("too many of them do not end"));
        }
    }
    let text = serde_json::to_vec(order)?;
    if text.len() as u64 >= MAX_ORDER {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let (input, mut order) = io::pipe()?;
    order.write_all(&text)?;
    let (output, answer) = io::pipe()?;
    let number = thread.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(format!("--helper={number}"))
        .arg(format!("--slot={slot}"))
        .arg(format!("--state={}", state.display()))
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(answer));
    // SAFETY: between fork and exec this makes one system call that takes plain integers.
    unsafe { command.pre_exec(move || sys::inherit(number)) };
    Ok((command.spawn()?, output))
}

fn wait(mut child: Child, mut pipe: &io::PipeReader) -> Answer {
    let deadline = Instant::now() + PATIENCE;
    let mut said = [0; size_of::<i32>()];
    let answer = if is_readable(pipe, deadline) {
        // Written at once, so there is all of it or nothing.
        match pipe.read_exact(&mut said).map(|()| i32::from_ne_bytes(said)) {
            Ok(0) => Answer::Done,
            Ok(errno) if (1..4096).contains(&errno) => Answer::Failed(errno),
            _ => Answer::Continue,
        }
    } else {
        Answer::Continue
    };
    // It has said what it had to say and ends by itself; one that does not is killed.
    while Instant::now() < deadline {
        if !matches!(child.try_wait(), Ok(None)) {
            return answer;
        }
        thread::sleep(Duration::from_micros(200));
    }
    sys::kill_group(child.id());
    STUCK.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(child);
    answer
}

fn is_readable(pipe: &io::PipeReader, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// The order that the warden wrote.
pub(super) fn read_order() -> io::Result<Order> {
    let text = bounded::read(File::from(io::stdin().as_fd().try_clone_to_owned()?), MAX_ORDER)?;
    serde_json::from_slice(&text).map_err(Into::into)
}

/// Tells the warden how it went.
pub(super) fn tell(errno: i32) {
    let mut output = io::stdout();
    // Without the warden there is nobody who waits.
    let _ = output.write_all(&errno.to_ne_bytes()).and_then(|()| output.flush());
}
