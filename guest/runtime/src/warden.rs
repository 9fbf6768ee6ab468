//! Files of `/proc` and `/sys` that the container has of its own: the warden serves them, and they are mounted over the
//! kernel's.
//!
//! They inform the container about itself and protect nothing: what the kernel does not allow in a user namespace, it
//! does not allow behind them either.

use std::path::Path;

use bulkhead_warden::{
    NODES, Node,
    namespace::Identity,
    registry::{Container, Process, Registry, STATE, TREE, cgroup_path},
    traps::SOCKET,
};
use serde_json::{Value, json};

use crate::{
    error::Error,
    spec::{self, seccomp_notify},
};

/// Tells the warden of the container and has its files mounted.
pub(crate) fn attach(
    spec: &mut Value,
    id: &str,
    state_root: &Path,
    owner: u32,
    user_namespace: Identity,
) -> Result<(), Error> {
    let failed = Error::system("enter the container into the warden's list");
    let read_only = is_read_only(spec, Path::new("/proc/sys"));
    let nodes: Vec<_> = NODES.iter().filter(|node| node.adds(read_only) && node.exists()).collect();
    let enter = || {
        let creator = Process::find(std::process::id()).ok_or(std::io::ErrorKind::NotFound)?;
        let cgroup = spec["linux"]["cgroupsPath"].as_str().and_then(cgroup_path);
        let (id, state_root) = (id.to_owned(), state_root.to_owned());
        Registry::open(Path::new(STATE))?.enter(Container {
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
    // In a procfs or sysfs that the container mounts itself, too.
    seccomp_notify::forget_others(spec);
    if Path::new(SOCKET).exists() {
        seccomp_notify::hold(spec, Path::new(SOCKET), slot);
    }
    Ok(())
}

/// Whether crun is going to make a path read-only.
fn is_read_only(spec: &Value, path: &Path) -> bool {
    let paths = spec["linux"]["readonlyPaths"].as_array().into_iter().flatten();
    paths.filter_map(Value::as_str).any(|read_only| path.starts_with(read_only))
}

/// The mounts of those nodes whose places are in file systems of the container's own.
fn mounts(spec: &Value, nodes: &[&Node], directory: &Path) -> Vec<Value> {
    let destinations: Vec<_> = spec["mounts"].as_array().into_iter().flatten().collect();
    let mounted = |root: &str, kind: &str| {
        destinations.iter().rfind(|mount| mount["destination"] == root).filter(|mount| mount["type"] == kind)
    };
    // A mount of the person's own at or above the place is what they want to see.
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
        // Below /proc/sys crun's own binding would lose it; the warden refuses to write there.
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
    fn nothing_is_mounted_where_there_is_no_procfs_or_a_mount_of_ones_own() {
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
