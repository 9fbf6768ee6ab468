//! Paths of the guest that lead to an engine socket.
//!
//! The judges refuse them like any other path of the VM. This module chooses the text of the refusal: for a socket it is
//! the documented one.

use std::path::{Component, Path, PathBuf};

/// Directories and sockets of the engine, by all their names. A path inside of one of them, or above one, reaches it.
const PROTECTED: [&str; 8] = [
    "/run/bulkhead",
    "/run/containerd",
    "/run/docker",
    "/run/docker.sock",
    // /var/run is a link to /run. It is listed because one of the readings below does not follow links.
    "/var/run/bulkhead",
    "/var/run/containerd",
    "/var/run/docker",
    "/var/run/docker.sock",
];

/// Makes a path absolute and removes `.`, `..` and repeated slashes, without following links (Go's `filepath.Clean`).
fn lexical(path: &str) -> PathBuf {
    let mut clean = PathBuf::from("/");
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    clean
}

/// Follows the links in the part of a path that exists.
fn resolved(path: &Path) -> PathBuf {
    for known in path.ancestors() {
        if let Ok(real) = std::fs::canonicalize(known) {
            return path.strip_prefix(known).map_or_else(|_| real.clone(), |rest| real.join(rest));
        }
    }
    path.to_owned()
}

/// Returns true for a protected path, for those inside, and for those above.
fn is_protected(path: &Path) -> bool {
    PROTECTED.iter().any(|protected| Path::new(protected).starts_with(path) || path.starts_with(protected))
}

/// Returns true if a mount of `path` would show an engine socket. A relative path counts from `/`, dockerd's working
/// directory.
pub fn reaches_engine_socket(path: &str) -> bool {
    // A NUL ends the path for the kernel, not in Rust.
    let path = path.split('\0').next().unwrap_or_default();
    let clean = lexical(path);
    let asked = Path::new("/").join(path);
    // Three readings, and any of them is enough: dockerd cleans the text first, the kernel then follows links, and a
    // kernel that got the original text would follow a link before the `..` behind it.
    is_protected(&clean) || is_protected(&resolved(&clean)) || is_protected(&resolved(&asked))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_socket_its_parents_and_the_engines_directories_are_refused() {
        for path in [
            "/var/run/docker.sock",
            "/run/docker.sock",
            "/run/docker.sock/",
            "/run/bulkhead/dockerd.sock",
            "/run/bulkhead",
            "/run/containerd/containerd.sock",
            "/run",
            "/var/run",
            "/var/run/",
            "/var",
            "/",
            "//",
            "/.",
            "/tmp/..",
            "/./run//./docker.sock",
            "/tmp/../run/x/../docker.sock",
            "run/docker.sock",
            "",
        ] {
            assert!(reaches_engine_socket(path), "{path:?}");
        }
    }

    #[test]
    fn paths_beside_the_sockets_are_allowed() {
        for path in ["/home/me", "/var/lib/data", "/runner", "/run/docker.sock.bak", "/variable", "/tmp", "tmpfs"] {
            assert!(!reaches_engine_socket(path), "{path:?}");
        }
    }

    #[test]
    fn links_are_followed() {
        let directory = tempfile::tempdir().unwrap();
        let link = directory.path().join("innocent");
        std::os::unix::fs::symlink("/run", &link).unwrap();
        assert!(reaches_engine_socket(link.to_str().unwrap()));
        assert!(reaches_engine_socket(link.join("docker.sock").to_str().unwrap()));
        assert!(reaches_engine_socket(&format!("{}/lib/..", link.display())));
        assert!(!reaches_engine_socket(link.join("user").to_str().unwrap()));
    }

    proptest! {
        #[test]
        fn no_detour_hides_a_socket(detours in proptest::collection::vec("(\\./|/|x/\\.\\./|\\.\\./run/)", 0..6)) {
            let path = format!("/run/{}docker.sock", detours.concat());
            prop_assert!(reaches_engine_socket(&path), "{path}");
        }

        #[test]
        fn no_path_makes_it_panic(path in ".{0,200}") {
            reaches_engine_socket(&path);
        }

        #[test]
        fn a_lexical_path_is_absolute_and_stable(path in "[a-z./]{0,60}") {
            let once = lexical(&path);
            prop_assert!(once.is_absolute());
            prop_assert_eq!(lexical(once.to_str().unwrap()), once);
        }
    }
}
