//! The contenders and how each is started with the same guest.

use std::{
    fs::OpenOptions,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::{Child, Command as Process, Stdio},
    time::Duration,
};

use bulkhead::backend::plan::{DATA_SERIAL, command_line};
use bulkhead_protocol::AGENT_PORT;
use bulkhead_vmm::api::{Command, Disk, Event, Statistics, VmConfig, Vsock};
use support::control;

use crate::Result;

/// Size of the data disk, a new sparse file for each run, in bytes.
const DATA_BYTES: u64 = 16 << 30;

/// A virtual machine monitor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// `bulkhead vmm`.
    Bulkhead,
    /// QEMU's smallest machine type, with PCI Express because that is what the guest has drivers for.
    Microvm,
    /// QEMU's PC.
    Q35,
}

impl Contender {
    /// All, in the order of a round.
    pub const ALL: [Self; 3] = [Self::Bulkhead, Self::Microvm, Self::Q35];

    /// The name of guest memory in the process's list of mappings.
    pub fn guest_mapping(self) -> &'static str {
        match self {
            Self::Bulkhead => "/memfd:guest-memory",
            Self::Microvm | Self::Q35 => "/memfd:memory-backend-memfd",
        }
    }

    /// The guest's vsock context id.
    pub fn cid(self) -> u32 {
        match self {
            Self::Bulkhead => 3,
            Self::Microvm => 0x6268,
            Self::Q35 => 0x6269,
        }
    }
}

impl std::fmt::Display for Contender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Bulkhead => "bulkhead",
            Self::Microvm => "qemu microvm",
            Self::Q35 => "qemu q35",
        })
    }
}

/// The guest that all contenders run, and with what.
#[derive(Debug)]
pub struct Machine {
    /// Our program.
    pub bulkhead: PathBuf,
    /// vmlinux.
    pub kernel: PathBuf,
    /// The root file system; in the network's part one that holds nothing but the endpoint.
    pub rootfs: PathBuf,
    /// Directory of sockets and disks.
    pub directory: PathBuf,
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
}

impl Machine {
    /// The configuration of our VMM with these disks, without vsock.
    pub fn config(&self, cmdline: String, disks: Vec<Disk>, console: &Path) -> VmConfig {
        VmConfig {
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            uuid: uuid::Uuid::nil(),
            kernel: self.kernel.clone(),
            cmdline,
            disks,
            vsock: None,
            console: Some(console.to_owned()),
            serial: None,
        }
    }

    /// Starts our VMM with this configuration, and returns its process with our end of the control sockets, by which it
    /// lives. `network` is the network process's end of the device.
    pub fn boot(
        &self,
        config: VmConfig,
        (ours, theirs): (OwnedFd, OwnedFd),
        network: Option<&OwnedFd>,
    ) -> Result<(Child, OwnedFd)> {
        control::send(&ours, &serde_json::to_vec(&Command::Boot(Box::new(config)))?, network)?;
        let mut process = Process::new(&self.bulkhead);
        process.arg("vmm");
        Ok((spawn(process, Some(&theirs))?, ours))
    }

    /// QEMU's q35 with the endpoint's root file system and a console.
    pub fn endpoint_qemu(&self, cmdline: &str, console: &Path) -> Process {
        let mut qemu = Process::new("qemu-system-x86_64");
        qemu.args(qemu_base("q35", &self.kernel, cmdline, self.cpus, self.memory_mib));
        qemu.args(["-drive", &format!("if=none,id=root,file={},format=raw,readonly=on", self.rootfs.display())]);
        qemu.args(["-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci"]);
        qemu.args(["-device", "virtio-serial-pci,max_ports=2", "-device", "virtconsole,chardev=console"]);
        qemu.args(["-chardev", &format!("file,id=console,path={}", console.display())]);
        qemu
    }
}

/// The command line of a guest whose only process is the endpoint.
pub fn endpoint_command_line() -> String {
    command_line(false).replace("init=/usr/sbin/bulkhead-init", "init=/init")
}

/// The part that all runs have in common.
#[derive(Debug)]
pub struct Setup {
    /// The guest.
    pub machine: Machine,
    /// Set where QEMU can have a vsock device.
    pub vhost_vsock: bool,
}

impl Setup {
    /// The FIFO that a contender writes the guest's console to.
    pub fn console(&self) -> PathBuf {
        self.machine.directory.join("console")
    }

    /// Our vsock device's socket.
    pub fn vsock(&self) -> PathBuf {
        self.machine.directory.join("vsock.sock")
    }

    /// The data disk.
    pub fn data(&self) -> PathBuf {
        self.machine.directory.join("data.img")
    }

    /// Makes an empty data disk.
    pub fn make_data_disk(&self) -> Result<()> {
        Ok(std::fs::File::create(self.data())?.set_len(DATA_BYTES)?)
    }
}

/// Returns whether this user can give a VM the kernel's vsock device.
pub fn vhost_vsock() -> bool {
    OpenOptions::new().read(true).write(true).open("/dev/vhost-vsock").is_ok()
}

/// Our VMM's own account of a run.
#[derive(Debug)]
pub struct OwnAccount {
    /// Microseconds from the process's first instruction to the first entry into the guest.
    pub built_us: u64,
    /// Its counters.
    pub statistics: Statistics,
}

/// A running contender; killed when dropped.
pub struct Running {
    child: Child,
    control: Option<OwnedFd>,
}

