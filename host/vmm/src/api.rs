//! Messages between the backend and its child `bulkhead vmm`.
//!
//! The child inherits one end of a `SOCK_SEQPACKET` socket pair as file descriptor [`bulkhead_ipc::inherited::FD`].
//! Each packet is one JSON object, at most [`MAX_PACKET`] bytes, with at most one descriptor beside it. The backend's
//! first packet is [`Command::Boot`], but for any number of [`Command::VsockOffer`] and at most one [`Command::Shares`]
//! before it. When the socket closes, the VM ends with its backend: the vmm process exits.

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
    /// The serial number that `VIRTIO_BLK_T_GET_ID` returns, at most 20 ASCII bytes (virtio 1.3, 5.2.6).
    pub serial: String,
}

/// The vsock device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vsock {
    /// The guest's context ID, at least 3 (virtio 1.3, 5.10.4).
    pub cid: u32,
    /// Path of the unix socket of the hybrid protocol: host clients send `CONNECT <port>\n` to it. The backend removes
    /// it when the vmm is gone.
    pub socket: PathBuf,
    /// Host clients may listen for connections of the guest there.
    #[serde(default)]
    pub listens: bool,
}

/// A whole virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmConfig {
    /// Number of vCPUs, 1 to 32.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// ELF vmlinux with a PVH note, or a bzImage.
    pub kernel: PathBuf,
    /// The machine's UUID, which the guest finds in SMBIOS.
    pub uuid: Uuid,
    /// Kernel command line; nothing is added to it.
    pub cmdline: String,
    /// Disks in PCI order: the first is `/dev/vda`.
    pub disks: Vec<Disk>,
    /// The vsock device, if any.
    pub vsock: Option<Vsock>,
    /// File or FIFO to which the output of the virtio console, the guest's log, is appended.
    pub console: Option<PathBuf>,
    /// File or FIFO to which the output of a 16550 at port 0x3f8 is appended; without it there is no serial port.
    pub serial: Option<PathBuf>,
}

/// Messages of the backend to the vmm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// Builds the machine and runs it. A descriptor beside this packet, a unix stream to a vhost-user backend, gives it
    /// a network device.
    Boot(Box<VmConfig>),
    /// The descriptor beside this packet becomes the host end of a stream to this guest port.
    VsockConnect {
        /// Guest port.
        port: u32,
    },
    /// The descriptor beside this packet becomes the host end of the guest's next connection to this port of the host.
    /// A connection to a port without an offer is refused. An offer before the boot is there before the guest is.
    VsockOffer {
        /// Host port.
        port: u32,
    },
    /// The descriptor beside this packet is a unix stream to a new backend of the network device; the old one is gone.
    Network,
    /// The descriptor beside this packet is a unix stream to a vhost-user backend of the file system device. Before the
    /// boot it gives the machine that device; afterwards it is a new backend, and the old one is gone.
    Shares,
    /// Requests [`Event::Statistics`].
    Statistics,
    /// Requests [`Event::Sample`].
    Look,
    /// Ends the machine at once, like a power failure.
    Kill,
}

/// The reason for the end of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reason", rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered itself off (ACPI sleep register).
    PowerOff,
    /// The guest reset itself; the backend decides whether to boot again.
    Reset,
    /// The guest kernel panicked: it reset itself after the panic message on the console.
    Panic,
    /// A vCPU shut down (triple fault).
    TripleFault,
    /// The vmm itself or KVM failed.
    Error {
        /// Cause and remedy, for the user.
        message: String,
    },
}

/// Counters of one run.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// VM exits that reached this process, of all vCPUs together, by kind: `port`, `mmio` or `other`.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Resident memory of this process without guest memory, in KiB.
    pub overhead_kib: u64,
    /// Resident guest memory in KiB.
    pub guest_resident_kib: u64,
}

/// The state of a vCPU at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VcpuView {
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// CR3: the page tables in use, which identify the running program.
    pub cr3: u64,
    /// The vCPU runs a program and not the kernel (privilege level 3).
    pub user: bool,
    /// The vCPU is halted until the next interrupt.
    pub halted: bool,
    /// Vectors of interrupts that the local APIC has accepted and not delivered (IRR), ascending.
    pub pending: Vec<u8>,
    /// Vectors of interrupts being served (ISR), ascending.
    pub in_service: Vec<u8>,
}

impl VcpuView {
    /// True if the vCPU accepts interrupts (`RFLAGS.IF`).
    pub fn takes_interrupts(&self) -> bool {
        self.rflags & 1 << 9 != 0
    }

    /// The interrupt that should have been delivered, or completed, by now. Seen in one snapshot only, it may just be
    /// on its way.
    pub fn withheld(&self) -> Option<u8> {
        let (waiting, served) = (self.pending.last(), self.in_service.last());
        // An interrupt waits while one of its own class, the upper four bits of the vector, or of a higher one is
        // served (AMD64 manual, volume 2, 16.6.4).
        let above = waiting.filter(|waiting| served.is_none_or(|served| **waiting >> 4 > *served >> 4));
        let taken = above.filter(|_| self.takes_interrupts() && !self.halted);
        // The kernel ends an interrupt (EOI) before it returns to a program.
        taken.or(served.filter(|_| self.user)).copied()
    }
}

/// The state of the machine at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// The vCPUs in order; `None` for one that could not be interrupted in time.
    pub vcpus: Vec<Option<VcpuView>>,
    /// KVM's counters by their names in Linux: one number for those of the machine, one for each vCPU for those of
    /// vCPUs. Empty where KVM has none for programs, before Linux 5.15.
    pub counters: std::collections::BTreeMap<String, Vec<u64>>,
}

/// Messages of the vmm to the backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Event {
    /// The vCPUs run.
    Started {
        /// Microseconds from the start of the process.
        since_exec_us: u64,
    },
    /// Answer to [`Command::Statistics`].
    Statistics(Statistics),
    /// Answer to [`Command::Look`].
    Sample(Sample),
    /// Writes of the guest wait, because the host has no room for them, or go on.
    NoRoom {
        /// Serial numbers of the disks whose writes wait; empty when all go on.
        disks: Vec<String>,
    },
    /// The machine ended; the last packet.
    Exited(ExitReason),
}
