//! What a process may still do once it has what it needs: seccomp and Landlock, one list for each process.
//!
//! Both hold for the calling thread and for every thread it starts, so a process confines itself before its threads.

mod landlock;
mod seccomp;

use std::path::Path;

/// Why a process could not confine itself.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The file system rules were refused.
    #[error("cannot apply the Landlock rules")]
    Landlock(#[from] ::landlock::RulesetError),
    /// A folder of the rules could not be opened.
    #[error("cannot open a directory of the Landlock rules")]
    Path(#[from] ::landlock::PathFdError),
    /// The system call filter could not be built.
    #[error("cannot build the system call filter")]
    Filter(#[from] seccompiler::BackendError),
    /// The system call filter was refused.
    #[error("cannot install the system call filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// Confines the vmm process. From now on it opens no file but its own accounting in /proc and removes none but in the
/// folder of its sockets; where the kernel has no Landlock (before 5.13) only the system call filter holds.
pub fn confine_vmm(sockets: Option<&Path>) -> Result<(), SandboxError> {
    landlock::restrict_vmm(sockets)?;
    seccomp::apply_vmm()
}

/// Confines the network process. From now on it reads no file but the host's resolver configuration, writes none,
/// starts nothing, makes no sockets but IP's, and listens on none but those that it is given.
pub fn confine_net() -> Result<(), SandboxError> {
    landlock::restrict_net()?;
    seccomp::apply_net()
}

/// Confines the network process of a tap device. From now on it opens nothing: no file and no socket.
pub fn confine_tap() -> Result<(), SandboxError> {
    landlock::restrict_tap()?;
    seccomp::apply_tap()
}
