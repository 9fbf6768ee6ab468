//! Builds a machine and runs it.

use std::{
    collections::BTreeMap,
    fs::File,
    os::{fd::OwnedFd, unix::net::UnixStream},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use kvm_bindings::{KVM_CAP_PMU_CAPABILITY, KVM_PMU_CAP_DISABLE, kvm_enable_cap};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    api::{ExitReason, Sample, Statistics, VmConfig},
    boot,
    bus::{Bus, BusDevice},
    cpuid,
    error::{VmmError, host, kvm},
    exit::ExitSignal,
    files::{Files, open_failed},
    interrupts::GsiRouter,
    kvm_counters::KvmCounters,
    layout,
    memory::{self, GuestRam},
    memory_usage::MemoryUsage,
    room::RoomSignal,
    vcpu::{self, Buses, ExitCounters, Shared},
    vcpu_state,
};
use crate::devices::{
    pci_root::PciRoot,
    power::{self, Power},
    serial::{self, SerialPort},
    virtio::{
        VirtioDevice,
        block::Block,
        console::{Console, ConsoleLog, LogWriter, Pending},
        fs, net,
        pci::{BAR_SIZE, VirtioPci},
        rng::Rng,
        spawn_confined,
        vhost_user::{LinkError, Successors, VhostUser, VhostUserHandle},
        vsock::{Vsock, VsockHandle},
    },
};
use bulkhead_ipc::{report::chain, sandbox};

/// Maximum number of vCPUs, see [`VmConfig::cpus`].
const MAX_CPUS: u8 = 32;

/// Time for the guest's last output to reach its files when the machine has ended.
const LOG_TIMEOUT: Duration = Duration::from_secs(2);

/// A running machine.
pub(super) struct Machine {
    usage: MemoryUsage,
    counters: KvmCounters,
    vcpus: Vec<Arc<Shared>>,
    console: Arc<Mutex<ConsoleLog>>,
    logs: Vec<Pending>,
    vsock: Option<VsockHandle>,
    net: Option<Successors>,
    shares: Option<Successors>,
    exit: ExitSignal,
    room: RoomSignal,
    /// The locks of the disks, held as long as the machine.
    _locks: Vec<File>,
}

/// Streams of the backend's for a machine that is about to start.
#[derive(Default)]
pub(super) struct Streams {
    /// To the backend of a network device.
    pub(super) network: Option<OwnedFd>,
    /// To the backend of a file system device.
    pub(super) shares: Option<OwnedFd>,
    /// For the guest's connections to ports of the host.
    pub(super) offers: Vec<(u32, OwnedFd)>,
}

/// A machine under construction.
struct Board {
    vm: Arc<VmFd>,
    memory: Arc<GuestRam>,
    router: Arc<GsiRouter>,
    ports: Bus,
    mmio: Bus,
    pci: PciRoot,
    exit: ExitSignal,
    /// Writers of the logs, whose threads start once the process is confined.
    logs: Vec<LogWriter>,
    /// Virtio devices so far, each with a BAR.
    slots: u64,
}

