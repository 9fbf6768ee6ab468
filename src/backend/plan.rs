//! From settings, options and host to a machine; every check that needs no VM is made here.

use std::{fmt, path::PathBuf};

use bulkhead_protocol::Configuration;

use crate::{
    image::{Image, ImageError},
    settings::{Paths, Policy, PortBinding, Settings, SettingsError},
};
use bulkhead_vmm::api::{Disk, VmConfig, Vsock};

use super::{
    api::StartOptions,
    disk::{DiskError, DiskPlan},
    host::{self, HostError},
    network::{NetworkError, NetworkPlan},
    proxy,
};

/// The guest's kernel command line.
pub const CMDLINE: &str = "console=hvc0 root=/dev/vda rootfstype=erofs ro init=/usr/sbin/bulkhead-init panic=-1 quiet \
                       loglevel=4 8250.nr_uarts=0 i8042.noaux tsc=reliable no_timer_check rcupdate.rcu_expedited=1 \
                       random.trust_cpu=on cryptomgr.notests pci=noearly mitigations=auto";

/// What keeps the kernel silent and from probing for a UART …
const QUIET: &str = "quiet loglevel=4 8250.nr_uarts=0";
/// … and what a serial port needs instead.
const SERIAL: &str = "console=ttyS0 8250.nr_uarts=1";

/// virtio-blk serial of the data disk, by which the agent finds it.
pub const DATA_SERIAL: &str = "data";

/// The guest's context id; each VM has a device of its own, so all may have the same.
const GUEST_CID: u32 = 3;

/// Why no VM can be made.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The host.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The data disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
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
    /// With a serial port.
    pub serial: bool,
    /// The network of a VM that has one.
    pub network: Option<NetworkPlan>,
    /// Published ports are on the host's loopback, whatever address is asked for.
    pub ports_on_loopback: bool,
    /// The file of certificates that the user named.
    pub certificates: Option<PathBuf>,
    /// The guest's part of the plan, as the agent receives it; the time is set when it is sent.
    pub configuration: Configuration,
    /// Non-fatal problems to show the user.
    pub warning: Option<String>,
}

impl Plan {
    /// Reads the settings and checks everything under `policy`; changes nothing.
    pub fn new(paths: &Paths, options: &StartOptions, policy: &Policy) -> Result<Self, PlanError> {
        host::check_kvm()?;
        host::check_virtualization()?;
        let settings = Settings::load(&paths.settings())?.under(policy.clone());
        settings.permit_options(options.cpus, options.memory_mib, options.disk_gib, options.network.as_ref())?;
        let kind = options.network.clone().unwrap_or_else(|| settings.network());
        let network = NetworkPlan::new(&kind, &settings)?;
        let mut configuration = Configuration {
            hostname: paths.name().hostname(),
            time_unix_ns: 0,
            isolation: settings.isolation(),
            data_disk_serial: DATA_SERIAL.into(),
            network: network.as_ref().map(NetworkPlan::guest),
            daemon_options: settings.daemon_options(),
            container_environment: Vec::new(),
            socket_exceptions: Box::new(settings.socket_exceptions()),
            block_load: settings.block_load(),
        };
        let warning = proxy::configure(&settings, options, network.as_ref(), &mut configuration);
        Ok(Self {
            image: Image::find(
                paths.base(),
                options.kernel.as_deref(),
                options.rootfs.as_deref(),
                policy.isolation_lock(),
            )?,
            cpus: host::choose_cpus(options.cpus.or(settings.cpus()), host::cpus())?,
            memory_mib: host::choose_memory(options.memory_mib.or(settings.memory_mib()), host::memory_mib()?)?,
            disk: DiskPlan::new(paths.data_disk(), options.disk_gib.or(settings.disk_gib()))?,
            serial: options.serial,
            network,
            ports_on_loopback: settings.port_binding() == PortBinding::OnlyLoopback,
            certificates: options.certificates.clone(),
            configuration,
            warning,
        })
    }

    /// Adds a non-fatal problem.
    pub(super) fn warn(&mut self, warning: String) {
        self.warning = Some(match self.warning.take() {
            Some(first) => format!("{first}; {warning}"),
            None => warning,
        });
    }

    /// The machine for the vmm process.
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
            cmdline: if self.serial { CMDLINE.replace(QUIET, SERIAL) } else { CMDLINE.to_owned() },
            disks: vec![disk(&self.image.rootfs, true, "rootfs"), disk(self.disk.path(), false, DATA_SERIAL)],
            vsock: Some(Vsock { cid: GUEST_CID, socket: paths.vsock_socket() }),
            console: Some(paths.console_log()),
            serial: self.serial.then(|| paths.serial_log()),
        }
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
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_port_is_in_the_command_line_only_when_asked_for() {
        assert!(CMDLINE.contains(QUIET) && !CMDLINE.contains("ttyS0"));
        let with = CMDLINE.replace(QUIET, SERIAL);
        assert!(with.contains("console=ttyS0") && !with.contains("quiet") && !with.contains("nr_uarts=0"));
    }
}