impl Running {
    /// Starts the process; it begins to boot at once. `agent` is the host end of the agent's connection to our VMM.
    pub fn start(setup: &Setup, contender: Contender, agent: Option<OwnedFd>) -> Result<Self> {
        match contender {
            Contender::Bulkhead => start_bulkhead(setup, contender, agent),
            Contender::Microvm | Contender::Q35 => {
                let mut process = Process::new("qemu-system-x86_64");
                process.args(qemu_arguments(setup, contender));
                Ok(Self { child: spawn(process, None)?, control: None })
            }
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails once the process has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            Some(status) => Err(format!("the process ended early: {status}").into()),
            None => Ok(()),
        }
    }

    /// Reads the statistics of our VMM; `None` for QEMU.
    pub fn own_account(&self) -> Result<Option<OwnAccount>> {
        let Some(control) = &self.control else { return Ok(None) };
        send(control, &Command::Statistics)?;
        let mut built_us = 0;
        loop {
            match receive(control)? {
                Event::Started { since_exec_us } => built_us = since_exec_us,
                Event::Statistics(statistics) => return Ok(Some(OwnAccount { built_us, statistics })),
                Event::Sample(_) | Event::NoRoom { .. } => {}
                Event::Exited(reason) => return Err(format!("the machine ended: {reason:?}").into()),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start_bulkhead(setup: &Setup, contender: Contender, agent: Option<OwnedFd>) -> Result<Running> {
    let pair = control::pair()?;
    let disks = vec![disk(&setup.machine.rootfs, true, "rootfs"), disk(&setup.data(), false, DATA_SERIAL)];
    let config = VmConfig {
        vsock: Some(Vsock { cid: contender.cid(), socket: setup.vsock(), listens: false }),
        ..setup.machine.config(command_line(false), disks, &setup.console())
    };
    // The packets wait in the socket, so the process has its machine at the first reads.
    if let Some(agent) = agent {
        let offer = serde_json::to_vec(&Command::VsockOffer { port: AGENT_PORT })?;
        control::send(&pair.0, &offer, Some(&agent))?;
    }
    let (child, control) = setup.machine.boot(config, pair, None)?;
    Ok(Running { child, control: Some(control) })
}

/// A disk of our VMM.
pub fn disk(path: &Path, readonly: bool, serial: &str) -> Disk {
    Disk { path: path.to_owned(), readonly, serial: serial.to_owned() }
}

fn qemu_arguments(setup: &Setup, contender: Contender) -> Vec<String> {
    let machine = match contender {
        // The guest's drivers are for virtio over PCI and its CPUs come from ACPI. What it can do without is off; the
        // clock is not among that: without it the guest polls for one, with more exits than for all of its start.
        Contender::Microvm => "microvm,acpi=on,pcie=on,rtc=on,pic=off,pit=off,isa-serial=off",
        _ => "q35",
    };
    let cmdline = command_line(false);
    let mut arguments =
        qemu_base(machine, &setup.machine.kernel, &cmdline, setup.machine.cpus, setup.machine.memory_mib);
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    for (id, path, flags) in [("rootfs", &setup.machine.rootfs, ",readonly=on"), (DATA_SERIAL, &setup.data(), "")] {
        option("-drive", format!("if=none,id={id},file={},format=raw,discard=unmap{flags}", path.display()));
        option("-device", format!("virtio-blk-pci,drive={id},serial={id}"));
    }
    if setup.vhost_vsock {
        option("-device", format!("vhost-vsock-pci,guest-cid={}", contender.cid()));
    }
    option("-device", "virtio-rng-pci".to_owned());
    option("-device", "virtio-serial-pci,max_ports=2".to_owned());
    option("-chardev", format!("file,id=console,path={}", setup.console().display()));
    option("-device", "virtconsole,chardev=console".to_owned());
    arguments
}

/// A machine without devices.
fn qemu_base(machine: &str, kernel: &Path, cmdline: &str, cpus: u8, memory_mib: u64) -> Vec<String> {
    let mut arguments: Vec<String> =
        ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-cpu", "host"].map(String::from).into();
    let mut option = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
    option("-machine", format!("{machine},accel=kvm,memory-backend=ram"));
    option("-smp", cpus.to_string());
    option("-m", format!("{memory_mib}M"));
    option("-object", format!("memory-backend-memfd,id=ram,size={memory_mib}M,share=on"));
    option("-kernel", kernel.display().to_string());
    option("-append", cmdline.to_owned());
    arguments
}

/// Starts a process that says nothing but errors and dies with this one.
pub fn spawn(mut process: Process, socket: Option<&OwnedFd>) -> Result<Child> {
    process.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    control::spawn(&mut process, socket)
        .map_err(|error| format!("cannot start {}: {error}", process.get_program().display()).into())
}

fn send(socket: &OwnedFd, command: &Command) -> Result<()> {
    Ok(control::send(socket, &serde_json::to_vec(command)?, None)?)
}

fn receive(socket: &OwnedFd) -> Result<Event> {
    match control::receive(socket, Duration::from_secs(10)) {
        Ok(event) => event.ok_or_else(|| "the vmm process closed its control socket".into()),
        Err(error) if error.kind() == io::ErrorKind::TimedOut => Err("the vmm process does not answer".into()),
        Err(error) => Err(error.into()),
    }
}
