//! Which paths of the VM a container may have bound into it.
//!
//! What counts is not the name but what is really there: the source is opened once, links are followed by that, and
//! a mount on the way is traced to the file system and the directory of it that it shows.

use std::path::{Component, Path, PathBuf};

use crate::mountinfo::Mount;

/// The places from which binds may come.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    /// The engine's data directory.
    pub(crate) data_root: PathBuf,
    /// Where the person's own directories are mounted.
    pub(crate) shares: Vec<PathBuf>,
    /// The engine's little init, by any of its paths.
    pub(crate) init: Vec<PathBuf>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            data_root: "/var/lib/docker".into(),
            shares: vec!["/host_mnt".into(), "/run/bulkhead/shares".into()],
            init: [
                "/usr/bin/docker-init",
                "/usr/libexec/docker/docker-init",
                "/usr/bin/tini-static",
                "/usr/sbin/docker-init",
            ]
            .map(PathBuf::from)
            .to_vec(),
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asker<'a> {
    /// Containers whose own files it may have: those whose user namespace it shares, and last itself.
    pub(crate) containers: &'a [String],
    /// The step of an image build rather than a container.
    pub(crate) build: bool,
}

/// A source, opened.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    /// The path that the kernel knows it by.
    pub(crate) path: &'a Path,
    /// The mount that it is on.
    pub(crate) mount: &'a Mount,
}

impl Source<'_> {
    /// The path inside of its file system.
    fn inner(&self) -> PathBuf {
        inner(self.mount, self.path)
    }
}

fn inner(mount: &Mount, path: &Path) -> PathBuf {
    match path.strip_prefix(&mount.point) {
        Ok(rest) if rest.as_os_str().is_empty() => mount.root.clone(),
        Ok(rest) => mount.root.join(rest),
        Err(_) => mount.root.clone(),
    }
}

impl Policy {
    /// Whether `source` may be bound.
    ///
    /// `data` is the data directory, opened the same way, and `table` the mounts of the VM.
    pub(crate) fn allows(&self, source: Source<'_>, data: Source<'_>, table: &[Mount], asker: Asker<'_>) -> bool {
        if self.init.iter().any(|init| init == source.path) {
            return true;
        }
        if source.mount.device == data.mount.device {
            // The same file system can show one directory at many paths: judge by the one below the data directory.
            return source
                .inner()
                .strip_prefix(data.inner())
                .is_ok_and(|rest| self.allows_name(&self.data_root.join(rest), asker));
        }
        let shown_elsewhere = table.iter().any(|other| {
            other.device == source.mount.device
                && source.inner().starts_with(&other.root)
                && !self.is_for_containers(&other.point, asker)
        });
        self.allows_name(source.path, asker) && !shown_elsewhere
    }

    /// Whether the mount point is one where only things for containers are mounted.
    fn is_for_containers(&self, point: &Path, asker: Asker<'_>) -> bool {
        let below = |name: &str| point.starts_with(self.data_root.join(name));
        self.shares.iter().any(|share| point.starts_with(share))
            || below("volumes")
            || below("containers")
            || asker.build && (below("buildkit") || below("overlay2") || below("tmp"))
    }