impl Machine {
    /// Builds the machine and starts its vCPUs.
    pub(super) fn start(config: &VmConfig, streams: Streams) -> Result<Self, VmmError> {
        if !(1..=MAX_CPUS).contains(&config.cpus) {
            return Err(VmmError::VcpuCount(config.cpus));
        }
        // Files first: a missing one is the user's to mend, and found before anything costs time.
        let files = Files::open(config)?;
        let kvm_fd = Kvm::new().map_err(VmmError::OpenKvm)?;
        let vm = create_vm(&kvm_fd)?;
        let memory = Arc::new(memory::create(config.memory_mib)?);
        memory::register(&vm, &memory)?;
        let exit = ExitSignal::new().map_err(host("create an eventfd"))?;
        let room = RoomSignal::new().map_err(host("create an eventfd"))?;
        let mut board = Board::new(vm, memory, exit.clone());
        let console = Arc::new(Mutex::new(board.log(files.console)));
        board.plug_platform(files.serial)?;
        // The order of the devices is that of their PCI slots, and the first disk is the guest's /dev/vda.
        for (file, readonly, name) in files.disks {
            let block = Block::new(file, readonly, &name, config.cpus.into(), room.clone());
            let block = block.map_err(host("prepare a disk"))?;
            board.plug_virtio(Box::new(block))?;
        }
        let vsock = match &config.vsock {
            None => None,
            Some(vsock) => {
                let (device, handle) = Vsock::new(vsock.cid, &vsock.socket, vsock.listens)
                    .map_err(|source| open_failed("the vsock socket", &vsock.socket, source))?;
                // The handle stays here, for the connections that the backend hands over.
                board.plug_virtio(Box::new(device))?;
                for (port, stream) in streams.offers {
                    handle.offer(port, stream);
                }
                Some(handle)
            }
        };
        board.plug_virtio(Box::new(Rng::default()))?;
        board.plug_virtio(Box::new(Console::new(Arc::clone(&console))))?;
        // Last, so that the other devices have the same slots in a machine without these.
        let net = board.plug_served("a network", net::connect, streams.network)?;
        let shares = board.plug_served("shared directories", fs::connect, streams.shares)?;
        let entry = boot::load(&board.memory, config)?;
        let vcpus = board.create_vcpus(&kvm_fd, config.cpus, entry)?;
        vcpu_state::prepare().map_err(host("install a signal handler"))?;
        let usage = MemoryUsage::open(&board.memory);
        let counters = KvmCounters::open(&board.vm, &vcpus);
        // Everything is open, and KVM knows the whole machine. The sandbox applies to threads that start later, so
        // those that handle the guest's data, vCPUs and devices, all run confined.
        sandbox::confine_vmm()?;
        let logs = board.start_logs()?;
        let follow = |device: VhostUserHandle| device.follow(&exit).map_err(host("start a thread"));
        let (net, shares) = (net.map(follow).transpose()?, shares.map(follow).transpose()?);
        let vcpus = board.run(vcpus)?;
        // From here on this thread moves messages and descriptors. Threads of devices are started by those of vCPUs.
        sandbox::confine_vmm_thread()?;
        Ok(Self { usage, counters, vcpus, console, logs, vsock, net, shares, exit, room, _locks: files.locks })
    }

    /// The signal that is raised when the machine ends.
    pub(super) fn exit(&self) -> &ExitSignal {
        &self.exit
    }

    /// The disks that wait for room on the host.
    pub(super) fn room(&self) -> &RoomSignal {
        &self.room
    }

    /// The vsock device's handle, if the machine has one.
    pub(super) fn vsock(&self) -> Option<&VsockHandle> {
        self.vsock.as_ref()
    }

    /// The way to the network device for its next backends, if the machine has one.
    pub(super) fn net(&self) -> Option<&Successors> {
        self.net.as_ref()
    }

    /// The way to the file system device for its next backends, if the machine has one.
    pub(super) fn shares(&self) -> Option<&Successors> {
        self.shares.as_ref()
    }

    /// The counters at this moment.
    pub(super) fn statistics(&self) -> Statistics {
        let sum = |pick: fn(&ExitCounters) -> &std::sync::atomic::AtomicU64| {
            self.vcpus.iter().map(|vcpu| pick(&vcpu.exits).load(Ordering::Relaxed)).sum()
        };
        let exits = BTreeMap::from([
            ("port".to_owned(), sum(|c| &c.port)),
            ("mmio".to_owned(), sum(|c| &c.mmio)),
            ("other".to_owned(), sum(|c| &c.other)),
        ]);
        let (guest_resident_kib, overhead_kib) = self.usage.resident_kib();
        Statistics { exits, overhead_kib, guest_resident_kib }
    }

    /// The state of each vCPU, see [`vcpu_state::snapshot_all`], and KVM's counters.
    pub(super) fn sample(&self) -> Sample {
        let slots: Vec<_> = self.vcpus.iter().map(|vcpu| &vcpu.snapshot).collect();
        Sample { vcpus: vcpu_state::snapshot_all(&slots), counters: self.counters.read() }
    }

