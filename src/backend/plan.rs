//! The plan of a VM, from settings, options, policy and host; every check that needs no VM is made here.
//!
//! `bulkhead start` makes a plan before it starts a backend, only to report errors early, and the backend makes one at
//! each boot. A plan changes nothing on the host. It has two parts: the machine for the vmm ([`Plan::machine`]) and the
//! configuration for the agent, in the form in which the protocol carries it.

use std::{fmt, path::PathBuf};

use bulkhead_protocol::{Configuration, TimeZone};

use crate::{
    image::{Image, ImageError},
    root_owned::{self, NotRoots},
    settings::{Paths, Policy, PortBinding, Settings, SettingsError},
};
use bulkhead_vmm::api::{Disk, VmConfig, Vsock};

use super::{
    api::StartOptions,
    certificates,
    data_format::{self, DataFormatError},
    disk::{DiskError, DiskPlan},
    host::{self, HostError},
    host_sockets::{self, HostSocket},
    image_names,
    network::{NetworkError, NetworkPlan},
    ports::vm::VmPortsPlan,
    proxy,
    shares::SharesPlan,
    time_zone::{self, UnknownZone},
};

/// The guest's kernel command line, but for its clock.
const CMDLINE: &str = "console=hvc0 root=/dev/vda rootfstype=erofs ro init=/usr/sbin/bulkhead-init panic=-1 quiet \
                       loglevel=4 8250.nr_uarts=0 i8042.noaux no_timer_check rcupdate.rcu_expedited=1 \
                       random.trust_cpu=on cryptomgr.notests pci=noearly mitigations=auto";

/// Options that keep the kernel silent and from probing for a UART.
const QUIET: &str = "quiet loglevel=4 8250.nr_uarts=0";
/// Their replacement in a VM with a serial port.
const SERIAL: &str = "console=ttyS0 8250.nr_uarts=1";

/// Lets the guest take the TSC as its clock without watching it.
const TSC: &str = "tsc=reliable";
/// Makes the guest read the host's clock through KVM, on a host that does not trust its TSC: the guest has nothing to
/// watch it by, and would trust it.
const NO_TSC: &str = "clocksource=kvm-clock";

/// virtio-blk serial of the data disk, by which init finds it.
pub const DATA_SERIAL: &str = "data";

/// The guest's vsock context id. Each VM has a device of its own in its own process, so all have the same.
const GUEST_CID: u32 = 3;

/// Reason that a VM cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The host's KVM, memory or CPUs.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The guest image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The profile's files are of a newer version.
    #[error(transparent)]
    DataFormat(#[from] DataFormatError),
    /// The data disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The time zone.
    #[error(transparent)]
    TimeZone(#[from] UnknownZone),
    /// A program that the user can change, under a policy that locks isolation on.
    #[error(
        "enhancedContainerIsolation is locked by {}, so the program must be one that only root can change, but {problem}; \
         use the bulkhead of an installed package, or ask the administrator to install one",
        lock.display()
    )]
    Program {
        /// The policy.
        lock: PathBuf,
        /// The place that is not root's.
        problem: NotRoots,
    },
}

/// A machine that can be made.
#[derive(Clone)]
pub struct Plan {
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// The data disk.
    pub disk: DiskPlan,
    /// Kernel and root file system.
    pub image: Image,
    /// Give the VM a serial port.
    pub serial: bool,
    /// The network of a VM that has one.
    pub network: Option<NetworkPlan>,
    /// The directories of the host that containers may mount, if there are some.
    pub shares: Option<SharesPlan>,
    /// The sockets of the host that containers may mount.
    pub host_sockets: Vec<HostSocket>,
    /// The time zone of containers that mount the host's, if it is not UTC.
    pub time_zone: Option<TimeZone>,
    /// Published ports listen on the host's loopback, whatever address the engine asks for.
    pub ports_on_loopback: bool,
    /// The published ports of the VM itself.
    pub vm_ports: VmPortsPlan,
    /// The certificate authorities that the engine trusts.
    pub certificates: certificates::Source,
    /// The guest's part of the plan, as the agent receives it; the time is set when it is sent.
    pub configuration: Configuration,
    /// Non-fatal problems to show the user.
    pub warning: Option<String>,
}

