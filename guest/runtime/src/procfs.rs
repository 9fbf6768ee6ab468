//! The container's own files of `/proc` and `/sys`: the procfs service serves them, and crun mounts them over the
//! kernel's.
//!
//! They inform the container about itself and protect nothing: an access that the kernel refuses in a user namespace,
//! it refuses behind them as well.

use std::path::Path;

use bulkhead_guest_common::{
    namespace::Identity,
    process::Process,
    registry::{Container, Registry, STATE, TREE, cgroup_path},
};
use bulkhead_procfs::{NODES, Node, seccomp_notify::SOCKET};
use serde_json::{Value, json};

use crate::{
    error::Error,
    spec::{self, seccomp_notify},
};

/// Enters the container into the service's registry, and has its files mounted.
pub(crate) fn attach(
    spec: &mut Value,
    id: &str,
    state_root: &Path,
    owner: u32,
    user_namespace: Identity,
) -> Result<(), Error> {
    let failed = Error::system("register the container with the procfs service");
    let read_only = is_read_only(spec, Path::new("/proc/sys"));
    // A file without the kernel's own below it has no mount point.
    let nodes: Vec<_> = NODES.iter().filter(|node| node.adds(read_only) && node.exists()).collect();
    let enter = || {
        let creator = Process::find(std::process::id()).ok_or(std::io::ErrorKind::NotFound)?;
        let cgroup = spec["linux"]["cgroupsPath"].as_str().and_then(cgroup_path);
        let (id, state_root) = (id.to_owned(), state_root.to_owned());
        // The registry is files, so the service need not be running, and never makes a container wait.
        Registry::open(Path::new(STATE))?.enter(Container {
            // Chosen by the registry.
            slot: 0,
            id,
            state_root,
            owner,
            user_namespace,
            cgroup,
            read_only,
            creator,
        })
    };
    let slot = enter().map_err(failed)?;
    let added = mounts(spec, &nodes, &Path::new(TREE).join(slot.to_string()));
    if let Some(list) = spec::array(spec, "mounts") {
        list.extend(added);
    }
    // Removed in any case: with a listener of the user's, ours could not be added, and crun would connect to theirs.
    seccomp_notify::remove_foreign_listener(spec);
    // A procfs or sysfs that the container mounts itself gets the files as well. Without the socket crun would fail.
    if Path::new(SOCKET).exists() {
        seccomp_notify::notify_mounts(spec, Path::new(SOCKET), slot);
    }
    Ok(())
}

/// True if crun is going to make the path read-only.
fn is_read_only(spec: &Value, path: &Path) -> bool {
    let paths = spec["linux"]["readonlyPaths"].as_array().into_iter().flatten();
    paths.filter_map(Value::as_str).any(|read_only| path.starts_with(read_only))
}

/// The entries for crun: the files whose places are on a procfs or sysfs that the spec itself mounts.
fn mounts(spec: &Value, nodes: &[&Node], directory: &Path) -> Vec<Value> {
    let destinations: Vec<_> = spec["mounts"].as_array().into_iter().flatten().collect();
    // The last mount on a path is the one that the container sees.
    let mounted = |root: &str, kind: &str| {
        destinations.iter().rfind(|mount| mount["destination"] == root).filter(|mount| mount["type"] == kind)
    };
    // A user's own mount at the place or above it takes precedence.
    let is_covered = |path: &Path| {
        let others = destinations.iter().filter_map(|mount| mount["destination"].as_str());
        others.filter(|other| !["/", "/proc", "/sys"].contains(other)).any(|other| path.starts_with(other))
    };
    let has_option =
        |mount: &Value, option: &str| mount["options"].as_array().into_iter().flatten().any(|one| one == option);
    let sysfs_is_read_only = mounted("/sys", "sysfs").is_some_and(|mount| has_option(mount, "ro"));
    let is_wanted = |node: &&&Node| {
        let in_place =
            if node.path.starts_with("/proc/") { mounted("/proc", "proc") } else { mounted("/sys", "sysfs") };
        in_place.is_some() && !is_covered(Path::new(node.path))
    };
    let entry = |node: &&Node| {
        let path = Path::new(node.path);
        // A mount on a read-only /sys is not read-only by itself. Below /proc/sys crun's bind of the path onto itself
        // would lose the `ro`; there the service refuses to write.
        let read_only = path.starts_with("/sys") && sysfs_is_read_only;
        let source = directory.join(node.file_name());
        let options = ["bind", "rprivate", "nosuid", "nodev", "noexec", if read_only { "ro" } else { "rw" }];
        json!({ "destination": node.path, "type": "bind", "source": source.to_string_lossy(), "options": options })
    };
    nodes.iter().filter(is_wanted).map(entry).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::testing;

    fn all() -> Vec<&'static Node> {
        NODES.iter().collect()
    }

    fn docker() -> Value {
        let mut spec = testing::docker();
        spec["mounts"] = json!([
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"] },
        ]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/bus", "/proc/sys"]);
        spec
    }

    fn options(spec: &Value, path: &str) -> Option<Value> {
        let mounts = mounts(spec, &all(), Path::new("/t/7"));
        mounts.into_iter().find(|mount| mount["destination"] == path).map(|mount| mount["options"][5].clone())
    }

    #[test]
    fn each_file_comes_from_the_containers_own_directory() {
        let mounts = mounts(&docker(), &all(), Path::new("/t/7"));
        assert_eq!(mounts.len(), NODES.len());
        assert_eq!(mounts[0]["source"], "/t/7/proc+uptime");
        assert_eq!(mounts[0]["destination"], "/proc/uptime");
    }

    #[test]
    fn what_docker_makes_read_only_is_and_a_privileged_container_may_write() {
        let mut spec = docker();
        let hashsize = "/sys/module/nf_conntrack/parameters/hashsize";
        assert_eq!(options(&spec, hashsize), Some("ro".into()));
        assert!(is_read_only(&spec, Path::new("/proc/sys")));
        spec["linux"]["readonlyPaths"] = Value::Null;
        spec["mounts"][1]["options"] = json!(["rw"]);
        assert_eq!(options(&spec, hashsize), Some("rw".into()));
        assert!(!is_read_only(&spec, Path::new("/proc/sys")));
    }

    #[test]
    fn nothing_is_mounted_without_a_procfs_or_over_a_users_own_mount() {
        let mut spec = docker();
        spec["mounts"][0]["type"] = "tmpfs".into();
        assert_eq!(options(&spec, "/proc/uptime"), None);
        assert!(options(&spec, "/sys/devices/system/cpu/online").is_some());
        let mut spec = docker();
        let own = json!({ "destination": "/proc/uptime", "type": "bind", "source": "/x" });
        spec["mounts"].as_array_mut().unwrap().push(own);
        assert_eq!(options(&spec, "/proc/uptime"), None);
        assert!(options(&spec, "/proc/meminfo").is_some());
    }

    proptest! {
        #[test]
        fn no_json_panics(spec in testing::any_json()) {
            let _ = mounts(&spec, &all(), Path::new("/t/7"));
        }
    }
}
