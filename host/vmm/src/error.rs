//! Errors of building and running a machine.

use std::{io, os::fd::RawFd, path::PathBuf};

use super::{bus::Overlap, devices::pci_root, layout};

/// An error that keeps the machine from starting or ends it. The backend shows it to the user as the reason.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// /dev/kvm could not be opened.
    #[error(
        "cannot open /dev/kvm; add yourself to the group that owns it (usually: sudo usermod -aG kvm $USER) and log in again"
    )]
    OpenKvm(#[source] kvm_ioctls::Error),
    /// This KVM lacks something that every supported kernel has.
    #[error("this host's KVM does not support {0}; Linux 5.10 or newer is required")]
    KvmCapability(&'static str),
    /// A KVM call failed.
    #[error("KVM failed to {what}")]
    Kvm {
        /// The operation: a verb and its object.
        what: &'static str,
        /// KVM's error.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// The host cannot provide this much memory, or no machine has this size.
    #[error("cannot allocate {mib} MiB of guest memory; try a smaller --memory")]
    Memory {
        /// The size in MiB.
        mib: u64,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// KVM did not take a model-specific register.
    #[error("KVM refuses to set MSR {0:#x}, which every supported processor has; update the host's kernel")]
    Msr(u32),
    /// Guest memory could not be mapped into this process.
    #[error("cannot map guest memory")]
    MapMemory(#[source] vm_memory::mmap::FromRangesError),
    /// A boot structure lies outside of guest memory or is larger than its area.
    #[error("{0} does not fit into guest memory")]
    GuestMemory(&'static str),
    /// Two devices were given the same address.
    #[error("two devices have the same address")]
    Address(#[from] Overlap),
    /// The PCI bus has no free slot.
    #[error("too many PCI devices: at most {} are possible", pci_root::SLOTS - 1)]
    TooManyDevices,
    /// An interrupt has no entry in the routing table.
    #[error("GSI {0} has no interrupt route")]
    UnknownGsi(u32),
    /// Another process writes to the disk.
    #[error(
        "the disk {} is in use by another process, perhaps a machine that has not ended yet; try again in a moment, and if \
         it stays in use end that process (`sudo fuser` shows it)",
        path.display()
    )]
    DiskInUse {
        /// The image or block device.
        path: PathBuf,
    },
    /// The disk could not be locked.
    #[error("cannot lock the disk {}; put it on a file system that supports locks", path.display())]
    LockDisk {
        /// The image or block device.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The kernel image could not be read.
    #[error("cannot read the kernel image {}", path.display())]
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
    /// The kernel command line is too long.
    #[error("the kernel command line is too long: at most {} bytes are possible", layout::MAX_CMDLINE - 1)]
    CmdlineTooLong,
    /// The number of vCPUs is out of range.
    #[error("invalid CPU count {0}: must be 1-32")]
    VcpuCount(u8),
    /// A file of the machine could not be opened, or a socket could not be bound.
    #[error("cannot open {what} {}", path.display())]
    OpenFile {
        /// The file's purpose, with an article.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The host refused a thread, descriptor or event.
    #[error("cannot {what}")]
    Host {
        /// The operation: a verb and its object.
        what: &'static str,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The process was not started by a backend.
    #[error("descriptor {0} is not a SOCK_SEQPACKET socket; `bulkhead vmm` is started by the backend")]
    NoControlSocket(RawFd),
    /// A packet of the backend could not be received or read.
    #[error("cannot receive a command from the backend")]
    Receive(#[from] bulkhead_ipc::channel::PacketError),
    /// The backend's first packet does not describe a machine.
    #[error("the backend's first command is not `boot`")]
    NotBoot,
    /// The sandbox could not be entered.
    #[error("cannot confine the vmm process")]
    Sandbox(#[from] bulkhead_ipc::sandbox::SandboxError),
}

/// Wraps a KVM error together with the operation that failed.
pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmmError {
    move |source| VmmError::Kvm { what, source }
}

/// Wraps an I/O error together with the operation that failed.
pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Host { what, source }
}
