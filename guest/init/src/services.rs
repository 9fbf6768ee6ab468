//! The guest's services: what they are and how one is started.

use std::{
    fs,
    io::Write,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
};

use bulkhead_protocol::{Configuration, KEPT_SOCKETS, gate};
use bulkhead_warden::traps::KEPT_LISTENERS;
use nix::{
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::signal::{SigSet, SigmaskHow, sigprocmask},
};

use crate::{
    certificates, cgroup, config,
    error::Error,
    mounts, notify,
    output::{self, Tail},
    ping,
    store::{Owner, Store},
    warden::Held,
};

/// dockerd's own socket; in a directory that only root can enter, and the gate is its only user.
pub(crate) const DOCKERD_SOCKET: &str = "/run/bulkhead/dockerd.sock";

const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
const DAEMON_CONFIG: &str = "/run/bulkhead/daemon.json";
const CONTAINERD_CONFIG: &str = "/run/bulkhead/containerd.toml";

/// A service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Service {
    /// The Docker API filter.
    Gate,
    /// containerd.
    Containerd,
    /// dockerd.
    Dockerd,
    /// Serves the files of `/proc` and `/sys` that containers have of their own; only with isolation.
    Warden,
}

impl Service {
    /// All of them, in the order of starting.
    pub(crate) const ALL: [Self; 4] = [Self::Gate, Self::Containerd, Self::Dockerd, Self::Warden];

    /// Its name, also of its cgroup.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Gate => "gate",
            Self::Containerd => "containerd",
            Self::Dockerd => "dockerd",
            Self::Warden => "warden",
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
                // Neither a group nor a stale process id may matter: only root enters the socket's directory, and
                // init knows what runs.
                "--group=root".to_owned(),
                "--pidfile=".to_owned(),
            ],
            Self::Warden => vec!["/usr/sbin/bulkhead-warden".to_owned()],
        }
    }

    /// `oom_score_adj`: the engine goes last, containers (0) first.
    fn oom_score(self) -> &'static str {
        match self {
            Self::Gate | Self::Containerd | Self::Warden => "-999",
            Self::Dockerd => "-500",
        }
    }
}

/// Writes the services' configuration files.
pub(crate) fn write_configuration(configuration: &Configuration) -> Result<(), Error> {
    let daemon = serde_json::Value::Object(config::daemon(configuration)).to_string();
    for (path, text) in [(DAEMON_CONFIG, daemon.as_str()), (CONTAINERD_CONFIG, config::CONTAINERD)] {
        fs::write(path, text).map_err(Error::file("write", path))?;
    }
    mounts::make_directory("/run/containerd", 0o711)
}

/// What an earlier run that was killed left behind.
fn remove_remains(service: Service) {
    let stale: &[&str] = match service {
        Service::Gate => &[ping::GATE],
        Service::Containerd | Service::Warden => &[],
        Service::Dockerd => &[DOCKERD_SOCKET, "/run/docker.pid"],
    };
    for path in stale {
        let _ = fs::remove_file(path);
    }
}

/// Descriptors that init holds for its services.
pub(crate) struct Handed<'a> {
    /// What the gate and the warden have kept.
    pub(crate) store: &'a Store,
    /// The warden's connections.
    pub(crate) held: Option<&'a Held>,
}

/// Starts a service and returns its process id; its output goes to the console and to `tail`.
pub(crate) fn start(
    service: Service,
    configuration: &Configuration,
    handed: &Handed<'_>,
    tail: Tail,
) -> Result<i32, Error> {
    remove_remains(service);
    let entrance = cgroup::entrance(&cgroup::create(service.name())?)?;
    let (reader, writer) = std::io::pipe().map_err(Error::system("make a pipe"))?;
    let mut words = service.command_line();
    // Copies: what runs after the fork borrows nothing.
    let mut given = Vec::new();
    if let Some(held) = handed.held.filter(|_| service == Service::Warden) {
        given = held.copies().map_err(Error::system("share a descriptor"))?.into();
        words.extend(given.iter().map(|(name, fd): &(String, OwnedFd)| format!("--{name}={}", fd.as_raw_fd())));
    }
    let mut command = Command::new(&words[0]);
    command
        .args(&words[1..])
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .env("NOTIFY_SOCKET", notify::SOCKET)
        .env("SSL_CERT_FILE", certificates::BUNDLE)
        .env("SSL_CERT_DIR", certificates::NO_FOLDER)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(writer.try_clone().map_err(Error::system("share a pipe"))?)
        .stderr(writer);
    match service {
        Service::Gate => {
            let text = serde_json::to_string(&gate_configuration(configuration));
            command.env(gate::CONFIGURATION, text.map_err(Error::system("write the gate's configuration"))?);
            given.extend(hand_down(&mut command, KEPT_SOCKETS, handed.store, Owner::Gate)?);
        }
        Service::Warden => given.extend(hand_down(&mut command, KEPT_LISTENERS, handed.store, Owner::Warden)?),
        Service::Containerd | Service::Dockerd => {}
    }
    let mask = SigSet::empty();
    // SAFETY: between fork and exec this makes only the async-signal-safe calls write, setsid, sigprocmask and
    // fcntl, and touches no memory but its own captures.
    unsafe {
        command.pre_exec(move || {
            (&entrance).write_all(b"0")?;
            nix::unistd::setsid()?;
            sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
            for (_, descriptor) in &given {
                fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
            }
            Ok(())
        });
    }
    let child = command.spawn().map_err(Error::file("start", &words[0]))?;
    // Dropped with its write ends, so that the relay ends with the service.
    drop(command);
    output::relay(service.name(), reader, tail)?;
    let pid = child.id().cast_signed();
    let score = format!("/proc/{pid}/oom_score_adj");
    if let Err(error) = fs::write(&score, service.oom_score()) {
        crate::kmsg::log(&format!("can't write {score}: {error}"));
    }
    Ok(pid)
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
    }
}

/// Names kept descriptors in an environment variable; they are to be open in the service under the same numbers.
fn hand_down(
    command: &mut Command,
    variable: &str,
    store: &Store,
    owner: Owner,
) -> Result<Vec<(String, OwnedFd)>, Error> {
    let kept = store.copies(owner).map_err(Error::system("copy kept descriptors"))?;
    let numbers: Vec<String> = kept.iter().map(|(name, fd)| format!("{name}={}", fd.as_raw_fd())).collect();
    command.env(variable, numbers.join(","));
    Ok(kept)
}

/// Narrows dockerd's socket, which it makes with group access, to its owner.
pub(crate) fn narrow_dockerd_socket() {
    use std::os::unix::fs::PermissionsExt;
    if let Err(error) = fs::set_permissions(DOCKERD_SOCKET, fs::Permissions::from_mode(0o600)) {
        crate::kmsg::log(&format!("can't set the mode of {DOCKERD_SOCKET}: {error}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_gets_everything_that_it_enforces() {
        for (isolation, block_load) in [(true, false), (false, true)] {
            let text = serde_json::json!({"hostname": "", "time_unix_ns": 0, "isolation": isolation,
                "data_disk_serial": "", "block_load": block_load, "container_environment": ["A=1"],
                "socket_exceptions": {"images": ["docker:cli"]}});
            let gate = gate_configuration(&serde_json::from_value(text).unwrap());
            assert_eq!((gate.isolation, gate.block_load), (isolation, block_load));
            assert_eq!(gate.container_environment, ["A=1"]);
            assert_eq!(gate.socket_exceptions.images, ["docker:cli"]);
            assert_eq!(gate.vsock_port, Some(bulkhead_protocol::DOCKER_PORT));
        }
    }
}
