//! Sources of bind mounts and names of volumes.
//!
//! A source is judged as it is spelt: the engine, the kernel and file systems each clean a path in a way of their own
//! (`..` behind a link, a backslash, a NUL), so a path that is not clean already is refused.

use super::shares::{self, MOUNT_POINT, is_in};

/// The engine's socket by its two names. Any other path that leads to it is refused.
pub const ENGINE_SOCKETS: [&str; 2] = ["/run/docker.sock", "/var/run/docker.sock"];

/// The directory of the kernel's modules, which node images of Kubernetes ask for. It is empty: the guest's kernel has
/// all that it needs built in.
pub const KERNEL_MODULES: &str = "/lib/modules";

/// The files of the time zone. In the VM they are those of the host: read-only, and of a file system of their own.
pub const TIME_ZONE_FILES: [&str; 2] = ["/etc/localtime", "/etc/timezone"];

/// The directory of the host's sockets: a file system of their own, read-only as a whole.
pub const HOST_SERVICES: &str = "/run/host-services";

/// The socket of the host's ssh-agent, by Docker Desktop's name.
pub const SSH_AGENT: &str = "/run/host-services/ssh-auth.sock";

/// Length of the digits in the name of another socket of the host.
const SOCKET_DIGITS: usize = 16;

/// Longest path that mount(2) takes, in bytes.
const MAX_PATH: usize = 4095;

/// Longest name of a volume, in bytes: it becomes a directory.
const MAX_NAME: usize = 255;

/// Directories that are the VM's own to clients: those of its system and of the engine's data. Docker documents the
/// refusal of such paths. All others are paths of the host, which just are not shared.
const OF_VM: [&str; 15] = [
    "/bin",
    "/dev",
    "/etc",
    "/lib",
    "/lib32",
    "/lib64",
    "/libx32",
    "/proc",
    "/run",
    "/sbin",
    "/sys",
    "/usr",
    "/var/lib/containerd",
    "/var/lib/docker",
    "/var/run",
];

/// A path that may be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindSource {
    /// A path in the shares' file system.
    Share,
    /// The engine's socket, for which the container's image has to be allowed.
    EngineSocket,
    /// [`KERNEL_MODULES`]: a directory of the guest image, which is read-only as a whole.
    KernelModules,
    /// One of [`TIME_ZONE_FILES`].
    TimeZone,
    /// A socket of the host ([`is_host_socket`]), if the host offers it.
    HostSocket,
}

/// A source that may be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// A path.
    Bind(BindSource),
    /// The name of a volume.
    Volume,
}

/// A source that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A path of the VM that is neither in a share nor the engine's socket; Docker's own text.
    #[error("error in the container spec: can't mount {0} because it's configured as a restricted host mount")]
    Restricted(String),
    /// A path of the host outside of the shares.
    #[error(
        "mounts denied: the path {path} is not shared from the host; share it with: bulkhead share add {word}",
        path = .0, word = quoted(.0)
    )]
    NotShared(String),
    /// A name that the engine could take for a path.
    #[error(
        "invalid volume name {0:?}: it must begin with a letter or a digit and have letters, digits, '_', '.' and '-' only"
    )]
    VolumeName(String),
}

/// Quotes a path for a shell if it has to be.
fn quoted(path: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-+,@%=".contains(&byte) || !byte.is_ascii();
    if path.bytes().all(is_plain) { path.to_owned() } else { format!("'{}'", path.replace('\'', "'\\''")) }
}

/// Returns true for a clean path that is one of the VM's own, or above one.
fn is_of_vm(path: &str) -> bool {
    OF_VM.iter().any(|own| is_in(path, own) || is_in(own, path))
}

/// Returns the refusal of the source of a bind mount, as the client named it or as the engine has it.
pub fn refusal(path: &str) -> Error {
    let Some(clean) = shares::clean(path) else { return Error::Restricted(path.to_owned()) };
    match shares::on_host(&clean) {
        Some("/") => Error::Restricted(path.to_owned()),
        Some(on_host) => Error::NotShared(on_host.to_owned()),
        None if is_of_vm(&clean) => Error::Restricted(path.to_owned()),
        None => Error::NotShared(clean),
    }
}