    /// Waits a moment for the guest's last output to reach its files.
    pub(super) fn flush_logs(&self) {
        self.logs.iter().for_each(|log| log.flush(LOG_TIMEOUT));
    }

    /// Distinguishes a reset after a kernel panic from one that the guest asked for.
    pub(super) fn classify(&self, reason: ExitReason) -> ExitReason {
        let mut log = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        // The guest's command line has `panic=-1`: the kernel resets the machine right after its message.
        if reason == ExitReason::Reset && log.panicked() { ExitReason::Panic } else { reason }
    }
}

impl Board {
    fn new(vm: Arc<VmFd>, memory: Arc<GuestRam>, exit: ExitSignal) -> Self {
        let router = GsiRouter::new(Arc::clone(&vm));
        let (ports, mmio, pci) = (Bus::default(), Bus::default(), PciRoot::new());
        Self { vm, memory, router, ports, mmio, pci, exit, logs: Vec::new(), slots: 0 }
    }

    /// Creates a log of the guest's output.
    fn log(&mut self, file: Option<File>) -> ConsoleLog {
        let (log, writer) = ConsoleLog::new(file);
        self.logs.extend(writer);
        log
    }

    /// Starts the threads that write the logs.
    fn start_logs(&mut self) -> Result<Vec<Pending>, VmmError> {
        let start = |writer: LogWriter| {
            let pending = writer.pending();
            spawn_confined("log", &self.exit, move || {
                writer.run();
                Ok(())
            })
            .map(|_| pending)
        };
        std::mem::take(&mut self.logs).into_iter().map(start).collect::<Result<_, _>>().map_err(host("start a thread"))
    }

    /// Adds the devices that are not on the PCI bus: the power registers and, on request, a serial port.
    fn plug_platform(&mut self, serial: Option<File>) -> Result<(), VmmError> {
        let power = Arc::new(Mutex::new(Power::new(self.exit.clone())));
        self.ports.insert(u64::from(layout::POWER_PORT), power::LEN, power)?;
        if let Some(output) = serial {
            let line = EventFd::new(EFD_NONBLOCK).map_err(host("create an eventfd"))?;
            self.vm.register_irqfd(&line, layout::SERIAL_GSI).map_err(kvm("attach an irqfd"))?;
            // Its output is bounded like that of the console.
            let port = Arc::new(Mutex::new(SerialPort::new(line, self.log(Some(output)))));
            self.ports.insert(u64::from(layout::SERIAL_PORT), serial::LEN, port)?;
        }
        Ok(())
    }

    fn plug_virtio(&mut self, device: Box<dyn VirtioDevice>) -> Result<(), VmmError> {
        // BARs have fixed addresses, one after the other in the window that the DSDT names. The guest keeps them.
        let bar = layout::PCI_MMIO_START + self.slots * BAR_SIZE;
        self.slots += 1;
        let function =
            VirtioPci::new(device, Arc::clone(&self.memory), &self.vm, &self.router, bar, self.exit.clone())?;
        self.mmio.insert(bar, BAR_SIZE, Arc::clone(&function) as Arc<Mutex<dyn BusDevice>>)?;
        self.pci.plug(function).map(|_| ()).ok_or(VmmError::TooManyDevices)
    }

    /// Adds a device that another process serves, if there is a stream to one. Without a usable process the machine
    /// starts without the device, which gives it `what`.
    fn plug_served(
        &mut self,
        what: &str,
        connect: fn(UnixStream) -> Result<(VhostUser, VhostUserHandle), LinkError>,
        stream: Option<OwnedFd>,
    ) -> Result<Option<VhostUserHandle>, VmmError> {
        let Some(stream) = stream else { return Ok(None) };
        match connect(stream.into()) {
            Ok((device, handle)) => {
                self.plug_virtio(Box::new(device))?;
                Ok(Some(handle))
            }
            // The guest can still report, be stopped and keep its data.
            Err(error) => {
                tracing::warn!(error = %chain(&error), "starting the machine without {what}");
                Ok(None)
            }
        }
    }

