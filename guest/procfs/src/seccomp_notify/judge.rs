//! Judges calls in processes of their own, with a time limit.
//!
//! Judging reads the caller's memory and asks for the file system of a path, and the caller's container may serve both
//! itself, by FUSE, and never answer. A thread of the service that waits for that could neither be given up nor
//! killed, nor could the service be. A process can be left behind ([`left_behind`]).
//!
//! A judge stays for the next call: starting a process takes longer than most calls that continue in the kernel. Before
//! it answers it closes all that it has opened of the caller, since closing can block as well. So one that has answered
//! waits for nothing but its next call.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bulkhead_guest_common::{bounded, notify, process::Status};
use rustix::{
    fs::{Mode, OFlags},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
        SendFlags, SocketFlags, SocketType,
    },
};

use super::{
    MAX_PROC_FILE, left_behind, mount, mountinfo,
    sys::{self, ProcessMemory},
    syscall::{Decision, MountRequest, RawCall, judge},
    worker::MAX_REQUEST,
};

/// Time for the judgement about a call.
const JUDGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum number of judges that wait for a call. More are started while more containers mount at the same time.
const MAX_IDLE: usize = 2;

/// Maximum length of a call, in bytes: eight numbers.
const MAX_CALL: usize = 1024;

/// A judge without a call.
struct Judge {
    process: u32,
    socket: OwnedFd,
}

static IDLE: Mutex<Vec<Judge>> = Mutex::new(Vec::new());

fn idle() -> std::sync::MutexGuard<'static, Vec<Judge>> {
    IDLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has a call judged of the thread whose directory in `/proc` is `thread`.
///
/// A call that could not be judged, in time or at all, continues in the kernel: its thread then waits for its own file
/// system itself.
pub(super) fn ask(call: &RawCall, thread: &OwnedFd, slot: u64) -> Decision {
    let idle_one = idle().pop();
    let judge = match idle_one.map_or_else(start, Ok) {
        Ok(judge) => judge,
        Err(error) => {
            eprintln!("bulkhead-procfs: cannot start a judge, the call continues in the kernel: {error}");
            return Decision::Continue;
        }
    };
    let answered = send(&judge, call, thread).and_then(|()| receive_decision(&judge, Instant::now() + JUDGE_TIMEOUT));
    let Ok(decision) = answered else {
        left_behind::kill(judge.process, slot);
        return Decision::Continue;
    };
    let mut idle = idle();
    if idle.len() < MAX_IDLE {
        idle.push(judge);
    } else {
        drop(idle);
        // It waits for nothing that a container controls, so it is reaped by the next count.
        left_behind::kill(judge.process, slot);
    }
    decision
}

fn start() -> io::Result<Judge> {
    let (socket, far) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    let number = far.as_raw_fd();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg(format!("--judge={number}"))
        // Nothing of init's: NOTIFY_SOCKET and the stored descriptors are for the service alone.
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .stdin(Stdio::null());
    // SAFETY: between fork and exec this makes one system call that takes plain integers.
    unsafe { command.pre_exec(move || sys::inherit(number)) };
    let process = command.spawn()?.id();
    Ok(Judge { process, socket })
}

