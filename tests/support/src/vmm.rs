//! Runs `bulkhead vmm` as its backend would and talks to it over the control socket.

use std::{
    os::fd::OwnedFd,
    process::{Child, Command as Process, Stdio},
    time::{Duration, Instant},
};

use bulkhead_vmm::api::{Command, Event, ExitReason, VmConfig};

use crate::{control, program};

/// A vmm process; killed when dropped.
pub struct Vmm {
    child: Option<Child>,
    socket: OwnedFd,
}

impl Vmm {
    /// Starts the process and sends it nothing.
    pub fn spawn() -> Self {
        let (ours, theirs) = control::pair().unwrap();
        let mut process = Process::new(program());
        process.arg("vmm").stdin(Stdio::null()).stderr(Stdio::inherit());
        Self { child: Some(control::spawn(&mut process, Some(&theirs)).unwrap()), socket: ours }
    }

    /// Starts the process and boots a machine.
    pub fn boot(config: VmConfig) -> Self {
        let vmm = Self::spawn();
        vmm.send(&Command::Boot(Box::new(config)), None);
        vmm
    }

    /// The process id, before [`Self::disconnect`].
    pub fn pid(&self) -> u32 {
        self.child.as_ref().map(Child::id).unwrap()
    }

    /// Sends a command, with a descriptor beside it if there is one.
    pub fn send(&self, command: &Command, fd: Option<&OwnedFd>) {
        self.send_raw(&serde_json::to_vec(command).unwrap(), fd);
    }

    /// Sends any bytes as one packet.
    pub fn send_raw(&self, packet: &[u8], fd: Option<&OwnedFd>) {
        control::send(&self.socket, packet, fd).unwrap();
    }

    /// The next event; `None` when the process closed the socket.
    pub fn event(&self, within: Duration) -> Option<Event> {
        control::receive(&self.socket, within).unwrap_or_else(|error| panic!("no event within {within:?}: {error}"))
    }

    /// Waits for the machine's end.
    pub fn exit(&self, within: Duration) -> ExitReason {
        let deadline = Instant::now() + within;
        loop {
            match self.event(deadline.saturating_duration_since(Instant::now())) {
                Some(Event::Exited(reason)) => return reason,
                Some(_) => {}
                None => panic!("the vmm closed its socket without the event of an exit"),
            }
        }
    }

    /// Closes the control socket, as the kernel does for a backend that died, and returns the process.
    pub fn disconnect(mut self) -> Child {
        self.child.take().unwrap()
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Returns whether the process ends by itself in time; kills one that does not.
pub fn ended(child: &mut Child, within: Duration) -> bool {
    let deadline = Instant::now() + within;
    while Instant::now() < deadline {
        if child.try_wait().unwrap().is_some() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}
