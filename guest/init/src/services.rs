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

use bulkhead_procfs::traps::KEPT_LISTENERS;
use bulkhead_protocol::{CONTAINER_ENVIRONMENT, Configuration, KEPT_SOCKETS, SOCKET_EXCEPTIONS};
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

    fn command_line(self, configuration: &Configuration) -> Vec<String> {
        let words: Vec<String> = match self {
            Self::Gate => {
                let mut words = vec![
                    "/usr/sbin/bulkhead-gate".to_owned(),
                    format!("--isolation={}", if configuration.isolation { "on" } else { "off" }),
                    format!("--upstream={DOCKERD_SOCKET}"),
                    format!("--listen={}", ping::GATE),
                    format!("--vsock-port={}", bulkhead_protocol::DOCKER_PORT),
                ];
                words.extend(configuration.block_load.then(|| "--block-load".to_owned()));
                words
            }
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
            Self::Warden => vec!["/usr/sbin/bulkhead-procfs".to_owned()],
        };
        words
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
    let mut words = service.command_line(configuration);
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
            set_gate_rules(&mut command, configuration);
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

/// What the gate needs besides its command line.
fn set_gate_rules(command: &mut Command, configuration: &Configuration) {
    if !configuration.container_environment.is_empty() {
        let environment = serde_json::Value::from(configuration.container_environment.clone());
        command.env(CONTAINER_ENVIRONMENT, environment.to_string());
    }
    if let Ok(exceptions) = serde_json::to_string(&configuration.socket_exceptions) {
        command.env(SOCKET_EXCEPTIONS, exceptions);
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
    fn the_gate_is_told_what_to_enforce() {
        let line = |isolation: bool, block_load: bool| {
            let text = serde_json::json!({"hostname": "", "time_unix_ns": 0, "isolation": isolation,
                "data_disk_serial": "", "block_load": block_load});
            Service::Gate.command_line(&serde_json::from_value(text).unwrap()).join(" ")
        };
        assert!(line(true, false).contains("--isolation=on") && !line(true, false).contains("--block-load"));
        assert!(line(false, true).contains("--isolation=off") && line(false, true).ends_with(" --block-load"));
    }
}
