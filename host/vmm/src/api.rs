//! What the backend and its child `bulkhead vmm` say to each other.
//!
//! The child inherits one end of a `SOCK_SEQPACKET` socket pair as file descriptor [`bulkhead_ipc::inherited::FD`]. Each packet is one
//! JSON object, at most [`MAX_PACKET`] bytes, with at most one descriptor beside it. The backend's first packet is
//! [`Command::Boot`]. When the socket closes, the VM ends with its backend: the vmm process exits.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest packet in bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// A virtio-blk device over a raw file; the format is never probed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The raw image or block device.
    pub path: PathBuf,
    /// Opened read-only and offered with `VIRTIO_BLK_F_RO`.
    pub readonly: bool,
    /// What `VIRTIO_BLK_T_GET_ID` answers, at most 20 ASCII bytes (virtio 1.3, 5.2.6).
    pub serial: String,
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's context id, at least 3.
    pub cid: u32,
    /// Unix socket of the hybrid protocol: `CONNECT <port>\n` in, `<socket>_<port>` out.
    pub socket: PathBuf,
}

/// A whole virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// ELF vmlinux with a PVH note, or a bzImage.
    pub kernel: PathBuf,
    /// The machine's id, which SMBIOS tells the guest.
    pub uuid: Uuid,
    /// Kernel command line, complete but for what the devices add themselves.
    pub cmdline: String,
    /// Disks in PCI order: the first is `/dev/vda`.
    pub disks: Vec<Disk>,
    /// The vsock device, if any.
    pub vsock: Option<Vsock>,
    /// File (or FIFO) to which the virtio console, the guest's log, is appended.
    pub console: Option<PathBuf>,
    /// File (or FIFO) to which a 16550 at 0x3f8 writes; no UART exists without it.
    pub serial: Option<PathBuf>,
}

/// Backend to vmm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// Build the machine and run it. A descriptor beside this packet gives it a network device: a unix stream to the
    /// device's vhost-user backend.
    Boot(Box<VmConfig>),
    /// The descriptor beside this packet becomes the host end of a stream to this guest port.
    VsockConnect {
        /// Guest port.
        port: u32,
    },
    /// The descriptor beside this packet leads to a new backend of the network device; the old one is gone.
    Network,
    /// Ask for [`Event::Statistics`].
    Statistics,
    /// Ask for [`Event::Vcpus`].
    Look,
    /// End the machine at once, as if the power failed.
    Kill,
}

/// Why the machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off (ACPI sleep register).
    PowerOff,
    /// The guest reset itself; the backend decides whether to boot again.
    Reset,
    /// The guest kernel panicked: it reset after writing its last words to the console.
    Panic,
    /// A vCPU shut down (triple fault).
    TripleFault,
    /// The vmm itself or KVM failed.
    Error {
        /// Cause and remedy, for a person.
        message: String,
    },
}

/// Counters of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// VM exits by kind (`io`, `mmio`, `hlt`, …), all vCPUs together.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Resident memory of this process beyond guest memory, in KiB.
    pub overhead_kib: u64,
    /// Resident guest memory in KiB.
    pub guest_resident_kib: u64,
}

/// Where a vCPU is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuView {
    /// Its instruction pointer.
    pub rip: u64,
    /// Its flags.
    pub rflags: u64,
    /// The page tables that it uses, which tells programs apart.
    pub cr3: u64,
    /// It runs a program and not the kernel (privilege level 3).
    pub user: bool,
    /// It sleeps until an interrupt.
    pub halted: bool,
    /// Vectors of interrupts that its local APIC holds back (IRR).
    pub pending: Vec<u8>,
    /// Vectors of interrupts that it serves (ISR).
    pub in_service: Vec<u8>,
}

impl VcpuView {
    /// Whether it lets interrupts in (`RFLAGS.IF`).
    pub fn takes_interrupts(&self) -> bool {
        self.rflags & 1 << 9 != 0
    }

    /// The interrupt that should reach the vCPU, or be over, right now; seen once it may just be on its way.
    pub fn withheld(&self) -> Option<u8> {
        let (waiting, served) = (self.pending.last(), self.in_service.last());
        // Of the same class, the upper four bits, one waits for the other (AMD64 manual, volume 2, 16.6.4).
        let above = waiting.filter(|waiting| served.is_none_or(|served| **waiting >> 4 > *served >> 4));
        let taken = above.filter(|_| self.takes_interrupts() && !self.halted);
        taken.or(served.filter(|_| self.user)).copied()
    }
}

/// vmm to backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// All vCPUs entered the guest.
    Started {
        /// Microseconds from the start of the process to the first `KVM_RUN`.
        since_exec_us: u64,
    },
    /// Answer to [`Command::Statistics`].
    Statistics(Statistics),
    /// Answer to [`Command::Look`].
    Vcpus {
        /// Each vCPU in order; `None` for one that could not be stopped for it.
        views: Vec<Option<VcpuView>>,
    },
    /// The machine ended; the last packet.
    Exited(ExitReason),
}
