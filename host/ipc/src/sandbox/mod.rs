//! Confinement of the host's processes by seccomp and Landlock, with one list of permissions for each process.
//!
//! A process confines itself once it has opened what it needs, before it handles the guest's data. Both mechanisms
//! apply to the calling thread and to the threads that it starts later, so a process does this before it starts any.
//! Neither can be undone.

mod landlock;
mod seccomp;

use std::path::Path;

/// An error in confining the process.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The file system rules were refused.
    #[error("cannot apply the Landlock rules")]
    Landlock(#[from] ::landlock::RulesetError),
    /// A directory that the rules name could not be opened.
    #[error("cannot open a directory of the Landlock rules")]
    Path(#[from] ::landlock::PathFdError),
    /// The system call filter could not be built.
    #[error("cannot build the system call filter")]
    Filter(#[from] seccompiler::BackendError),
    /// The system call filter was refused.
    #[error("cannot install the system call filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// Confines the vmm process. From now on it opens only its own accounting in /proc, and creates sockets and removes
/// files only in the directory `sockets`. On a kernel without Landlock (before 5.13) only the system call filter
/// applies.
pub fn confine_vmm(sockets: Option<&Path>) -> Result<(), SandboxError> {
    // Landlock first: the filter allows none of its calls.
    landlock::restrict_vmm(sockets)?;
    seccomp::apply_vmm()
}

/// Confines the network process. From now on it reads only the host's resolver configuration, writes no file, starts no
/// program, creates only IP sockets, and listens only on those that it receives from the backend.
pub fn confine_net() -> Result<(), SandboxError> {
    landlock::restrict_net()?;
    seccomp::apply_net()
}

/// Confines the network process of a tap device. From now on it opens neither files nor sockets.
pub fn confine_tap() -> Result<(), SandboxError> {
    landlock::restrict_tap()?;
    seccomp::apply_tap()
}
