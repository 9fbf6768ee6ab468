//! The guest's services: their command lines, and the start of one.

use std::{
    fs::{self, File},
    io::{PipeWriter, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    path::Path,
    process::{Command, Stdio},
};

use bulkhead_guest_common::registry;
use bulkhead_procfs::seccomp_notify::KEPT_LISTENERS;
use bulkhead_protocol::{CRUN_STATE, Configuration, KEPT_SOCKETS, Network, SOCKETS_DIRECTORY, Share, gate};
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
};

use crate::{
    certificates, cgroup, config,
    error::Error,
    fd_store::{FdStore, Owner},
    jail::{Jail, Request},
    log, mounts, notify,
    output::{self, Tail},
    ping,
    procfs::Endpoints,
};

/// dockerd's own socket; the gate is its only client. Only the VM's root can enter its directory.
pub(crate) const DOCKERD_SOCKET: &str = "/run/bulkhead/engine/dockerd.sock";

/// Directory of dockerd's socket, which dockerd writes to.
pub(crate) const ENGINE_DIRECTORY: &str = "/run/bulkhead/engine";

/// Directory of the two configuration files, which nobody but init writes to.
pub(crate) const CONFIGURATION_DIRECTORY: &str = "/run/bulkhead/configuration";

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const DAEMON_CONFIG: &str = "/run/bulkhead/configuration/daemon.json";
const CONTAINERD_CONFIG: &str = "/run/bulkhead/configuration/containerd.toml";
const SHARES: &str = "/run/bulkhead/configuration/shares.json";

/// A service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// The Docker API filter.
    Gate,
    /// containerd.
    Containerd,
    /// dockerd.
    Dockerd,
    /// The FUSE server of containers' own files in `/proc` and `/sys`; only with isolation. The last one, because
    /// without isolation the table of services ends before it.
    Procfs,
}

impl Service {
    /// All services, in the order of their numbers.
    pub(crate) const ALL: [Self; 4] = [Self::Gate, Self::Containerd, Self::Dockerd, Self::Procfs];

    /// Returns the service's name, which is also its cgroup's.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Containerd => "containerd",
            Self::Dockerd => "dockerd",
            Self::Procfs => "procfs",
        }
    }

    fn command_line(self) -> Vec<String> {
        match self {
            Self::Gate => vec!["/usr/sbin/bulkhead-gate".to_owned()],
            Self::Containerd => vec!["/usr/bin/containerd".to_owned(), format!("--config={CONTAINERD_CONFIG}")],
            Self::Dockerd => vec![
                "/usr/sbin/dockerd".to_owned(),
                format!("--config-file={DAEMON_CONFIG}"),
                format!("--host=unix://{DOCKERD_SOCKET}"),
                format!("--containerd={CONTAINERD_SOCKET}"),
                // Not the group `docker`: only root can enter the socket's directory anyway. No process id file: a
                // stale one could keep dockerd from starting after a crash, and init knows what runs.
                "--group=root".to_owned(),
                "--pidfile=".to_owned(),
            ],
            Self::Procfs => vec!["/usr/sbin/bulkhead-procfs".to_owned()],
        }
    }

    /// Returns the owner of the descriptors that the service stores, if it may store any.
    fn owner(self) -> Option<Owner> {
        match self {
            Self::Gate => Some(Owner::Gate),
            Self::Procfs => Some(Owner::Procfs),
            Self::Containerd | Self::Dockerd => None,
        }
    }

    /// Returns the service's `oom_score_adj` (proc_pid_oom_score_adj(5)).
    fn oom_score_adj(self) -> &'static str {
        // At the end of memory the kernel kills containers (0) before dockerd, whose heap can be large, and dockerd
        // before the small services, without which nothing answers.
        match self {
            Self::Gate | Self::Containerd | Self::Procfs => "-999",
            Self::Dockerd => "-500",
        }
    }
}

/// Makes the directories of the services' sockets and writes their configuration files.
pub(crate) fn write_configuration(configuration: &Configuration) -> Result<(), Error> {
    for path in [CONFIGURATION_DIRECTORY, ENGINE_DIRECTORY, SOCKETS_DIRECTORY] {
        mounts::make_directory(path, 0o700)?;
    }
    // The mode that dockerd gives it; here already, because the jail shows it.
    mounts::make_directory("/run/docker", 0o700)?;
    mounts::make_directory(CRUN_STATE, 0o700)?;
    let (daemon, refused) = config::daemon(configuration);
    for reason in refused {
        log::info(&reason.to_string());
    }
    let daemon = serde_json::Value::Object(daemon).to_string();
    for (path, text) in [(DAEMON_CONFIG, daemon.as_str()), (CONTAINERD_CONFIG, config::CONTAINERD_TOML)] {
        fs::write(path, text).map_err(Error::file("write", path))?;
    }
    write_shares(&configuration.shares)?;
    // The mode that containerd itself gives its state directory: containers' users pass through and cannot list it.
    mounts::make_directory("/run/containerd", 0o711)
}

