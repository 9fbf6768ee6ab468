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

use super::{device::Driver, *};
use crate::{QUEUES, api};
use bulkhead_ipc::inherited;

#[test]
#[ignore = "the process of the test below"]
fn child() {
    if std::env::var_os("BULKHEAD_SHARE_TEST").is_some() {
        assert_eq!(crate::run(), ExitCode::SUCCESS);
    }
}

/// Starts the process with a control socket, whose other end is returned.
fn start() -> (Child, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "tests::process::child", "--ignored", "--nocapture"]).env("BULKHEAD_SHARE_TEST", "1");
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

fn send(control: &OwnedFd, command: &api::Command, stream: &UnixStream) {
    let packet = serde_json::to_vec(command).unwrap();
    let fds = [stream.as_raw_fd()];
    let message = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(control.as_raw_fd(), &[IoSlice::new(&packet)], &message, MsgFlags::empty(), None).unwrap();
}

fn end(mut child: Child) -> String {
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(child.wait().unwrap().success(), "{errors}");
    errors
}

#[test]
fn the_process_confines_every_thread_serves_and_ends_with_the_vmm_or_the_backend() {
    let guest = Guest::new();
    fs::write(guest.path("file"), b"x").unwrap();
    for vmm_ends in [true, false] {
        let (child, control) = start();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let shares = vec![guest.share("", false), guest.share("missing", false)];
        send(&control, &api::Command::Setup { shares }, &theirs);
        drop(theirs);
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
        // The workers, and the thread that runs the process's main function.
        assert_eq!(confined, QUEUES + 1);
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
fn a_process_without_its_socket_or_its_setup_says_so() {
    let (child, control) = start();
    drop(control);
    let mut child = child;
    let mut errors = String::new();
    child.stderr.take().unwrap().read_to_string(&mut errors).unwrap();
    assert!(!child.wait().unwrap().success());
    assert!(errors.contains("error: share: the backend's first packet is not a list of shares"), "{errors}");
}
