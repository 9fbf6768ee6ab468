//! Sources of bind mounts and names of volumes.
//!
//! A source is judged as it is spelt: the engine, the kernel and file systems each clean a path in a way of their own
//! (`..` behind a link, a backslash, a NUL), so a path that is not clean already is refused.

/// The mount points of the user's own directories.
pub const SHARES: [&str; 2] = ["/host_mnt", "/run/bulkhead/shares"];

/// The engine's socket by its two names. Any other path that leads to it is refused.
pub const ENGINE_SOCKETS: [&str; 2] = ["/run/docker.sock", "/var/run/docker.sock"];

/// The directory of the kernel's modules, which node images of Kubernetes ask for. It is empty: the guest's kernel has
/// all that it needs built in.
pub const KERNEL_MODULES: &str = "/lib/modules";

/// Longest path that mount(2) takes, in bytes.
const MAX_PATH: usize = 4095;

/// Longest name of a volume, in bytes: it becomes a directory.
const MAX_NAME: usize = 255;

/// A path that may be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BindSource {
    /// A user's directory, or a path in it.
    Share,
    /// The engine's socket, for which the container's image has to be allowed.
    EngineSocket,
    /// [`KERNEL_MODULES`]: a directory of the guest image, which is read-only as a whole.
    KernelModules,
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
    /// A path that is neither in a share nor the engine's socket; Docker's own text.
    #[error("error in the container spec: can't mount {0} because it's configured as a restricted host mount")]
    Restricted(String),
    /// A name that the engine could take for a path.
    #[error(
        "invalid volume name {0:?}: it must begin with a letter or a digit and have letters, digits, '_', '.' and '-' only"
    )]
    VolumeName(String),
}

/// Returns true for a path without anything to clean: absolute, without empty components, dots, backslashes and control
/// characters.
pub fn is_clean(path: &str) -> bool {
    let is_plain = |byte: u8| byte != b'\\' && !byte.is_ascii_control();
    path.len() <= MAX_PATH
        && path.bytes().all(is_plain)
        && path.strip_prefix('/').is_some_and(|rest| rest.split('/').all(|name| !matches!(name, "" | "." | "..")))
}

/// Judges the source of a bind mount.
pub fn bind(path: &str) -> Result<BindSource, Error> {
    if ENGINE_SOCKETS.contains(&path) {
        return Ok(BindSource::EngineSocket);
    }
    if path == KERNEL_MODULES {
        return Ok(BindSource::KernelModules);
    }
    // Users write `$PWD/` for a directory; a single slash at the end cannot lead elsewhere.
    let directory = path.strip_suffix('/').unwrap_or(path);
    let is_in =
        |share: &str| directory.strip_prefix(share).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if is_clean(directory) && SHARES.iter().any(|share| is_in(share)) {
        Ok(BindSource::Share)
    } else {
        Err(Error::Restricted(path.to_owned()))
    }
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
        for path in ["/host_mnt", "/host_mnt/", "/host_mnt/home/me/a b", "/run/bulkhead/shares/x/.git", "/host_mnt/é"]
        {
            assert_eq!(source(path), Ok(Source::Bind(BindSource::Share)), "{path}");
        }
        for path in ENGINE_SOCKETS {
            assert_eq!(source(path), Ok(Source::Bind(BindSource::EngineSocket)));
        }
        assert_eq!(source("/lib/modules"), Ok(Source::Bind(BindSource::KernelModules)));
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
            "/run/bulkhead/shares2",
            "/host_mnt2",
            "/HOST_MNT",
            "/host_mnt/../etc",
            "/host_mnt/..",
            "/host_mnt/./x",
            "/host_mnt//x",
            "/host_mnt//",
            "//host_mnt/x",
            "/host_mnt/x\\..",
            "/host_mnt/x\0",
            "/host_mnt/x\n",
            "/run/docker.sock/",
            "/run//docker.sock",
            "/run/./docker.sock",
            "/run/docker.sock\0x",
            "/RUN/docker.sock",
            "/lib",
            "/lib/modules/..",
            "/lib/modules/x",
            "/lib/modules2",
            "/usr/lib/modules",
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
    fn names_that_could_be_paths_are_refused() {
        for name in ["", ".", "..", "../etc", "etc/x", "\\etc", "~", "-v", "_x", "a b", "a\0", "ä", "run\\bulkhead"] {
            assert_eq!(source(name), Err(Error::VolumeName(name.to_owned())), "{name:?}");
        }
        assert!(volume_name(&"a".repeat(256)).is_err());
        assert!(bind(&format!("/host_mnt/{}", "a".repeat(4096))).is_err());
    }

    proptest! {
        #[test]
        fn an_allowed_path_stays_in_its_share_however_it_is_cleaned(path in "/(host_mnt|run|etc|bulkhead|shares|\\.|\\.\\.|docker.sock|)(/(host_mnt|run|etc|bulkhead|shares|\\.|\\.\\.|docker.sock|)){0,6}") {
            if bind(&path) == Ok(BindSource::Share) {
                let mut clean: Vec<&str> = Vec::new();
                for name in path.split('/') {
                    match name {
                        "" | "." => {}
                        ".." => { clean.pop(); }
                        name => clean.push(name),
                    }
                }
                prop_assert!(clean[0] == "host_mnt" || clean[..3] == ["run", "bulkhead", "shares"], "{}", path);
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
