//! The life of the vmm's threads. None of them ends unnoticed: a thread that fails ends the machine with a reason, and
//! a panic ends the process.

use std::{
    io,
    os::fd::OwnedFd,
    panic, process,
    thread::{self, JoinHandle},
};

use bulkhead_ipc::report;

use super::{
    api::{Event, ExitReason},
    control_socket::send_now,
    exit::ExitSignal,
};

/// Starts `body` on a thread of this name, at most 15 bytes (the kernel cuts the rest). An error that it returns ends
/// the machine.
///
/// The body is called once. It is not an `FnOnce`, so that the error is reported while all that it holds is alive: the
/// last vCPU takes the devices with it, some of which wait for the host.
pub(crate) fn spawn(
    name: &str,
    exit: ExitSignal,
    mut body: impl FnMut() -> Result<(), ExitReason> + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_owned()).spawn(move || {
        if let Err(reason) = body() {
            exit.raise(reason);
        }
    })
}

/// Returns the reason for the end of a machine whose thread of this name cannot go on.
pub(crate) fn failed(name: &str, error: &io::Error) -> ExitReason {
    ExitReason::Error {
        message: format!("the thread `{name}` of the virtual machine failed: {error}; `bulkhead start` boots it again"),
    }
}

/// Makes a panic of any thread report itself to the backend, and then to the hook that was there before, and abort the
/// process. A machine that lost a vCPU or a device would hang instead, with locks held whose contents nobody can trust.
pub(crate) fn abort_on_panic(control: OwnedFd) {
    let log = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let message = format!(
            "the vmm failed: {}; this is a bug, please report it; `bulkhead start` boots the machine again",
            report::panic(info)
        );
        // Does not wait: the backend may be busy or gone.
        send_now(&control, &Event::Exited(ExitReason::Error { message }));
        log(info);
        process::abort();
    }));
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::AsRawFd, unix::process::ExitStatusExt},
        process::Command,
        time::Duration,
    };

    use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

    use super::*;

    /// Set in the child of the test below.
    const CHILD: &str = "BULKHEAD_TEST_PANICS";

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap()
    }

    #[test]
    fn an_error_of_a_thread_ends_the_machine_with_a_reason() {
        let exit = ExitSignal::new().unwrap();
        let error = io::Error::from_raw_os_error(libc::EIO);
        spawn("block", exit.clone(), move || Err(failed("block", &error))).unwrap().join().unwrap();
        assert_eq!(exit.event().read().unwrap(), 1);
        let Some(ExitReason::Error { message }) = exit.take() else { panic!("no reason") };
        assert!(message.contains("`block`") && message.contains("Input/output error"), "{message}");
    }

    #[test]
    fn an_error_is_reported_before_what_the_thread_holds_is_dropped() {
        struct Held(ExitSignal, std::sync::mpsc::Sender<Option<ExitReason>>);
        impl Drop for Held {
            fn drop(&mut self) {
                let _ = self.1.send(self.0.take());
            }
        }
        let (exit, (sender, reason)) = (ExitSignal::new().unwrap(), std::sync::mpsc::channel());
        let held = Held(exit.clone(), sender);
        let body = move || {
            let _used = &held;
            Err(ExitReason::TripleFault)
        };
        spawn("vcpu0", exit, body).unwrap().join().unwrap();
        assert_eq!(reason.recv().unwrap(), Some(ExitReason::TripleFault));
    }

    #[test]
    fn a_panic_of_any_thread_is_reported_and_aborts_the_process() {
        if std::env::var_os(CHILD).is_some() {
            // The inherited end has the number that the environment names.
            let fd: i32 = std::env::var(CHILD).unwrap().parse().unwrap();
            // SAFETY: the parent made this descriptor for the child, which has no other use of it.
            let socket = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
            abort_on_panic(socket);
            let exit = ExitSignal::new().unwrap();
            let _ = spawn("rng", exit, || panic!("out of cheese")).unwrap().join();
            // A process that lives on is what must not happen.
            return;
        }
        let (ours, theirs) = pair();
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "threads::tests::a_panic_of_any_thread_is_reported_and_aborts_the_process",
                "--nocapture",
            ])
            .env(CHILD, theirs.as_raw_fd().to_string())
            .output()
            .unwrap();
        drop(theirs);
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        let mut packet = vec![0; 65536];
        let timeout = nix::sys::time::TimeVal::new(Duration::from_secs(20).as_secs().cast_signed(), 0);
        nix::sys::socket::setsockopt(&ours, nix::sys::socket::sockopt::ReceiveTimeout, &timeout).unwrap();
        let len = recv(ours.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        let Event::Exited(ExitReason::Error { message }) = serde_json::from_slice(&packet[..len]).unwrap() else {
            panic!("not the report of an error")
        };
        assert!(message.contains("`rng`") && message.contains("out of cheese"), "{message}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("out of cheese"), "{output:?}");
    }
}
