//! System calls without a safe wrapper; all unsafe code of this module is here, except one `pre_exec`.

use std::{
    fs::File,
    io::{self, IoSliceMut, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{fs::FileExt, net::UnixStream},
    },
    time::{Duration, Instant},
};

use bulkhead_guest_common::mount;
use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags},
};

use super::syscall::{Memory, RawCall};

/// A system call that is pending, as seccomp_unotify(2) reports it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Notification {
    /// Notification id; ids count up within a filter.
    pub(super) id: u64,
    /// Id of the calling thread in this process' pid namespace; 0 if it has none there.
    pub(super) thread: u32,
    pub(super) call: RawCall,
}

/// Receives the next call, or waits for one.
///
/// # Errors
/// `ENOENT` when the caller was killed in the meantime, `EINTR`.
pub(super) fn receive(seccomp_fd: BorrowedFd<'_>) -> io::Result<Notification> {
    // SAFETY: the structure consists of integers, for which zero is valid. The kernel fails with EINVAL if it is not
    // zero.
    let mut raw: libc::seccomp_notif = unsafe { std::mem::zeroed() };
    // SAFETY: the call fills the structure, which lives across it.
    let result = unsafe { libc::ioctl(seccomp_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut raw) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let libc::seccomp_data { nr, arch, args, .. } = raw.data;
    let call = RawCall { architecture: arch, number: nr.cast_unsigned(), arguments: args };
    Ok(Notification { id: raw.id, thread: raw.pid, call })
}

/// Returns whether a call is still pending, which proves that its thread id has not been reused.
pub(super) fn still_waits(seccomp_fd: BorrowedFd<'_>, id: u64) -> bool {
    // SAFETY: the call reads one integer, which lives across it.
    unsafe { libc::ioctl(seccomp_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &raw const id) == 0 }
}

/// The answer to a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The call continues in the kernel, with its arguments as they are by then.
    Continue,
    /// The call returns 0.
    Done,
    /// The call fails with this error number.
    Failed(i32),
}

/// Answers a call.
///
/// # Errors
/// `ENOENT` when it is not pending any more, `EINPROGRESS` when nobody has received it.
pub(super) fn answer(seccomp_fd: BorrowedFd<'_>, id: u64, answer: Answer) -> io::Result<()> {
    let (error, flags) = match answer {
        Answer::Continue => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
        Answer::Done => (0, 0),
        Answer::Failed(errno) => (-errno, 0),
    };
    let mut raw = libc::seccomp_notif_resp { id, val: 0, error, flags };
    // SAFETY: the call reads the structure, which lives across it.
    let result = unsafe { libc::ioctl(seccomp_fd.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_SEND, &raw mut raw) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The memory of another process, through its open `/proc/PID/mem`.
pub(super) struct ProcessMemory(pub(super) File);

impl Memory for ProcessMemory {
    fn read(&self, address: u64, buffer: &mut [u8]) -> usize {
        // An unmapped address, and one that is negative as an offset, is an error. To the reader both are the end.
        self.0.read_at(buffer, address).unwrap_or_default()
    }
}

/// Adds attributes (`MOUNT_ATTR_…`) to a mount.
pub(super) fn add_mount_attributes(mount: BorrowedFd<'_>, set: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    mount::set_attributes(mount, attributes, false)
}

/// Forks, into another cgroup if one is given, and returns the child's id; 0 in the child.
///
/// Only for a process with a single thread: libc's locks are copied in whatever state they are.
pub(super) fn fork(cgroup: Option<BorrowedFd<'_>>) -> io::Result<i32> {
    // SAFETY: the structure is made of integers, for which zero is a value.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        arguments.flags = CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // clone3(2) without libc: posix_spawn and fork(3) cannot place a child in a cgroup.
    // SAFETY: without a stack the child runs on a copy of ours, as after fork(2); there is no other thread that could
    // have held a lock.
    let child = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    if child < 0 { Err(io::Error::last_os_error()) } else { Ok(child as i32) }
}

/// `linux/sched.h`; libc's constants are of 32 bits, which this one does not fit in.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// Maximum length of a runtime's message, in bytes. It contains the container's annotations, which the user chooses.
const MAX_MESSAGE: usize = 1 << 20;

/// Time for the rest of a message after its first part.
const MESSAGE_TIMEOUT: Duration = Duration::from_secs(2);

/// Receives a message with a descriptor, until `is_whole` or the sender closes.
///
/// The first part may take as long as the sender lives: crun connects before it sets a container up, and sends only
/// when that is started if it has `no-new-privileges`.
pub(super) fn receive_descriptor(
    stream: &UnixStream,
    is_whole: impl Fn(&[u8]) -> bool,
) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let (mut message, mut descriptor) = (Vec::new(), None);
    let mut buffer = vec![0; 4096];
    loop {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC);
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = part {
                // The first one counts. The iterator closes the others when it is dropped.
                descriptor = descriptor.or(descriptors.into_iter().next());
            }
        }
        // A timeout ends the message as the sender's close does: the descriptor is served either way.
        let length = received.map_or(0, |received| received.bytes);
        message.extend_from_slice(&buffer[..length]);
        if length == 0 || message.len() > MAX_MESSAGE || is_whole(&message) {
            return Ok((message, descriptor));
        }
        stream.set_read_timeout(Some(MESSAGE_TIMEOUT))?;
    }
}