impl Plan {
    /// Reads the settings and checks everything under `policy`; changes nothing.
    pub fn new(paths: &Paths, options: &StartOptions, policy: &Policy) -> Result<Self, PlanError> {
        // KVM first: on a host without it, nothing else matters to the user.
        host::check_kvm()?;
        host::check_virtualization()?;
        // Before the settings, in which a newer program may have written values that this one does not know.
        data_format::check(&paths.data_format())?;
        let settings = Settings::load(&paths.settings())?.under(policy.clone());
        // An option of the command line must not get around a value that the policy locks.
        settings.permit_options(options.cpus, options.memory_mib, options.disk_gib, options.network.as_ref())?;
        let kind = options.network.clone().unwrap_or_else(|| settings.network());
        let network = NetworkPlan::new(&kind, &settings)?;
        let (shares, mut warnings) = SharesPlan::new(&settings, options);
        let guest_shares = shares.as_ref().map(SharesPlan::guest).unwrap_or_default();
        let (host_sockets, problems) = HostSocket::plan(&settings, options, paths.base(), &guest_shares);
        warnings.extend(problems);
        let mut configuration = Configuration {
            hostname: paths.name().hostname(),
            // Set when it is sent, or the guest's clock would lag by the time of its boot.
            time_unix_ns: 0,
            isolation: settings.isolation(),
            data_disk_serial: DATA_SERIAL.into(),
            network: network.as_ref().map(NetworkPlan::guest),
            daemon_options: settings.daemon_options(),
            container_environment: Vec::new(),
            socket_exceptions: Box::new(settings.socket_exceptions()),
            block_load: settings.block_load(),
            shares: guest_shares,
            host_sockets: host_sockets.iter().map(HostSocket::guest).collect(),
            engine_sockets: host_sockets::engine_sockets(paths),
        };
        // After the daemon options, into which it writes.
        warnings.extend(proxy::configure(&settings, options, network.as_ref(), &mut configuration));
        warnings.extend(image_names::restrict(
            &settings,
            &options.proxy,
            network.as_ref().and_then(NetworkPlan::program),
            &mut configuration.socket_exceptions,
        ));
        let certificates = match (&options.certificates, image_names::matter(&settings)) {
            (Some(_), true) => {
                warnings.push("SSL_CERT_FILE is ignored, because the policy lists images by name".to_owned());
                certificates::Source::RootsBundle
            }
            (None, true) => certificates::Source::RootsBundle,
            (Some(named), false) => certificates::Source::Named(named.clone()),
            (None, false) => certificates::Source::Bundle,
        };
        // Under a policy that locks isolation on, `find` refuses an image that the user named or can change: another
        // guest could do without isolation.
        let image =
            Image::find(paths.base(), options.kernel.as_deref(), options.rootfs.as_deref(), policy.isolation_lock())?;
        check_program(policy)?;
        let time_zone = time_zone::load(settings.time_zone())?;
        Ok(Self {
            image,
            cpus: host::choose_cpus(options.cpus.or(settings.cpus()), host::cpus())?,
            memory_mib: host::choose_memory(options.memory_mib.or(settings.memory_mib()), host::memory_mib()?)?,
            disk: DiskPlan::new(paths.data_disk(), options.disk_gib.or(settings.disk_gib()))?,
            serial: options.serial,
            network,
            shares,
            host_sockets,
            time_zone,
            ports_on_loopback: settings.port_binding() == PortBinding::OnlyLoopback,
            vm_ports: VmPortsPlan::new(&settings),
            certificates,
            configuration,
            warning: (!warnings.is_empty()).then(|| warnings.join("; ")),
        })
    }

    /// Adds a non-fatal problem.
    pub(super) fn warn(&mut self, warning: String) {
        self.warning = Some(match self.warning.take() {
            Some(first) => format!("{first}; {warning}"),
            None => warning,
        });
    }

    /// Returns the machine for the vmm process.
    pub fn machine(&self, paths: &Paths) -> VmConfig {
        let disk = |path: &std::path::Path, readonly, serial: &str| Disk {
            path: path.to_owned(),
            readonly,
            serial: serial.to_owned(),
        };
        VmConfig {
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            uuid: host::machine_uuid(self.disk.path()),
            kernel: self.image.kernel.clone(),
            cmdline: command_line(self.serial),
            // The order is that of the guest's names: the command line has root=/dev/vda. init finds the data disk by
            // its serial.
            disks: vec![disk(&self.image.rootfs, true, "rootfs"), disk(self.disk.path(), false, DATA_SERIAL)],
            // An isolated container may still get a vsock socket, by socketcall(2) of a 32-bit program.
            vsock: Some(Vsock { cid: GUEST_CID, socket: paths.vsock_socket(), listens: !self.configuration.isolation }),
            console: Some(paths.console_log()),
            serial: self.serial.then(|| paths.serial_log()),
        }
    }
}

/// Returns the command line of a guest's kernel on this host.
pub fn command_line(serial: bool) -> String {
    with_clock(serial, host::trusts_tsc())
}

fn with_clock(serial: bool, tsc: bool) -> String {
    let line = if serial { CMDLINE.replace(QUIET, SERIAL) } else { CMDLINE.to_owned() };
    format!("{line} {}", if tsc { TSC } else { NO_TSC })
}

/// Refuses a program that the user can change, under a policy that locks isolation on: it might not read the policy.
pub fn check_program(policy: &Policy) -> Result<(), PlanError> {
    match policy.isolation_lock() {
        Some(lock) => {
            root_owned::check_program().map_err(|problem| PlanError::Program { lock: lock.to_owned(), problem })
        }
        None => Ok(()),
    }
}

/// Leaves the configuration out: the proxy's URL in it may contain a password.
impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan")
            .field("cpus", &self.cpus)
            .field("memory_mib", &self.memory_mib)
            .field("disk", &self.disk)
            .field("image", &self.image)
            .field("network", &self.network)
            .field("shares", &self.shares)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_port_is_in_the_command_line_only_when_asked_for() {
        let without = with_clock(false, true);
        assert!(without.contains(QUIET) && !without.contains("ttyS0"));
        let with = with_clock(true, true);
        assert!(with.contains("console=ttyS0") && !with.contains("quiet") && !with.contains("nr_uarts=0"));
    }

    #[test]
    fn the_guest_trusts_the_tsc_only_on_a_host_that_does() {
        let options = |tsc| with_clock(false, tsc).split(' ').map(ToOwned::to_owned).collect::<Vec<_>>();
        assert!(options(true).contains(&TSC.to_owned()) && !options(true).contains(&NO_TSC.to_owned()));
        assert!(options(false).contains(&NO_TSC.to_owned()) && !options(false).contains(&TSC.to_owned()));
    }
}