/// Returns true for a path without anything to clean: absolute, without empty components, dots, backslashes and control
/// characters.
pub fn is_clean(path: &str) -> bool {
    let is_plain = |byte: u8| byte != b'\\' && !byte.is_ascii_control();
    path.len() <= MAX_PATH
        && path.bytes().all(is_plain)
        && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|name| !matches!(name, "" | "." | "..")))
}

/// Returns true for the path of a socket of the host: [`SSH_AGENT`], or another one, whose name is made of hexadecimal
/// digits. That it is there is another question.
pub fn is_host_socket(path: &str) -> bool {
    let name = path.strip_prefix(HOST_SERVICES).and_then(|rest| rest.strip_prefix('/'));
    let digits = name.and_then(|name| name.strip_suffix(".sock")).unwrap_or_default();
    path == SSH_AGENT
        || digits.len() == SOCKET_DIGITS && digits.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Judges the source of a bind mount by the VM's paths: those of the host have been replaced ([`shares`]).
pub fn bind(path: &str) -> Result<BindSource, Error> {
    if ENGINE_SOCKETS.contains(&path) {
        return Ok(BindSource::EngineSocket);
    }
    if path == KERNEL_MODULES {
        return Ok(BindSource::KernelModules);
    }
    if TIME_ZONE_FILES.contains(&path) {
        return Ok(BindSource::TimeZone);
    }
    if is_host_socket(path) {
        return Ok(BindSource::HostSocket);
    }
    // Users write `$PWD/` for a directory; a single slash at the end cannot lead elsewhere.
    let directory = path.strip_suffix('/').unwrap_or(path);
    if is_clean(directory) && is_in(directory, MOUNT_POINT) { Ok(BindSource::Share) } else { Err(refusal(path)) }
}

/// Judges the name of a volume.
pub fn volume_name(name: &str) -> Result<(), Error> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    if name.len() <= MAX_NAME
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(is_allowed)
    {
        Ok(())
    } else {
        Err(Error::VolumeName(name.to_owned()))
    }
}

