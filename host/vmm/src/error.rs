//! What can go wrong while a machine is built or run.

use std::{io, path::PathBuf};

/// The vmm's error.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// /dev/kvm could not be opened.
    #[error(
        "/dev/kvm cannot be opened; add yourself to the group that owns it (usually: sudo usermod -aG kvm $USER) and log in again"
    )]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// This KVM lacks something that every supported kernel has.
    #[error("this KVM lacks {0}; a Linux kernel of 5.10 or newer is needed")]
    KvmCapability(&'static str),
    /// A KVM call failed.
    #[error("KVM refused to {what}")]
    Kvm {
        /// What was asked, as the end of a sentence.
        what: &'static str,
        /// KVM's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// Guest memory could not be made.
    #[error("{mib} MiB of guest memory cannot be had; ask for less with --memory")]
    Memory {
        /// Size asked for.
        mib: u64,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Guest memory could not be mapped.
    #[error("guest memory cannot be mapped")]
    MapMemory(#[source] vm_memory::mmap::FromRangesError),
    /// Something does not fit where it belongs in guest memory.
    #[error("{0} does not fit into guest memory")]
    GuestMemory(&'static str),
    /// The kernel image could not be read.
    #[error("the kernel image {} cannot be read", path.display())]
    OpenKernel {
        /// The image.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The kernel image could not be loaded.
    #[error("{} is neither an ELF kernel nor a bzImage, or it is truncated; build it again with scripts/image", path.display())]
    LoadKernel {
        /// The image.
        path: PathBuf,
        /// The loader's error.
        #[source]
        source: linux_loader::loader::Error,
    },
    /// An ELF kernel has no PVH entry point.
    #[error("{} has no PVH entry point; build the kernel with CONFIG_PVH=y", path.display())]
    NoPvhEntry {
        /// The image.
        path: PathBuf,
    },
    /// The command line is too long.
    #[error("the kernel command line is longer than {} bytes", super::layout::MAX_CMDLINE - 1)]
    CmdlineTooLong,
    /// A number of vCPUs out of range.
    #[error("{0} vCPUs were asked for; 1 to 32 are possible")]
    VcpuCount(u8),
    /// A file of the machine could not be opened.
    #[error("{what} {} cannot be opened", path.display())]
    OpenFile {
        /// What it is.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The host refused a thread, descriptor or event.
    #[error("the host refused {what}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The control socket gave no usable configuration.
    #[error("the control socket gave no usable configuration: {0}")]
    Control(String),
    /// The sandbox could not be entered.
    #[error("the vmm process cannot confine itself")]
    Sandbox(#[from] bulkhead_ipc::sandbox::SandboxError),
}

/// Turns a KVM error into ours, saying what was asked.
pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmmError {
    move |source| VmmError::Kvm { what, source }
}

/// Turns an I/O error into ours, saying what was asked for.
pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Host { what, source }
}