/// Writes the list of shared directories for the gate, which reads it whenever a request names one.
pub(crate) fn write_shares(shares: &[Share]) -> Result<(), Error> {
    let paths: Vec<&str> = shares.iter().map(|share| share.path.as_str()).collect();
    let text = serde_json::json!(paths).to_string();
    registry::replace(Path::new(SHARES), text.as_bytes()).map_err(Error::file("write", SHARES))
}

/// Removes the sockets and process id files of an earlier process that was killed.
fn remove_stale_files(service: Service) {
    let stale: &[&str] = match service {
        Service::Gate => &[ping::GATE],
        Service::Containerd | Service::Procfs => &[],
        Service::Dockerd => &[DOCKERD_SOCKET, "/run/docker.pid"],
    };
    for path in stale {
        let _ = fs::remove_file(path);
    }
}

/// Descriptors that init holds for its services.
#[derive(Debug)]
pub(crate) struct HeldFds {
    /// Descriptors that the gate and the procfs service have stored.
    pub(crate) store: FdStore,
    /// The endpoints of the procfs service, with isolation.
    pub(crate) endpoints: Option<Endpoints>,
    /// The jail of dockerd and containerd, with isolation and once the data disk is mounted.
    pub(crate) jail: Option<Jail>,
}

/// Returns the environment that all services have.
fn environment() -> [(&'static str, &'static str); 7] {
    [
        ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ("HOME", "/root"),
        ("LANG", "C.UTF-8"),
        // The VM has the host's time zone for containers; logs have one for all.
        ("TZ", "UTC"),
        ("NOTIFY_SOCKET", notify::SOCKET),
        // Go's programs read both, and the image's directory must not add to the host's list.
        ("SSL_CERT_FILE", certificates::BUNDLE),
        ("SSL_CERT_DIR", certificates::NO_DIRECTORY),
    ]
}

/// Starts a service and returns its process id. Its output goes to the console and to `tail`.
pub(crate) fn start(service: Service, configuration: &Configuration, held: &HeldFds, tail: Tail) -> Result<i32, Error> {
    remove_stale_files(service);
    // Opened here and written by the child itself: so it is in its cgroup before its first instruction, and everything
    // that it forks as well.
    let procs = cgroup::open_procs(&cgroup::create(service.name())?)?;
    let (reader, writer) = std::io::pipe().map_err(Error::system("create a pipe"))?;
    // Each takes the last write ends of this process with it. The relay sees the end of the output only when the
    // service has the last ones.
    let pid = match &held.jail {
        Some(jail) if matches!(service, Service::Containerd | Service::Dockerd) => {
            start_in_jail(service, jail, writer, &procs)?
        }
        _ => start_in_vm(service, configuration, held, writer, procs)?,
    };
    output::relay(service.name(), reader, tail)?;
    let score = format!("/proc/{pid}/oom_score_adj");
    if let Err(error) = fs::write(&score, service.oom_score_adj()) {
        // Not worth failing the start: only the order of killing differs.
        log::info(&format!("cannot write {score}: {error}"));
    }
    Ok(pid)
}

fn start_in_jail(service: Service, jail: &Jail, output: PipeWriter, procs: &File) -> Result<i32, Error> {
    let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    let request = Request {
        words: service.command_line(),
        environment: environment().map(own).into(),
        // dockerd gives to containers only what it has itself.
        all_capabilities: service == Service::Dockerd,
    };
    jail.start(&request, &output, procs)
}