/// Judges the source in `SOURCE:DESTINATION`, which is a path if it begins with a slash, and a volume's name otherwise.
pub fn source(text: &str) -> Result<Source, Error> {
    if text.starts_with('/') { bind(text).map(Source::Bind) } else { volume_name(text).map(|()| Source::Volume) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shares_the_socket_and_volumes_may_be_mounted() {
        for path in ["/host_mnt", "/host_mnt/", "/host_mnt/home/me/a b", "/host_mnt/é"] {
            assert_eq!(source(path), Ok(Source::Bind(BindSource::Share)), "{path}");
        }
        for path in ENGINE_SOCKETS {
            assert_eq!(source(path), Ok(Source::Bind(BindSource::EngineSocket)));
        }
        assert_eq!(source("/lib/modules"), Ok(Source::Bind(BindSource::KernelModules)));
        for path in ["/etc/localtime", "/etc/timezone"] {
            assert_eq!(source(path), Ok(Source::Bind(BindSource::TimeZone)));
        }
        for path in ["/run/host-services/ssh-auth.sock", "/run/host-services/0123456789abcdef.sock"] {
            assert_eq!(source(path), Ok(Source::Bind(BindSource::HostSocket)));
        }
        for name in ["a", "data", "my_app.db-1", "0"] {
            assert_eq!(source(name), Ok(Source::Volume), "{name}");
        }
    }

    #[test]
    fn paths_of_the_vm_are_refused_in_every_spelling() {
        for path in [
            "/",
            "//",
            "/etc",
            "/etc/",
            "/proc",
            "/var/lib/docker",
            "/run",
            "/run/bulkhead",
            "/run/bulkhead/dockerd.sock",
            "/run/bulkhead/shares/x",
            "/var",
            "/var/lib",
            "/var/run/user",
            "/host_mnt/./",
            "/host_mnt/../etc",
            "/host_mnt/..",
            "/host_mnt//",
            "/host_mnt/x\\..",
            "/host_mnt/x\0",
            "/host_mnt/x\n",
            "/run/docker.sock/",
            "/run//docker.sock",
            "/run/./docker.sock",
            "/run/docker.sock\0x",
            "/lib",
            "/lib/modules/..",
            "/lib/modules/x",
            "/lib/modules2",
            "/usr/lib/modules",
            "/etc/localtime/",
            "/etc/localtime2",
            "/etc//timezone",
            "/etc/./timezone",
            "/etc/timezone/..",
            "/usr/share/zoneinfo",
            "/run/host-services",
            "/run/host-services/",
            "/run/host-services/ssh-auth.sock/",
            "/run/host-services/ssh-auth.sock/..",
            "/run/host-services//ssh-auth.sock",
            "/run/host-services/other.sock",
            "/run/host-services/0123456789abcde.sock",
            "/run/host-services/0123456789ABCDEF.sock",
            "/run/host-services/./0123456789abcdef.sock",
            "/run/host-services/0123456789abcdef.sock/",
            "/var/run/host-services/ssh-auth.sock",
        ] {
            assert_eq!(source(path), Err(Error::Restricted(path.to_owned())), "{path:?}");
        }
        let text = bind("/etc/docker/daemon.json").unwrap_err().to_string();
        assert_eq!(
            text,
            "error in the container spec: can't mount /etc/docker/daemon.json because it's configured as a restricted \
             host mount"
        );
    }

    #[test]
    fn paths_of_the_host_that_are_not_shared_are_refused_with_the_remedy() {
        for (path, clean) in [
            ("/home/me", "/home/me"),
            ("/home/me/", "/home/me"),
            ("//tmp/./x", "/tmp/x"),
            ("/var/www", "/var/www"),
            ("/host_mnt2", "/host_mnt2"),
            ("/HOST_MNT", "/HOST_MNT"),
            ("/RUN/docker.sock", "/RUN/docker.sock"),
            ("/host_mnt/./x", "/x"),
            ("/host_mnt//etc", "/etc"),
        ] {
            assert_eq!(source(path), Err(Error::NotShared(clean.to_owned())), "{path}");
        }
        let text = |path| bind(path).unwrap_err().to_string();
        let start = "mounts denied: the path";
        let middle = "is not shared from the host; share it with: bulkhead share add";
        assert_eq!(text("/srv/data"), format!("{start} /srv/data {middle} /srv/data"));
        assert_eq!(text("/home/me/it's a"), format!("{start} /home/me/it's a {middle} '/home/me/it'\\''s a'"));
    }

    #[test]
    fn names_that_could_be_paths_are_refused() {
        for name in ["", ".", "..", "../etc", "etc/x", "\\etc", "~", "-v", "_x", "a b", "a\0", "ä", "run\\bulkhead"] {
            assert_eq!(source(name), Err(Error::VolumeName(name.to_owned())), "{name:?}");
        }
        assert!(volume_name(&"a".repeat(256)).is_err());
        assert!(bind(&format!("/host_mnt/{}", "a".repeat(4096))).is_err());
    }

    proptest! {
        #[test]
        fn an_allowed_path_stays_in_its_share_however_it_is_cleaned(path in "/(host_mnt|run|etc|bulkhead|\\.|\\.\\.|docker.sock|)(/(host_mnt|run|etc|bulkhead|\\.|\\.\\.|docker.sock|)){0,6}") {
            if bind(&path) == Ok(BindSource::Share) {
                let mut clean: Vec<&str> = Vec::new();
                for name in path.split('/') {
                    match name {
                        "" | "." => {}
                        ".." => { clean.pop(); }
                        name => clean.push(name),
                    }
                }
                prop_assert!(clean[0] == "host_mnt", "{}", path);
            }
        }

        #[test]
        fn no_text_makes_it_panic_and_only_slashes_make_paths(text in ".{0,40}") {
            if source(&text) == Ok(Source::Volume) {
                prop_assert!(!text.contains(['/', '\\', '\0']));
            }
        }
    }
}
