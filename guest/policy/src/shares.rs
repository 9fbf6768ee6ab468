//! Directories of the host that containers may mount: the paths by which clients name them, and those in the VM.
//!
//! The shares' file system shows each directory under the path that it has on the host. So a path of the host becomes one
//! of the VM by a prefix, and the other way round.

use super::sources::{ENGINE_SOCKETS, HOST_SERVICES, KERNEL_MODULES, TIME_ZONE_FILES, is_clean};

/// The mount point of the shares' file system.
pub const MOUNT_POINT: &str = "/host_mnt";

/// The shared directories, by their paths on the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shares(Vec<String>);

/// Returns true if a clean path is `directory` or in it.
pub(super) fn is_in(path: &str, directory: &str) -> bool {
    let directory = directory.strip_suffix('/').unwrap_or(directory);
    path.strip_prefix(directory).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Cleans an absolute path as docker's command line does, by its text alone. `None` for a path with `..`, which could mean
/// another place behind a link, and for one that cannot be cleaned without a doubt.
pub fn clean(path: &str) -> Option<String> {
    let names = || path.split('/').filter(|name| !matches!(*name, "" | "."));
    if !path.starts_with('/') || names().any(|name| name == "..") {
        return None;
    }
    let cleaned: String = names().flat_map(|name| ["/", name]).collect();
    if cleaned.is_empty() {
        return Some("/".to_owned());
    }
    is_clean(&cleaned).then_some(cleaned)
}

/// Returns the path on the host of a path in the VM, if it is in the shares' file system.
pub fn on_host(path: &str) -> Option<&str> {
    match path.strip_prefix(MOUNT_POINT)? {
        "" => Some("/"),
        rest => rest.starts_with('/').then_some(rest),
    }
}

/// Returns true for a clean path that means something of the VM, whatever of the host is shared.
pub fn is_special(path: &str) -> bool {
    let is_one_of = |names: &[&str]| names.contains(&path);
    is_one_of(&ENGINE_SOCKETS) || is_one_of(&TIME_ZONE_FILES) || path == KERNEL_MODULES || is_in(path, HOST_SERVICES)
}

/// Returns the path in the VM of a clean path on the host.
fn below_mount_point(path: &str) -> String {
    format!("{MOUNT_POINT}{}", if path == "/" { "" } else { path })
}

impl Shares {
    /// The directories at these paths. One that is not a clean absolute path shares nothing.
    pub fn new(directories: impl IntoIterator<Item = String>) -> Self {
        Self(directories.into_iter().filter(|path| clean(path).as_ref() == Some(path)).collect())
    }

    /// Returns true if nothing is shared.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns true if a clean path of the host is a shared directory, or in one.
    pub fn contains(&self, path: &str) -> bool {
        self.0.iter().any(|directory| is_in(path, directory))
    }

    /// Returns true if a path of the VM leads to a shared directory, or into one, by its text.
    pub fn reach(&self, path: &str) -> bool {
        clean(path).is_some_and(|path| on_host(&path).is_some_and(|path| self.contains(path)))
    }

    /// Returns the path in the VM for the source of a mount that a client names. `None` for a path that is not shared.
    ///
    /// The client writes the host's path, or that of the VM as Docker Desktop has it. Names with a meaning of their own
    /// keep it, whatever is shared.
    pub fn in_vm(&self, path: &str) -> Option<String> {
        let path = clean(path).filter(|path| !is_special(path))?;
        let alias = on_host(&path).filter(|path| self.contains(path));
        alias.or(self.contains(&path).then_some(path.as_str())).map(below_mount_point)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(directories: &[&str]) -> Shares {
        Shares::new(directories.iter().map(|path| (*path).to_owned()))
    }

    #[test]
    fn a_shared_directory_and_what_is_in_it_have_a_place_in_the_vm() {
        let shares = shares(&["/home/me", "/srv/data"]);
        for (path, expected) in [
            ("/home/me", "/host_mnt/home/me"),
            ("/home/me/", "/host_mnt/home/me"),
            ("/home/me/a b/é", "/host_mnt/home/me/a b/é"),
            ("//home/./me//src/.", "/host_mnt/home/me/src"),
            ("/srv/data/x", "/host_mnt/srv/data/x"),
            ("/host_mnt/home/me/x", "/host_mnt/home/me/x"),
            ("/host_mnt//home/me/", "/host_mnt/home/me"),
        ] {
            assert_eq!(shares.in_vm(path).as_deref(), Some(expected), "{path}");
        }
    }

    #[test]
    fn other_paths_have_none() {
        let shares = shares(&["/home/me", "/run"]);
        for path in [
            "",
            "/",
            "home/me",
            "./home/me",
            "/home",
            "/home/me2",
            "/home/you",
            "/HOME/me",
            "/home/me/../you",
            "/home/you/../me",
            "/home/me/..",
            "/home/me\\x",
            "/home/me\0",
            "/home/me\n",
            "/host_mnt",
            "/host_mnt/home",
            "/host_mnt/home/you",
            "/host_mnt/host_mnt/home/me",
            "/host_mnt2/home/me",
            "/run/docker.sock",
            "/run//docker.sock",
        ] {
            assert_eq!(shares.in_vm(path), None, "{path:?}");
        }
        assert_eq!(shares.in_vm("/run/user/1000/bus").as_deref(), Some("/host_mnt/run/user/1000/bus"));
    }

    #[test]
    fn the_whole_host_can_be_shared_but_for_names_with_a_meaning_of_their_own() {
        let all = shares(&["/"]);
        assert_eq!(all.in_vm("/").as_deref(), Some("/host_mnt"));
        assert_eq!(all.in_vm("/etc/hosts").as_deref(), Some("/host_mnt/etc/hosts"));
        assert_eq!(all.in_vm("/var/run/docker.sock"), None);
        assert_eq!(all.in_vm("/lib/modules/"), None);
        assert_eq!(
            (on_host("/host_mnt"), on_host("/host_mnt/x"), on_host("/host_mntx")),
            (Some("/"), Some("/x"), None)
        );
    }

    #[test]
    fn a_directory_that_is_not_a_clean_path_shares_nothing() {
        for path in ["", "home", "/home/", "/home//me", "/home/../etc", "/home/.", "/a\0", "../x"] {
            assert!(shares(&[path]).is_empty(), "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn a_place_in_the_vm_is_in_a_share_and_leads_back(
            directories in proptest::collection::vec("(/(home|me|host_mnt|\\.\\.|a)){0,3}", 0..3),
            path in "(/(home|me|host_mnt|etc|a|\\.|\\.\\.|)){0,6}|.{0,20}",
        ) {
            let shares = Shares::new(directories);
            if let Some(place) = shares.in_vm(&path) {
                prop_assert!(place == MOUNT_POINT || is_clean(&place) && place.starts_with("/host_mnt/"), "{}", place);
                prop_assert!(shares.reach(&place), "{}", place);
                let shown = on_host(&place).unwrap();
                prop_assert!(shares.contains(shown));
                // The path that `docker inspect` shows can be sent again, and the VM's own path means the same.
                prop_assert_eq!(shares.in_vm(&place), Some(place.clone()));
                if on_host(shown).is_none() {
                    prop_assert_eq!(shares.in_vm(shown), Some(place.clone()));
                }
            }
        }
    }
}
