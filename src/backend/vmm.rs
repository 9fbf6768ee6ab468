//! The child `bulkhead vmm`: its start and its end.

use std::{
    os::{
        fd::{AsFd, OwnedFd},
        unix::process::ExitStatusExt,
    },
    process::ExitStatus,
    time::Duration,
};

use nix::sys::signal::Signal;
use tokio::process::Child;

use super::{
    channel::Channel,
    child::{self, ChildError},
    events::VmEnd,
    log_file::LogFile,
};
use bulkhead_vmm::api::{Command, Event, ExitReason, MAX_PACKET};

/// Name of the process in errors.
pub(super) const NAME: &str = "vmm";

/// Time for a vmm process to exit by itself after it closed its socket or reported the end of its machine.
const EXIT_GRACE: Duration = Duration::from_secs(3);

/// The channel to a vmm process.
pub(super) type VmmChannel = Channel<Command, Event>;

/// Returns a channel and the other end for [`spawn`].
pub(super) fn channel() -> Result<(VmmChannel, OwnedFd), ChildError> {
    Channel::pair(NAME, MAX_PACKET)
}

/// Starts `bulkhead vmm` with `theirs` as its control socket and its output in `log`.
///
/// The child dies with the *thread* that calls this, see [`child::spawn`].
pub(super) fn spawn(theirs: &OwnedFd, log: &LogFile) -> Result<Child, ChildError> {
    let program = child::current_program().map_err(|error| ChildError::Start(NAME, error))?;
    child::spawn(NAME, &program, ["vmm"], theirs.as_fd(), log)
}

/// Waits until the process is gone and returns how its VM ended, given the vmm's own report if it sent one.
pub(super) async fn reap(child: &mut Child, reported: Option<ExitReason>) -> VmEnd {
    // A process whose socket is closed exits in a moment. One that hangs must not keep the data disk open.
    let status = if let Ok(status) = tokio::time::timeout(EXIT_GRACE, child.wait()).await {
        status
    } else {
        let _ = child.start_kill();
        child.wait().await
    };
    explain(reported, status.ok())
}

/// Derives the end of a VM from the vmm's report or, without one, from the exit status of its process.
fn explain(reported: Option<ExitReason>, status: Option<ExitStatus>) -> VmEnd {
    // The report wins: the status of a vmm that was killed after it only tells that the process did not exit in time.
    match reported {
        Some(ExitReason::PowerOff) => VmEnd::PowerOff,
        Some(ExitReason::Reset) => VmEnd::Reset,
        Some(ExitReason::Panic) => VmEnd::Broken("the guest kernel panicked".into()),
        Some(ExitReason::TripleFault) => VmEnd::Broken("a virtual CPU shut down (triple fault)".into()),
        Some(ExitReason::Error { message }) => VmEnd::Broken(message),
        None => VmEnd::Broken(match status {
            Some(status) => match (status.signal(), status.code()) {
                (Some(signal), _) => {
                    let name = Signal::try_from(signal).map_or("unknown", Signal::as_str);
                    format!("the vmm process was killed by signal {signal} ({name})")
                }
                (_, Some(code)) => format!("the vmm process exited with status {code} before its machine ended"),
                _ => "the vmm process ended".into(),
            },
            None => "the vmm process is gone".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vmm_that_was_killed_is_told_from_a_guest_that_powered_off() {
        assert_eq!(explain(Some(ExitReason::PowerOff), None), VmEnd::PowerOff);
        let VmEnd::Broken(reason) = explain(None, Some(ExitStatus::from_raw(9))) else { panic!() };
        assert!(reason.contains("signal 9 (SIGKILL)"), "{reason}");
    }
}
