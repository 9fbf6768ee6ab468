//! The whole process, as the backend starts it: this test program again, which runs the process's main function.

use std::{
    fs,
    io::{IoSlice, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    process::{Child, Command, ExitCode, Stdio},
};

use nix::sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

use super::{device::Driver, *};
use crate::{QUEUES, api, fs::locks::MAX_WAITING, sys::SYS_GETXATTRAT};
use bulkhead_ipc::inherited;

#[test]
#[ignore = "the process of the test below"]
fn child() {
    if let Some(place) = std::env::var_os("BULKHEAD_SHARE_TEST") {
        if place == "container" {
            refuse_as_in_a_container();
        }
        assert_eq!(crate::run(), ExitCode::SUCCESS);
    }
}

/// Refuses system calls that the process can do without, as the filters of containers' runtimes do.
fn refuse_as_in_a_container() {
    let calls = [libc::SYS_unshare, libc::SYS_setns, libc::SYS_mount, SYS_GETXATTRAT];
    let rules = calls.map(|call| (call, Vec::new())).into_iter().collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64).unwrap();
    seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
}

/// Starts the process with a control socket, whose other end is returned.
fn start() -> (Child, OwnedFd) {
    start_in("host")
}

fn start_in(place: &str) -> (Child, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "tests::process::child", "--ignored", "--nocapture"]).env("BULKHEAD_SHARE_TEST", place);
    let number = theirs.as_raw_fd();
    // SAFETY: dup2 may be called between fork and exec; the socket is open as long as this function runs.
    unsafe {
        command.pre_exec(move || match libc::dup2(number, inherited::FD) {
            -1 => Err(std::io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    (command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap(), ours)
}

fn send(control: &OwnedFd, command: &api::Command, beside: &impl AsRawFd) {
    let packet = serde_json::to_vec(command).unwrap();
    let fds = [beside.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(control.as_raw_fd(), &[IoSlice::new(&packet)], &message, MsgFlags::empty(), None).unwrap();
}

/// Memory for the processes of one device, as the backend keeps it.
pub(super) fn state() -> OwnedFd {
    let file = tempfile::tempfile().unwrap();
    file.set_len(api::STATE_LEN).unwrap();
    file.into()
}

/// Starts a process that goes on with what is in this memory; returns it with its control socket and the vmm's stream.
pub(super) fn serve(state: &OwnedFd, shares: &[Share], locks: bool) -> (Child, OwnedFd, UnixStream) {
    let (child, control) = start();
    let stream = set_up(&control, state, shares, locks);
    (child, control, stream)
}

fn set_up(control: &OwnedFd, state: &OwnedFd, shares: &[Share], locks: bool) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    send(control, &api::Command::State, state);
    send(control, &api::Command::Setup { shares: shares.to_vec(), hidden: Vec::new(), locks }, &theirs);
    ours
}

pub(super) fn end(mut child: Child) -> String {
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(child.wait().unwrap().success(), "{errors}");
    errors
}

#[test]
fn the_process_confines_every_thread_serves_and_ends_with_the_vmm_or_the_backend() {
    let guest = Guest::new();
    fs::write(guest.path("file"), b"x").unwrap();
    for (vmm_ends, locks) in [(true, false), (false, true)] {
        let (child, control, ours) = serve(&state(), &[guest.share("", false), guest.share("missing", false)], locks);
        let keep = ours.try_clone().unwrap();
        let driver = Driver::new(ours);
        let mut node = fuse::ROOT;
        for name in guest.path("file").components().skip(1) {
            node = entry(&driver.call(1, LOOKUP, node, body().name(name))[16..]).0;
        }
        assert_eq!(attributes(&driver.call(2, GETATTR, node, body().u64(0).u64(0))[32..]).size, 1);
        let mut confined = 0;
        for task in fs::read_dir(format!("/proc/{}/task", child.id())).unwrap() {
            let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
            let is = |field: &str| status.lines().any(|line| line.split_whitespace().eq(field.split(' ')));
            confined += usize::from(is("Seccomp: 2") && is("NoNewPrivs: 1"));
        }
        // The workers, the thread that runs the process's main function, and those that wait for locks.
        assert_eq!(confined, QUEUES + 1 + if locks { MAX_WAITING } else { 0 });
        if vmm_ends {
            keep.shutdown(std::net::Shutdown::Both).unwrap();
        } else {
            drop(control);
        }
        let errors = end(child);
        assert!(errors.contains("warning: share: cannot share") && errors.contains("missing"), "{errors}");
    }
}

#[test]
fn a_process_in_a_container_whose_filter_refuses_calls_serves_files_with_their_owners() {
    let guest = Guest::new();
    fs::write(guest.path("file"), b"x").unwrap();
    let owned = guest.chown(guest.node("file"), 999, 998).unwrap();
    let (child, control) = start_in("container");
    let driver = Driver::new(set_up(&control, &state(), &[guest.share("", false)], false));
    let node = node(&driver, &guest, "file");
    let seen = attributes(&driver.call(2, GETATTR, node, body().u64(0).u64(0))[32..]);
    assert_eq!(((seen.uid, seen.gid), (owned.uid, owned.gid)), ((999, 998), (999, 998)));
    drop(control);
    end(child);
}

#[test]
fn a_process_without_its_socket_or_its_setup_says_so() {
    let (child, control) = start();
    drop(control);
    let mut child = child;
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(errors.contains("error: share: the backend did not send a state and a list of shares"), "{errors}");
}

/// The node of a path, and a reply's error or contents.
fn node(driver: &Driver, guest: &Guest, path: &str) -> u64 {
    let path = guest.path(path);
    let names = path.components().skip(1);
    names.fold(fuse::ROOT, |node, name| entry(&driver.call(1, LOOKUP, node, body().name(name))[16..]).0)
}

#[test]
fn processes_that_are_killed_at_any_time_lose_nothing_and_do_nothing_twice() {
    let guest = Guest::new();
    for name in ["log", "r0"] {
        fs::write(guest.path(name), b"").unwrap();
    }
    let (memory, shares) = (state(), [guest.share("", false)]);
    let (mut child, mut control, ours) = serve(&memory, &shares, false);
    let mut driver = Driver::new(ours);
    let (root, log) = (node(&driver, &guest, ""), node(&driver, &guest, "log"));
    let append = libc::O_WRONLY | libc::O_APPEND;
    let open = driver.call(1, OPEN, log, body().u32(append.cast_unsigned()).u32(0));
    let handle = u64_at(&open, 16);
    for round in 0..60 {
        let line = format!("{round:1000}\n");
        let head = body().u64(handle).u64(0).u32(line.len() as u32).u32(0).u64(0);
        let write = head.u32(append.cast_unsigned()).u32(0).bytes(line.as_bytes());
        let requests = [
            (1, request(WRITE, log, own(), &write.0)),
            (2, request(MKDIR, root, own(), &body().u32(0o755).u32(0).name(format!("d{round}")).0)),
            (3, request(RENAME2, root, own(), &rename(root, round).0)),
        ];
        for (queue, request) in &requests {
            driver.send(*queue, request, 0x4000);
        }
        // Before, while and after it serves them.
        thread::sleep(std::time::Duration::from_micros(round * 20));
        child.kill().unwrap();
        child.wait().unwrap();
        drop(control);
        let ours;
        (child, control, ours) = serve(&memory, &shares, false);
        driver.reconnect(ours);
        for (queue, _) in &requests {
            let reply = driver.completed(*queue);
            assert_eq!(u32_at(&reply, 4).cast_signed(), 0, "round {round}, queue {queue}");
        }
    }
    let expected: Vec<_> = (0..60).map(|round| format!("{round:1000}\n")).collect();
    assert!(
        fs::read_to_string(guest.path("log")).unwrap() == expected.concat(),
        "a line is missing, or is there twice"
    );
    assert!((0..60).all(|round| guest.path(&format!("d{round}")).is_dir()) && guest.path("r60").exists());
    drop(control);
    end(child);
}

fn rename(root: u64, round: u64) -> Request {
    body().u64(root).u32(0).u32(0).name(format!("r{round}")).name(format!("r{}", round + 1))
}