fn start_in_vm(
    service: Service,
    configuration: &Configuration,
    held: &HeldFds,
    writer: PipeWriter,
    procs: File,
) -> Result<i32, Error> {
    let mut words = service.command_line();
    // Descriptors are passed by number, and copies live in the closure that runs after the fork. They are
    // close-on-exec, like every descriptor of init, until that closure clears the flag in the child: no other program
    // that is started meanwhile inherits them.
    let mut given = Vec::new();
    if let Some(endpoints) = held.endpoints.as_ref().filter(|_| service == Service::Procfs) {
        given = endpoints.copies().map_err(Error::system("duplicate a descriptor"))?.into();
        words.extend(given.iter().map(|(name, fd): &(String, OwnedFd)| format!("--{name}={}", fd.as_raw_fd())));
    }
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        // The kernel puts unknown `NAME=VALUE` words of its command line into init's environment.
        .env_clear()
        .envs(environment())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(writer.try_clone().map_err(Error::system("duplicate a pipe"))?)
        .stderr(writer);
    match service {
        Service::Gate => {
            let text = serde_json::to_string(&gate_configuration(configuration));
            command.env(gate::CONFIGURATION, text.map_err(Error::system("write the gate's configuration"))?);
            given.extend(pass_down(&mut command, KEPT_SOCKETS, &held.store, Owner::Gate)?);
        }
        Service::Procfs => given.extend(pass_down(&mut command, KEPT_LISTENERS, &held.store, Owner::Procfs)?),
        Service::Containerd | Service::Dockerd => {}
    }
    // init's own mask blocks SIGTERM and SIGCHLD, and would be inherited across exec.
    let mask = SigSet::empty();
    // SAFETY: between fork and exec this makes only the async-signal-safe calls write, setsid, sigprocmask and
    // fcntl, and touches no memory but its own captures.
    unsafe {
        command.pre_exec(move || {
            // `0` stands for the writer (cgroup-v2.rst, cgroup.procs).
            (&procs).write_all(b"0")?;
            // A session of its own: no controlling terminal, and signals to its process group stay inside the service.
            nix::unistd::setsid()?;
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
            for (_, descriptor) in &given {
                fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
    }
    let mut spawn = || command.spawn().map(|child| child.id().cast_signed()).map_err(Error::file("start", &words[0]));
    match service.owner() {
        Some(owner) => held.store.start(owner, spawn),
        None => spawn(),
    }
}

/// The part of the VM's configuration that the gate enforces, and the sockets that it connects.
fn gate_configuration(configuration: &Configuration) -> gate::Configuration {
    gate::Configuration {
        isolation: configuration.isolation,
        dockerd_socket: DOCKERD_SOCKET.into(),
        unix_socket: ping::GATE.into(),
        vsock_port: Some(bulkhead_protocol::DOCKER_PORT),
        block_load: configuration.block_load,
        container_environment: configuration.container_environment.clone(),
        socket_exceptions: (*configuration.socket_exceptions).clone(),
        vm_networks: vm_networks(configuration.network.as_ref()),
        shares_file: SHARES.into(),
        host_sockets: configuration.host_sockets.clone(),
        engine_sockets: configuration.engine_sockets.clone(),
    }
}

/// The networks of the VM's device.
fn vm_networks(network: Option<&Network>) -> Vec<gate::VmSubnet> {
    let Some(network) = network else { return Vec::new() };
    let ipv4 = gate::VmSubnet { address: network.address.into(), prefix: network.prefix };
    let ipv6 = network.ipv6.as_ref().map(|ipv6| gate::VmSubnet { address: ipv6.address.into(), prefix: ipv6.prefix });
    std::iter::once(ipv4).chain(ipv6).collect()
}

/// Lists stored descriptors in an environment variable as `NAME=FD,…`, and returns copies that the service has to
/// inherit under the same numbers.
fn pass_down(
    command: &mut Command,
    variable: &str,
    store: &FdStore,
    owner: Owner,
) -> Result<Vec<(String, OwnedFd)>, Error> {
    let kept = store.copies(owner).map_err(Error::system("duplicate stored descriptors"))?;
    let numbers: Vec<String> = kept.iter().map(|(name, fd)| format!("{name}={}", fd.as_raw_fd())).collect();
    command.env(variable, numbers.join(","));
    Ok(kept)
}

/// Removes the group's access to dockerd's socket, which dockerd creates with mode 0660.
pub(crate) fn restrict_dockerd_socket() {
    use std::os::unix::fs::PermissionsExt;
    if let Err(error) = fs::set_permissions(DOCKERD_SOCKET, fs::Permissions::from_mode(0o600)) {
        log::info(&format!("cannot set the mode of {DOCKERD_SOCKET}: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::HostSocket;

    use super::*;

    #[test]
    fn the_gate_gets_everything_that_it_enforces() {
        for (isolation, block_load) in [(true, false), (false, true)] {
            let text = serde_json::json!({"hostname": "", "time_unix_ns": 0, "isolation": isolation,
                "data_disk_serial": "", "block_load": block_load, "container_environment": ["A=1"],
                "socket_exceptions": {"images": ["docker:cli"]}, "host_sockets": [{"name": "s.sock", "path": "/s"}],
                "engine_sockets": ["/e"]});
            let gate = gate_configuration(&serde_json::from_value(text).unwrap());
            assert_eq!((gate.isolation, gate.block_load), (isolation, block_load));
            assert_eq!(gate.container_environment, ["A=1"]);
            assert_eq!(gate.socket_exceptions.images, ["docker:cli"]);
            assert_eq!(gate.vsock_port, Some(bulkhead_protocol::DOCKER_PORT));
            assert!(gate.vm_networks.is_empty(), "a VM without a network has none");
            assert_eq!(gate.host_sockets, [HostSocket { name: "s.sock".to_owned(), path: "/s".to_owned() }]);
            assert_eq!(*gate.engine_sockets, ["/e"]);
        }
    }

    #[test]
    fn the_gate_knows_the_networks_of_the_vm() {
        let mut text = serde_json::json!({"address": "10.0.0.2", "prefix": 24, "gateway": "10.0.0.1",
            "nameserver": "10.0.0.1", "host": "10.0.0.1", "mtu": 1500});
        let networks = |text: &serde_json::Value| {
            let network: Network = serde_json::from_value(text.clone()).unwrap();
            vm_networks(Some(&network)).iter().map(|one| format!("{}/{}", one.address, one.prefix)).collect::<Vec<_>>()
        };
        assert_eq!(networks(&text), ["10.0.0.2/24"]);
        text["ipv6"] = serde_json::json!({"address": "fd00::2", "prefix": 64, "gateway": "fd00::1", "host": "fd00::1"});
        assert_eq!(networks(&text), ["10.0.0.2/24", "fd00::2/64"]);
    }
}
