//! Confinement of the host's processes by seccomp and Landlock, with one list of permissions for each process.
//!
//! A process confines itself once it has opened what it needs, before it handles the guest's data. Both mechanisms
//! apply to the calling thread and to the threads that it starts later, so a process does this before it starts any.
//! Neither can be undone.
//!
//! All of them write no core, cannot be traced by other processes of the user, execute no memory that was ever
//! writable, and send signals only to their own threads.

mod landlock;
mod process;
mod rules;
mod seccomp;
#[cfg(test)]
mod tests;

use std::{io, os::fd::BorrowedFd};

/// An error in confining the process.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A property of the process could not be set.
    #[error("cannot {what}")]
    Process {
        /// The operation: a verb and its object.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The file system rules were refused.
    #[error("cannot apply the Landlock rules")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The system call filter could not be built.
    #[error("cannot build the system call filter")]
    Filter(#[from] seccompiler::BackendError),
    /// The system call filter was refused.
    #[error("cannot install the system call filter")]
    Seccomp(#[from] seccompiler::Error),
}

/// Confines the vmm process. From now on it opens no file, makes no socket, connects to nothing, starts threads but no
/// program, and makes those requests to KVM that the thread of a vCPU needs. On a kernel without Landlock (before 5.13)
/// the system call filter says the same.
///
/// The threads of vCPUs start those of devices, which inherit their filter. So theirs is the one of the process, and
/// every other thread narrows it with [`confine_vmm_thread`].
pub fn confine_vmm() -> Result<(), SandboxError> {
    process::harden()?;
    // Landlock first: the filter allows none of its calls.
    landlock::restrict_all()?;
    seccomp::apply_vmm()
}

/// Confines a thread of the vmm that is not a vCPU's further. From now on it makes no request to KVM or to any other
/// device, and starts no thread.
pub fn confine_vmm_thread() -> Result<(), SandboxError> {
    seccomp::apply_vmm_thread()
}

/// Confines the network process. From now on it reads only the host's resolver configuration, writes no file, starts no
/// program or thread, makes only TCP, UDP and ping sockets, and listens only on those that it receives from the
/// backend.
pub fn confine_net() -> Result<(), SandboxError> {
    process::harden()?;
    landlock::restrict_net()?;
    seccomp::apply_net()
}

/// A directory that stays within reach of the share process.
pub struct Shared<'a> {
    /// The directory, which may be open as a place only (`O_PATH`).
    pub directory: BorrowedFd<'a>,
    /// Nothing in it is changed.
    pub read_only: bool,
}

/// Confines the share process. From now on it opens only what is in the shared directories, without executing any of
/// it, makes no socket and connects to nothing, starts threads but no program.
///
/// Landlock does not cover changes of modes, owners, times and extended attributes. For them the process has only those
/// calls that take the descriptor of an open file, which is one that Landlock let it open. It has no form of them with
/// `AT_EMPTY_PATH` and none for paths below `/proc/self/fd`: these accept a file that is open as a place only
/// (`O_PATH`), as any file of the user can be. So it cannot change the mode of a socket or the times of a link.
/// Attributes can be looked at by any path, and so can be, with inotify, whether a file changes that the user may read.
///
/// Linux before 5.19 cannot rename between directories under Landlock; there the system call filter is the only one.
///
/// With `locks` it may lock the files that it has opened.
pub fn confine_share(shares: &[Shared<'_>], locks: bool) -> Result<(), SandboxError> {
    process::harden()?;
    landlock::restrict_share(shares)?;
    seccomp::apply_share(locks)
}

/// Confines a thread of the share process further. From now on it starts no thread. Every thread of the process does
/// this, the one that starts the others as the last.
pub fn confine_share_thread(locks: bool) -> Result<(), SandboxError> {
    seccomp::apply_share_thread(locks)
}

/// Confines the network process of a tap device. From now on it opens neither files nor sockets.
pub fn confine_tap() -> Result<(), SandboxError> {
    process::harden()?;
    landlock::restrict_all()?;
    seccomp::apply_tap()
}