fn send(judge: &Judge, call: &RawCall, thread: &OwnedFd) -> io::Result<()> {
    let text = serde_json::to_vec(call)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors = [thread.as_fd()];
    control.push(SendAncillaryMessage::ScmRights(&descriptors));
    // NOSIGNAL: a judge that has died is an error here. The socket is empty, so this does not block.
    rustix::net::sendmsg(&judge.socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive_decision(judge: &Judge, deadline: Instant) -> io::Result<Decision> {
    if !sys::is_readable(&judge.socket, deadline) {
        return Err(io::ErrorKind::TimedOut.into());
    }
    let mut buffer = vec![0; MAX_REQUEST as usize];
    // A judge that has ended leaves an empty message, which does not parse.
    let (length, _) = rustix::net::recv(&judge.socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
    serde_json::from_slice(&buffer[..length]).map_err(Into::into)
}

/// The judge's program: answers calls until the service closes its end or has ended.
pub(crate) fn main(socket: i32) -> io::Result<()> {
    let socket = notify::adopt(socket).ok_or(io::ErrorKind::InvalidInput)?;
    while let Some((call, thread)) = receive_call(&socket)? {
        // Takes the directory along, so that nothing of the caller is open when the answer is sent.
        let decision = decide(&call, thread);
        rustix::net::send(&socket, &serde_json::to_vec(&decision)?, SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

fn receive_call(socket: &OwnedFd) -> io::Result<Option<(RawCall, OwnedFd)>> {
    let mut buffer = [0; MAX_CALL];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let parts = &mut [IoSliceMut::new(&mut buffer)];
    let length = loop {
        match rustix::net::recvmsg(socket, parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received.bytes,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if length == 0 {
        return Ok(None);
    }
    let thread = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.into_iter().next(),
        _ => None,
    });
    let thread = thread.ok_or(io::ErrorKind::InvalidData)?;
    Ok(Some((serde_json::from_slice(&buffer[..length])?, thread)))
}

/// Judges a call of the thread whose directory in `/proc` is `thread`.
fn decide(call: &RawCall, thread: OwnedFd) -> Decision {
    let open = |name: &str| {
        let file = rustix::fs::openat(&thread, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        file.map(File::from).map_err(io::Error::from)
    };
    let Ok(memory) = open("mem") else { return Decision::Continue };
    let decision = judge(call, &ProcessMemory(memory));
    let text = |name: &str| bounded::read(open(name)?, MAX_PROC_FILE);
    let may_mount =
        || text("status").ok().and_then(|text| Status::read(&text)).is_some_and(|status| status.has_sys_admin());
    // These checks only save starting a worker for calls that the kernel would handle the same way: each container that
    // runs systemd or an engine mounts and unmounts hundreds of times.
    let concerns = match &decision {
        Decision::Continue => false,
        // Without node mounts in this mount namespace there is nothing to unmount along with the target.
        Decision::Perform(MountRequest::Unmount { .. }) => {
            text("mountinfo").is_ok_and(|text| mountinfo::has_ours(&text))
        }
        Decision::Perform(MountRequest::Bind { source, .. }) => mount::may_be_whole(&thread, source),
        Decision::Refuse(_) | Decision::Perform(MountRequest::Mount { .. }) => true,
    };
    // A caller without CAP_SYS_ADMIN gets its EPERM from the kernel.
    if concerns && may_mount() { decision } else { Decision::Continue }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_request_fits_into_an_answer() {
        let longest = vec![255; 4096];
        for request in [
            MountRequest::Bind { source: longest.clone(), target: longest.clone() },
            MountRequest::Mount {
                kind: super::super::syscall::Kind::Sys,
                source: Some(longest[..256].to_vec()),
                target: longest.clone(),
                flags: u64::MAX,
                options: longest,
            },
        ] {
            assert!((serde_json::to_vec(&Decision::Perform(request)).unwrap().len() as u64) < MAX_REQUEST);
        }
        let call = RawCall { architecture: u32::MAX, number: u32::MAX, arguments: [u64::MAX; 6] };
        assert!(serde_json::to_vec(&call).unwrap().len() < MAX_CALL);
    }

    #[test]
    fn a_call_of_this_process_is_judged_by_its_memory() {
        let thread = rustix::fs::open("/proc/thread-self", OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let name = *b"proc\0";
        let call = |address| RawCall { architecture: 0xc000_003e, number: 430, arguments: [address, 0, 0, 0, 0, 0] };
        let judged = decide(&call(name.as_ptr() as u64), thread.try_clone().unwrap());
        let status = Status::read(&std::fs::read("/proc/thread-self/status").unwrap()).unwrap();
        let expected = if status.has_sys_admin() { Decision::Refuse(libc::ENOSYS) } else { Decision::Continue };
        assert_eq!(judged, expected);
        assert_eq!(decide(&call(8), thread), Decision::Continue);
    }
}
