//! The rules for sources of bind mounts: which places of the VM a container may have.
//!
//! The name of a source counts for nothing. It is opened once, which follows its links, and the mount that it turns out
//! to be on is traced to a file system and a directory there. A path of the VM under another name is still that path.

use std::path::{Component, Path, PathBuf};

use bulkhead_guest_common::mountinfo::Mount;
use bulkhead_policy::{
    shares::MOUNT_POINT,
    sources::{TIME_ZONE_FILES, is_host_socket},
    volumes,
};

/// The files in a container's directory that the engine binds into the container and goes on reading and writing
/// itself.
const ENGINE_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// The places from which binds may come; all else belongs to the VM.
#[derive(Clone, Debug)]
pub(crate) struct SourcePolicy {
    /// The engine's data directory.
    pub(crate) data_root: PathBuf,
    /// The mount point of the host's directories.
    pub(crate) shares: PathBuf,
    /// Files of the guest that containers may have: all paths of the engine's init program, which `docker run --init`
    /// binds into a container, the directory of the kernel's modules, by the path that its links lead to, and the files
    /// of the time zone. The file system of each is read-only as a whole, as is that of the host's sockets.
    pub(crate) of_image: Vec<PathBuf>,
}

impl Default for SourcePolicy {
    fn default() -> Self {
        Self {
            data_root: "/var/lib/docker".into(),
            shares: MOUNT_POINT.into(),
            of_image: [
                "/usr/bin/docker-init",
                "/usr/libexec/docker/docker-init",
                "/usr/bin/tini-static",
                "/usr/sbin/docker-init",
                "/usr/lib/modules",
            ]
            .into_iter()
            .chain(TIME_ZONE_FILES)
            .map(PathBuf::from)
            .collect(),
        }
    }
}

/// The container, or the step of an image build, that asks for a bind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requester<'a> {
    /// The containers whose own files it may have: those that share its user namespace, and itself last.
    pub(crate) containers: &'a [String],
    /// It is a step of an image build.
    pub(crate) is_build: bool,
}

/// An open source.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OpenedSource<'a> {
    /// The kernel's own path of it.
    pub(crate) path: &'a Path,
    /// The mount that it is on.
    pub(crate) mount: &'a Mount<'a>,
}

impl OpenedSource<'_> {
    /// The path inside its file system, the same for every mount that shows it.
    fn path_in_fs(&self) -> PathBuf {
        match self.path.strip_prefix(self.mount.point()) {
            // `join` with an empty path would append a slash.
            Ok(rest) if rest.as_os_str().is_empty() => self.mount.root(),
            Ok(rest) => self.mount.root().join(rest),
            Err(_) => self.mount.root(),
        }
    }
}

