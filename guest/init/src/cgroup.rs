//! One cgroup (v2) per service.
//!
//! A daemon in the root cgroup finds no `memory.swap.max` beside itself, and dockerd then says that the kernel can't
//! limit swap; also nothing in the root can be killed or measured as a whole.

use std::{
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
};

use crate::{error::Error, log};

const ROOT: &str = "/sys/fs/cgroup";

/// Where the services' cgroups are; containers are in `/docker`, beside it.
const SYSTEM: &str = "/sys/fs/cgroup/system";

/// `+a +b …` from the kernel's `a b …`.
fn enable_all(controllers: &str) -> String {
    controllers.split_whitespace().map(|name| format!("+{name}")).collect::<Vec<_>>().join(" ")
}

fn delegate(group: &str) -> Result<(), Error> {
    let available = format!("{group}/cgroup.controllers");
    let wanted = enable_all(&fs::read_to_string(&available).map_err(Error::file("read", &available))?);
    let target = format!("{group}/cgroup.subtree_control");
    if fs::write(&target, &wanted).is_ok() {
        return Ok(());
    }
    // One controller that refuses (cpu with real-time tasks, say) must not cost the others.
    for controller in wanted.split_whitespace() {
        if let Err(error) = fs::write(&target, controller) {
            log::info(&format!("cgroup controller {controller} is not available: {error}"));
        }
    }
    Ok(())
}

/// Enables every controller for the services and moves init out of the root.
pub(crate) fn set_up() -> Result<(), Error> {
    delegate(ROOT)?;
    fs::create_dir_all(SYSTEM).map_err(Error::file("make the cgroup", SYSTEM))?;
    delegate(SYSTEM)?;
    let own = create("init")?;
    let procs = own.join("cgroup.procs");
    fs::write(&procs, "1").map_err(Error::file("move init to", procs))
}

/// Makes the cgroup of a service.
pub(crate) fn create(name: &str) -> Result<PathBuf, Error> {
    let group = Path::new(SYSTEM).join(name);
    fs::create_dir_all(&group).map_err(Error::file("make the cgroup", &group))?;
    Ok(group)
}

/// Opens the file through which a process that writes `0` enters the group.
pub(crate) fn open_procs(group: &Path) -> Result<File, Error> {
    let procs = group.join("cgroup.procs");
    OpenOptions::new().write(true).open(&procs).map_err(Error::file("open", procs))
}

/// Kills every container (`cgroup.kill`, Linux 5.14).
pub(crate) fn kill_containers() {
    let _ = fs::write(Path::new(ROOT).join("docker/cgroup.kill"), "1");
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
