//! One cgroup (v2) for each service, and the one above all containers.
//!
//! The root cgroup has no `memory.swap.max`, so a dockerd in it would report that the kernel cannot limit swap.
//! Processes in the root can neither be killed nor measured as a group.

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
};

use crate::{ceilings::Ceilings, error::Error, log};

const ROOT: &str = "/sys/fs/cgroup";

/// Parent of the services' cgroups; containers are in `/docker`, beside it.
const SYSTEM: &str = "/sys/fs/cgroup/system";

/// Parent of the containers' cgroups and of the builder's, by dockerd's own default (`daemon/oci_linux.go`).
pub(crate) const CONTAINERS: &str = "/sys/fs/cgroup/docker";

/// Turns the kernel's `a b …` into `+a +b …`.
fn enable_all(controllers: &str) -> String {
    controllers.split_whitespace().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
}

/// Makes all controllers that `group` has available in its children.
fn delegate(group: &str) -> Result<(), Error> {
    let available = format!("{group}/cgroup.controllers");
    let wanted = enable_all(&fs::read_to_string(&available).map_err(Error::file("read", &available))?);
    let target = format!("{group}/cgroup.subtree_control");
    // All or nothing in one write.
    if fs::write(&target, &wanted).is_ok() {
        return Ok(());
    }
    // One controller that cannot be enabled (such as cpu while there are real-time tasks) must not cost the others.
    for controller in wanted.split_whitespace() {
        if let Err(error) = fs::write(&target, controller) {
            log::info(&format!("cannot enable the cgroup controller {controller}: {error}"));
        }
    }
    Ok(())
}

/// Enables every controller for the services and moves init out of the root.
pub(crate) fn set_up() -> Result<(), Error> {
    delegate(ROOT)?;
    fs::create_dir_all(SYSTEM).map_err(Error::file("create the cgroup", SYSTEM))?;
    delegate(SYSTEM)?;
    // A cgroup other than the root cannot have both processes and children with controllers, so init is in a leaf.
    let own = create("init")?;
    let procs = own.join("cgroup.procs");
    fs::write(&procs, "1").map_err(Error::file("move init to", procs))
}

/// Limits what containers take together and sets aside what the services need. dockerd uses the group that it finds.
///
/// A limit that cannot be set is logged: containers work without it.
pub(crate) fn limit(ceilings: &Ceilings) -> Result<(), Error> {
    fs::create_dir_all(CONTAINERS).map_err(Error::file("create the cgroup", CONTAINERS))?;
    for (file, value) in [
        (format!("{CONTAINERS}/memory.max"), ceilings.containers_memory),
        (format!("{CONTAINERS}/pids.max"), ceilings.containers_threads),
        // `memory_recursiveprot` passes it on to the services' own groups.
        (format!("{SYSTEM}/memory.min"), ceilings.services_memory),
    ] {
        if let Err(error) = fs::write(&file, value.to_string()) {
            log::info(&format!("cannot set {file}: {error}"));
        }
    }
    Ok(())
}

/// Creates the cgroup of a service, which remains when the service ends.
pub(crate) fn create(name: &str) -> Result<PathBuf, Error> {
    let group = Path::new(SYSTEM).join(name);
    fs::create_dir_all(&group).map_err(Error::file("create the cgroup", &group))?;
    Ok(group)
}

/// Opens `cgroup.procs`; a process that writes `0` to it enters the group.
pub(crate) fn open_procs(group: &Path) -> Result<File, Error> {
    let procs = group.join("cgroup.procs");
    OpenOptions::new().write(true).open(&procs).map_err(Error::file("open", procs))
}

/// Kills every process of every container (`cgroup.kill`, Linux 5.14).
pub(crate) fn kill_containers() {
    // One write reaches the whole tree, including processes that are forked meanwhile.
    let _ = fs::write(Path::new(CONTAINERS).join("cgroup.kill"), "1");
}

#[cfg(test)]
mod tests {
    use super::enable_all;

    #[test]
    fn every_available_controller_is_enabled_in_one_write() {
        assert_eq!(enable_all("cpuset cpu io\n"), "+cpuset +cpu +io");
        assert_eq!(enable_all("\n"), "");
    }
}