impl SourcePolicy {
    /// Decides whether `source` may be bound.
    ///
    /// `data_root` is the data directory, opened in the same way, and `mounts` the VM's table.
    pub(crate) fn allows(
        &self,
        source: OpenedSource<'_>,
        data_root: OpenedSource<'_>,
        mounts: &[Mount<'_>],
        requester: Requester<'_>,
    ) -> bool {
        // Compared as a whole: it is on the guest image, where no container can write it or replace it with a link.
        if self.is_of_image(source.path) {
            return true;
        }
        if source.mount.device == data_root.mount.device {
            return self.position(source, data_root).is_some_and(|path| self.allows_path(&path, requester));
        }
        if !self.allows_type(source, mounts, requester) {
            return false;
        }
        // On another file system the position says nothing, and an allowed path is not enough: a volume whose driver
        // options bind /etc is at an allowed path. Such a directory is also mounted somewhere for the VM itself.
        let is_used_by_vm = mounts.iter().any(|other| {
            other.device == source.mount.device
                && source.path_in_fs().starts_with(other.root())
                && !self.is_for_containers(&other.point(), requester)
        });
        self.allows_path(source.path, requester) && !is_used_by_vm
    }

    /// True for a container's `hosts`, `hostname` or `resolv.conf` in the engine's data directory.
    pub(crate) fn is_engine_file(&self, source: OpenedSource<'_>, data_root: OpenedSource<'_>) -> bool {
        let path = self.position(source, data_root).unwrap_or_else(|| source.path.to_owned());
        let Ok(rest) = path.strip_prefix(self.data_root.join("containers")) else { return false };
        let mut names = rest.components().skip(1).map(Component::as_os_str);
        names.next().is_some_and(|name| ENGINE_FILES.iter().any(|file| name == *file)) && names.next().is_none()
    }

    /// The place of a source that is on the data directory's file system, as a path below that directory.
    ///
    /// One file system can show a directory at many paths. dockerd binds `volume-subpath`s through a path in /tmp, and
    /// a volume with driver options can show all of the data disk as its `_data`. The position below the data directory
    /// decides, whatever path was opened.
    fn position(&self, source: OpenedSource<'_>, data_root: OpenedSource<'_>) -> Option<PathBuf> {
        let path = source.path_in_fs();
        let rest = path.strip_prefix(data_root.path_in_fs()).ok()?;
        (source.mount.device == data_root.mount.device).then(|| self.data_root.join(rest))
    }

    /// True for a file or directory of the guest image, or a socket of the host, that every container may have.
    pub(super) fn is_of_image(&self, path: &Path) -> bool {
        self.of_image.iter().any(|allowed| allowed == path) || path.to_str().is_some_and(is_host_socket)
    }

    /// True if a file system beside the data disk's may be of this type.
    ///
    /// A volume's driver options name any type, and dockerd mounts it as the VM's root. Most are a way to the VM's
    /// files or processes even where they are mounted nowhere else (overlay, proc), or have the kernel parse an image
    /// that a container wrote (erofs, squashfs).
    fn allows_type(&self, source: OpenedSource<'_>, mounts: &[Mount<'_>], requester: Requester<'_>) -> bool {
        match source.mount.fs_type {
            // The host's directories, as themselves or as a volume: the very file system that is mounted there.
            b"virtiofs" => mounts.iter().any(|mount| {
                mount.device == source.mount.device && mount.fs_type == b"virtiofs" && mount.point() == self.shares
            }),
            // Shared memory, secrets, and volumes in memory; it is empty when it is new.
            b"tmpfs" => !source.path.starts_with(&self.shares),
            // Volumes on a server of the network, which has nothing of the VM.
            kind if volumes::is_on_server(kind) => self.is_volume(source.path),
            // The layers of another stage or image, mounted by the builder itself.
            b"overlay" => requester.is_build,
            _ => false,
        }
    }

    fn is_volume(&self, path: &Path) -> bool {
        path.starts_with(self.data_root.join("volumes"))
    }

    /// True for a mount point below which there are only mounts for containers.
    fn is_for_containers(&self, point: &Path, requester: Requester<'_>) -> bool {
        let below = |name: &str| point.starts_with(self.data_root.join(name));
        point.starts_with(&self.shares)
            || self.is_volume(point)
            || below("containers")
            || requester.is_build && (below("buildkit") || below("overlay2") || below("tmp"))
    }