/// Keeps a descriptor open across execve(2); for `pre_exec`, which allows async-signal-safe calls only.
pub(super) fn inherit(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: the call takes plain integers.
    match unsafe { libc::fcntl(descriptor, libc::F_SETFD, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Limits malloc to two heaps for all threads: hundreds of threads that wait would keep one each.
pub(crate) fn share_heaps() {
    // SAFETY: the call takes plain integers, and at worst changes nothing.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// Ends a forked child at once, without running the exit handlers that it has a copy of.
pub(super) fn leave(code: i32) -> ! {
    let _ = io::stdout().flush();
    // SAFETY: the call does not return and touches nothing.
    unsafe { libc::_exit(code) }
}

/// Waits until something can be read or the other end is closed; `false` after the deadline.
pub(super) fn is_readable(descriptor: impl AsFd, deadline: Instant) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
        match rustix::event::poll(&mut [PollFd::new(&descriptor, PollFlags::IN)], Some(&timeout)) {
            Ok(ready) => return ready > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return false,
        }
    }
}

/// Kills a process group.
pub(super) fn kill_group(leader: u32) {
    // SAFETY: the call takes plain integers; the leader has not been waited for, so the number is its own.
    unsafe { libc::kill(-leader.cast_signed(), libc::SIGKILL) };
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

    use super::*;

    fn pair() -> (UnixStream, UnixStream) {
        let (one, other) = UnixStream::pair().unwrap();
        other.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        (one, other)
    }

    #[test]
    fn a_message_in_pieces_is_put_together_and_its_end_is_not_waited_for() {
        let (one, other) = pair();
        let sender = thread::spawn(move || {
            for piece in ["{\"a\"", ":1", "}"] {
                (&one).write_all(piece.as_bytes()).unwrap();
                thread::sleep(Duration::from_millis(10));
            }
            one
        });
        let (message, descriptor) = receive_descriptor(&other, |text| text.ends_with(b"}")).unwrap();
        assert_eq!(message, b"{\"a\":1}");
        assert!(descriptor.is_none());
        drop(sender.join());
    }

    #[test]
    fn a_message_without_end_is_read_up_to_a_bound_and_a_silent_sender_not_waited_for() {
        let (one, other) = pair();
        let sender = thread::spawn(move || while (&one).write_all(&vec![b' '; 65_536]).is_ok() {});
        let (message, _) = receive_descriptor(&other, |_| false).unwrap();
        assert!((MAX_MESSAGE..MAX_MESSAGE + 2 * 65_536).contains(&message.len()));
        drop(other);
        sender.join().unwrap();
        let (_one, other) = pair();
        assert_eq!(receive_descriptor(&other, |_| false).unwrap().0, b"");
    }

    #[test]
    fn a_descriptor_comes_with_its_message() {
        let (one, other) = pair();
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let (stdin, parts) = (io::stdin(), [io::IoSlice::new(b"text")]);
        let descriptors = [stdin.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
        rustix::net::sendmsg(&one, &parts, &mut control, SendFlags::empty()).unwrap();
        let (message, descriptor) = receive_descriptor(&other, |_| true).unwrap();
        assert_eq!(message, b"text");
        assert!(descriptor.is_some());
    }

    #[test]
    fn this_processs_memory_is_read_as_far_as_it_goes() {
        let memory = ProcessMemory(File::open("/proc/self/mem").unwrap());
        let text = *b"some text";
        let mut buffer = [0; 9];
        assert_eq!(memory.read(text.as_ptr() as u64, &mut buffer), 9);
        assert_eq!(buffer, text);
        for address in [0, 8, u64::MAX, i64::MAX as u64 + 1] {
            assert_eq!(memory.read(address, &mut buffer), 0, "{address:#x}");
        }
    }
}