    /// Creates the vCPUs.
    fn create_vcpus(&self, kvm_fd: &Kvm, cpus: u8, entry: boot::Entry) -> Result<Vec<VcpuFd>, VmmError> {
        let supported = cpuid::supported(kvm_fd)?;
        let mut vcpus = Vec::new();
        for id in 0..cpus {
            let vcpu = self.vm.create_vcpu(u64::from(id)).map_err(kvm("create a vCPU"))?;
            vcpu.set_cpuid2(&cpuid::for_vcpu(&supported, id, cpus)?).map_err(kvm("set CPU features"))?;
            boot::set_msrs(&vcpu)?;
            // The first vCPU starts at the kernel's entry point. The others are as after a reset: they wait until the
            // kernel wakes them by INIT and SIPI, which KVM handles.
            if id == 0 {
                boot::set_registers(&vcpu, &self.memory, entry)?;
            }
            vcpus.push(vcpu);
        }
        Ok(vcpus)
    }

    /// Starts the vCPUs.
    fn run(mut self, vcpus: Vec<VcpuFd>) -> Result<Vec<Arc<Shared>>, VmmError> {
        // The bus is complete: only now can its configuration space be placed, behind the one lock of ECAM.
        let pci = Arc::new(Mutex::new(self.pci));
        self.mmio.insert(layout::PCI_ECAM_START, layout::PCI_ECAM_SIZE, pci)?;
        let buses = Arc::new(Buses { ports: self.ports, memory: self.mmio });
        // Threads start only once all vCPUs exist, since the first one may wake the others at any time.
        let mut running = Vec::new();
        for (id, vcpu) in (0..).zip(vcpus) {
            let shared = Arc::new(Shared::default());
            running.push(Arc::clone(&shared));
            vcpu::spawn(id, vcpu, Arc::clone(&buses), shared, self.exit.clone())?;
        }
        Ok(running)
    }
}

/// Creates an empty VM with KVM's interrupt controllers.
fn create_vm(kvm_fd: &Kvm) -> Result<Arc<VmFd>, VmmError> {
    for (capability, name) in
        [(Cap::Irqfd, "irqfd"), (Cap::Ioeventfd, "ioeventfd"), (Cap::IrqRouting, "interrupt routing")]
    {
        if !kvm_fd.check_extension(capability) {
            return Err(VmmError::KvmCapability(name));
        }
    }
    let vm = loop {
        match kvm_fd.create_vm() {
            // KVM_CREATE_VM can be interrupted by a signal.
            Err(error) if error.errno() == libc::EINTR => {}
            other => break other.map_err(kvm("create a VM"))?,
        }
    };
    // Intel processors need three pages of guest-physical addresses for real mode, which no memory or device may have
    // (KVM API, KVM_SET_TSS_ADDR).
    vm.set_tss_address(layout::TSS_START as usize).map_err(kvm("set the TSS address"))?;
    // An I/O APIC, and a local APIC for each vCPU that is created after this call. Also a PIC, which no table mentions.
    // There is no PIT: the guest's clock events come from the local APICs.
    vm.create_irq_chip().map_err(kvm("create an interrupt controller"))?;
    // No performance counters: much less of KVM is in reach of a hostile guest. A KVM that cannot turn them off (before
    // Linux 5.18) at least does not announce them (see `cpuid`).
    if vm.check_extension_raw(u64::from(KVM_CAP_PMU_CAPABILITY)) as u32 & KVM_PMU_CAP_DISABLE != 0 {
        let off = kvm_enable_cap {
            cap: KVM_CAP_PMU_CAPABILITY,
            args: [u64::from(KVM_PMU_CAP_DISABLE), 0, 0, 0],
            ..Default::default()
        };
        vm.enable_cap(&off).map_err(kvm("turn off performance counters"))?;
    }
    Ok(Arc::new(vm))
}