    fn allows_path(&self, path: &Path, requester: Requester<'_>) -> bool {
        if path.starts_with(&self.shares) {
            return true;
        }
        let Ok(rest) = path.strip_prefix(&self.data_root) else { return false };
        // `None` for a `..` or a name that is not UTF-8: dockerd makes neither, so both are refused.
        let names: Option<Vec<&str>> = rest
            .components()
            .map(|component| match component {
                Component::Normal(name) => name.to_str(),
                _ => None,
            })
            .collect();
        match names.as_deref() {
            // A volume's contents, but not its directory: beside `_data` dockerd keeps the volume's options.
            Some(["volumes", _, "_data", ..]) => true,
            // Single files, since config.v2.json and hostconfig.json beside them decide about the next start.
            Some(["containers", id, rest @ ..]) => {
                let is_listed = match rest {
                    [file] => ENGINE_FILES.contains(file),
                    [mounts, _, ..] => *mounts == "mounts",
                    [] => false,
                };
                is_listed && requester.containers.iter().any(|container| container == id)
            }
            // BuildKit's files of the step, the layers and cache mounts that it works on, and its temporary mounts.
            Some(["buildkit" | "overlay2" | "tmp", _, ..]) => requester.is_build,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::mountinfo;
    use proptest::prelude::*;

    use super::*;

    const TABLE: &str = "1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /var/lib/docker rw - ext4 b rw\n\
        3 1 0:5 / /run rw - tmpfs t rw\n4 1 0:6 / /host_mnt rw - virtiofs s rw\n\
        5 2 0:7 / /var/lib/docker/volumes/tmp/_data rw - tmpfs t rw\n\
        6 2 8:1 /etc /var/lib/docker/volumes/bad/_data rw - ext4 a rw\n\
        7 2 8:2 / /var/lib/docker/volumes/disk/_data rw - ext4 b rw\n\
        8 2 8:2 /volumes/a/_data/sub /tmp/safepath rw - ext4 b rw\n\
        9 2 0:8 / /var/lib/docker/containers/me/mounts/shm rw - tmpfs shm rw\n\
        11 2 0:9 / /var/lib/docker/volumes/overlay/_data rw - overlay overlay rw,lowerdir=/etc\n\
        12 2 0:10 / /var/lib/docker/volumes/proc/_data rw - proc proc rw\n\
        13 2 0:11 / /var/lib/docker/volumes/image/_data ro - erofs none ro\n\
        14 2 0:12 / /var/lib/docker/volumes/fuse/_data rw - fuse.tmpfs tmpfs rw\n\
        15 2 0:13 / /host_mnt/odd rw - tmpfs t rw\n\
        16 2 0:14 / /var/lib/docker/tmp/buildkit-mount1 rw - overlay overlay rw\n\
        17 2 0:15 / /var/lib/docker/volumes/nfs/_data rw - nfs :/export rw\n\
        18 2 0:16 / /var/lib/docker/volumes/nfs4/_data rw - nfs4 :/export rw\n\
        19 2 0:16 / /var/lib/docker/volumes/same/_data rw - nfs4 :/export rw\n\
        20 2 0:17 / /var/lib/docker/volumes/cifs/_data rw - cifs //server/share rw\n\
        21 2 0:18 / /var/lib/docker/tmp/nfs rw - nfs4 :/export rw\n\
        22 2 0:19 / /var/lib/docker/volumes/shown/_data rw - nfs4 :/export rw\n\
        23 1 0:19 / /srv rw - nfs4 :/export rw\n\
        24 2 0:6 /home/me/data /var/lib/docker/volumes/share/_data rw - virtiofs s rw\n\
        25 2 0:20 / /var/lib/docker/volumes/other/_data rw - virtiofs s rw\n\
        26 2 0:20 / /host_mnt/other rw - virtiofs s rw\n\
        10 2 0:5 /docker.sock /var/lib/docker/volumes/sock/_data rw - tmpfs t rw\n";

    fn allows(path: &str, build: bool) -> bool {
        let table = mountinfo::parse(TABLE.as_bytes()).collect::<Vec<_>>();
        let path = Path::new(path);
        let on = |path: &Path| {
            table.iter().filter(|m| path.starts_with(m.point())).max_by_key(|m| m.point().as_os_str().len()).unwrap()
        };
        let data = Path::new("/var/lib/docker");
        SourcePolicy::default().allows(
            OpenedSource { path, mount: on(path) },
            OpenedSource { path: data, mount: on(data) },
            &table,
            Requester { containers: &["me".to_owned()], is_build: build },
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
            "/usr/lib/modules",
            "/run/host-services/ssh-auth.sock",
            "/run/host-services/0123456789abcdef.sock",
            "/var/lib/docker/volumes/tmp/_data",
            "/var/lib/docker/volumes/nfs/_data",
            "/var/lib/docker/volumes/nfs4/_data/x",
            "/var/lib/docker/volumes/cifs/_data",
            "/var/lib/docker/volumes/share/_data/x",
            "/tmp/safepath",
        ] {
            assert!(allows(path, false), "{path}");
        }
    }

    #[test]
    fn the_engines_own_files_of_a_container_are_known_under_any_path() {
        // The last mount shows a container's directory at a place of another kind.
        let text = format!("{TABLE}30 2 8:2 /containers/me /tmp/shown rw - ext4 b rw\n");
        let table = mountinfo::parse(text.as_bytes()).collect::<Vec<_>>();
        let source = |path: &'static str| {
            let on = table.iter().filter(|mount| Path::new(path).starts_with(mount.point()));
            let mount = on.max_by_key(|mount| mount.point().as_os_str().len()).unwrap();
            OpenedSource { path: Path::new(path), mount }
        };
        let is_engine_file = |path| SourcePolicy::default().is_engine_file(source(path), source("/var/lib/docker"));
        for path in
            ["/var/lib/docker/containers/me/hosts", "/var/lib/docker/containers/x/resolv.conf", "/tmp/shown/hostname"]
        {
            assert!(is_engine_file(path), "{path}");
        }
        for path in [
            "/var/lib/docker/containers/me",
            "/var/lib/docker/containers/me/hosts2",
            "/var/lib/docker/containers/me/hosts/x",
            "/var/lib/docker/containers/me/mounts/hosts",
            "/var/lib/docker/containers/hosts",
            "/var/lib/docker/volumes/me/hosts",
            "/etc/hosts",
        ] {
            assert!(!is_engine_file(path), "{path}");
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
            "/usr/lib",
            "/usr/lib/modules/x",
            "/run/host-services",
            "/run/host-services/other.sock",
            "/run/host-services/ssh-auth.sock2",
            "/var/lib/docker/buildkit/x",
        ] {
            assert!(!allows(path, false), "{path}");
        }
    }

    #[test]
    fn a_volume_that_shows_a_path_of_the_vm_is_refused() {
        // The last one is mounted for the VM as well, which it has no reason to be.
        for volume in ["bad", "disk", "sock", "shown"] {
            assert!(!allows(&format!("/var/lib/docker/volumes/{volume}/_data"), false), "{volume}");
        }
    }

    #[test]
    fn a_volume_of_another_file_system_than_the_data_disks_and_tmpfs_is_refused() {
        for volume in ["overlay", "proc", "image", "fuse"] {
            for build in [false, true] {
                // The builder does not mount volumes, so what its steps have does not matter there.
                let allowed = allows(&format!("/var/lib/docker/volumes/{volume}/_data"), build);
                assert!(!allowed || build && volume == "overlay", "{volume}");
            }
        }
        for path in ["/host_mnt/odd", "/host_mnt/other", "/var/lib/docker/volumes/other/_data"] {
            assert!(!allows(path, false), "{path}");
        }
        assert!(!allows("/var/lib/docker/tmp/nfs", true), "a server is for volumes only");
        assert!(allows("/var/lib/docker/tmp/buildkit-mount1", true));
        assert!(!allows("/var/lib/docker/tmp/buildkit-mount1", false));
    }

    #[test]
    fn a_build_step_may_have_what_the_builder_makes_and_nothing_else() {
        assert!(allows("/var/lib/docker/buildkit/executor/hosts.x", true));
        assert!(allows("/var/lib/docker/overlay2/x/diff", true));
        assert!(!allows("/var/lib/docker/containers/other/hosts", true));
        assert!(!allows("/etc", true));
    }

    proptest! {
        #[test]
        fn nothing_outside_of_the_listed_places_is_ever_allowed(path in "(/(etc|run|var|lib|docker|volumes|_data|host_mnt|[a-z]{1,3})){0,7}") {
            let path = if path.is_empty() { "/".to_owned() } else { path };
            if allows(&path, false) {
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