    fn allows_name(&self, path: &Path, asker: Asker<'_>) -> bool {
        if self.shares.iter().any(|share| path.starts_with(share)) {
            return true;
        }
        let Ok(rest) = path.strip_prefix(&self.data_root) else { return false };
        let names: Option<Vec<&str>> = rest
            .components()
            .map(|component| match component {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        match names.as_deref() {
            Some(["volumes", _, "_data", ..]) => true,
            Some(["containers", id, "hosts" | "hostname" | "resolv.conf"] | ["containers", id, "mounts", _, ..]) => {
                asker.containers.iter().any(|container| container == id)
            }
            Some(["buildkit" | "overlay2" | "tmp", _, ..]) => asker.build,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mountinfo;

    const TABLE: &str = "1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /var/lib/docker rw - ext4 b rw\n\
        3 1 0:5 / /run rw - tmpfs t rw\n4 1 0:6 / /host_mnt rw - virtiofs s rw\n\
        5 2 0:7 / /var/lib/docker/volumes/tmp/_data rw - tmpfs t rw\n\
        6 2 8:1 /etc /var/lib/docker/volumes/bad/_data rw - ext4 a rw\n\
        7 2 8:2 / /var/lib/docker/volumes/disk/_data rw - ext4 b rw\n\
        8 2 8:2 /volumes/a/_data/sub /tmp/safepath rw - ext4 b rw\n\
        9 2 0:8 / /var/lib/docker/containers/me/mounts/shm rw - tmpfs shm rw\n\
        10 2 0:5 /docker.sock /var/lib/docker/volumes/sock/_data rw - tmpfs t rw\n";

    fn judge(path: &str, build: bool) -> bool {
        let table = mountinfo::parse(TABLE.as_bytes());
        let path = Path::new(path);
        let on = |path: &Path| {
            table.iter().filter(|m| path.starts_with(&m.point)).max_by_key(|m| m.point.as_os_str().len()).unwrap()
        };
        let data = Path::new("/var/lib/docker");
        Policy::default().allows(
            Source { path, mount: on(path) },
            Source { path: data, mount: on(data) },
            &table,
            Asker { containers: &["me".to_owned()], build },
        )
    }

    #[test]
    fn volumes_shares_and_the_containers_own_files_are_allowed() {
        for path in [
            "/var/lib/docker/volumes/a/_data",
            "/var/lib/docker/volumes/a/_data/x/y",
            "/host_mnt/home/me",
            "/host_mnt",
            "/var/lib/docker/containers/me/hosts",
            "/var/lib/docker/containers/me/mounts/shm",
            "/usr/bin/docker-init",
            "/var/lib/docker/volumes/tmp/_data",
            "/tmp/safepath",
        ] {
            assert!(judge(path, false), "{path}");
        }
    }

    #[test]
    fn paths_of_the_vm_are_refused() {
        for path in [
            "/",
            "/etc/docker/daemon.json",
            "/run/docker.sock",
            "/var/lib/docker",
            "/var/lib/docker/volumes",
            "/var/lib/docker/volumes/a",
            "/var/lib/docker/volumes/metadata.db",
            "/var/lib/docker/overlay2/x/diff",
            "/var/lib/docker/containers/me",
            "/var/lib/docker/containers/me/config.v2.json",
            "/var/lib/docker/containers/other/hosts",
            "/host_mnt2",
            "/usr/bin/docker-initx",
            "/var/lib/docker/buildkit/x",
        ] {
            assert!(!judge(path, false), "{path}");
        }
    }

    #[test]
    fn a_volume_that_shows_a_path_of_the_vm_is_refused() {
        for volume in ["bad", "disk", "sock"] {
            assert!(!judge(&format!("/var/lib/docker/volumes/{volume}/_data"), false), "{volume}");
        }
    }

    #[test]
    fn a_build_step_may_have_what_the_builder_makes_and_nothing_else() {
        assert!(judge("/var/lib/docker/buildkit/executor/hosts.x", true));
        assert!(judge("/var/lib/docker/overlay2/x/diff", true));
        assert!(!judge("/var/lib/docker/containers/other/hosts", true));
        assert!(!judge("/etc", true));
    }

    proptest! {
        #[test]
        fn nothing_outside_of_the_listed_places_is_ever_allowed(path in "(/(etc|run|var|lib|docker|volumes|_data|host_mnt|[a-z]{1,3})){0,7}") {
            let path = if path.is_empty() { "/".to_owned() } else { path };
            if judge(&path, false) {
                let parts: Vec<_> = path.split('/').collect();
                prop_assert!(
                    parts[1] == "host_mnt"
                        || parts.len() > 5 && parts[1..5] == ["var", "lib", "docker", "volumes"] && parts[6] == "_data",
                    "{}", path
                );
            }
        }
    }
}
