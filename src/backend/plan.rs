//! From settings, options and host to a machine; every check that needs no VM is made here.

use std::path::PathBuf;

use bulkhead_protocol::SocketExceptions;

use crate::{
    image::{Image, ImageError},
    settings::{Paths, Policy, PortBinding, Settings, SettingsError},
};
use bulkhead_vmm::api::{Disk, VmConfig, Vsock};

use super::{
    disk::{DiskError, DiskPlan},
    host::{self, HostError},
    network::{NetworkError, NetworkPlan},
    proxy::ProxyPlan,
    wire::StartOptions,
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
#[derive(Clone, Debug)]
pub struct Plan {
    /// vCPUs.
    pub cpus: u8,
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// Enhanced Container Isolation.
    pub isolation: bool,
    /// Which containers may have the engine's socket.
    pub socket_exceptions: SocketExceptions,
    /// Refuse `docker load`.
    pub block_load: bool,
    /// The data disk.
    pub disk: DiskPlan,
    /// Kernel and root file system.
    pub image: Image,
    /// Published ports are on the host's loopback, whatever address is asked for.
    pub ports_on_loopback: bool,
    /// The network of a VM that has one.
    pub network: Option<NetworkPlan>,
    /// The engine's proxy.
    pub proxy: ProxyPlan,
    /// Options of dockerd.
    pub daemon_options: serde_json::Map<String, serde_json::Value>,
    /// The file of certificates that a person named.
    pub certificates: Option<PathBuf>,
    /// With a serial port.
    pub serial: bool,
    /// What keeps no VM from being made but a person should know.
    pub warning: Option<String>,
}

impl Plan {
    /// Reads the settings anew and checks everything under `policy`; changes nothing.
    pub fn new(paths: &Paths, options: &StartOptions, policy: &Policy) -> Result<Self, PlanError> {
        host::check_kvm()?;
        host::check_virtualization()?;
        let settings = Settings::load(&paths.settings())?.under(policy.clone());
        settings.permit_options(options.cpus, options.memory_mib, options.disk_gib, options.network.as_ref())?;
        let kind = options.network.clone().unwrap_or_else(|| settings.network());
        let network = NetworkPlan::new(&kind, &settings)?;
        let (proxy, warning) = ProxyPlan::new(&settings, options, network.as_ref());
        Ok(Self {
            image: Image::find(
                paths.base(),
                options.kernel.as_deref(),
                options.rootfs.as_deref(),
                policy.isolation_lock(),
            )?,
            cpus: host::choose_cpus(options.cpus.or(settings.cpus()), host::cpus())?,
            memory_mib: host::choose_memory(options.memory_mib.or(settings.memory_mib()), host::memory_mib()?)?,
            isolation: settings.isolation(),
            socket_exceptions: settings.socket_exceptions(),
            block_load: settings.block_load(),
            daemon_options: settings.daemon_options(),
            ports_on_loopback: settings.port_binding() == PortBinding::OnlyLoopback,
            network,
            proxy,
            warning,
            certificates: options.certificates.clone(),
            serial: options.serial,
            disk: DiskPlan::new(paths.data_disk(), options.disk_gib.or(settings.disk_gib()))?,
        })
    }

    /// Adds what a person should know.
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
