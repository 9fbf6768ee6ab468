//! Values of sysctls that containers have written, in one small file for each container.
//!
//! The files are on a tmpfs and not in memory, so that a restarted service has them.

use std::{collections::BTreeMap, fs, io, sync::Mutex};

use bulkhead_guest_common::registry::{self, Registry};

use crate::{files::Node, sysctl_rules::Rule};

/// Maximum length of a value of the VM, in bytes.
const MAX_NATIVE: usize = 4096;

/// The values of all containers.
#[derive(Debug)]
pub(crate) struct Sysctls {
    registry: Registry,
    /// Held while a file is read, changed and replaced: two workers may serve one container.
    changing: Mutex<()>,
}

impl Sysctls {
    /// The values of the containers in `registry`.
    pub(crate) fn new(registry: Registry) -> Self {
        Self { registry, changing: Mutex::new(()) }
    }

    fn of(&self, slot: u64) -> BTreeMap<String, String> {
        // A file that is missing or damaged means that nothing was written, not that reads fail.
        registry::read(&self.registry.values_file(slot))
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    /// Returns the container's own value, else the VM's, without the final newline.
    pub(crate) fn get(&self, slot: u64, node: &Node) -> io::Result<String> {
        match self.of(slot).remove(node.path) {
            Some(text) => Ok(text),
            None => native(node),
        }
    }

    /// Sets the container's value.
    ///
    /// # Errors
    /// `EINVAL` when the rule refuses the text.
    pub(crate) fn set(&self, slot: u64, node: &Node, rule: Rule, data: &[u8]) -> io::Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // printk has four numbers, and a write of fewer keeps the rest.
        let current = self.get(slot, node).unwrap_or_default();
        let written = rule.judge(data, &current, memory()).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut values = self.of(slot);
        values.insert(node.path.to_owned(), written.text);
        registry::replace(&self.registry.values_file(slot), &serde_json::to_vec(&values)?)?;
        // After the container's own value: failing to raise the VM's must not lose the write.
        if let Some(wanted) = written.raise {
            raise(node, wanted);
        }
        Ok(())
    }
}

/// The VM's memory, in bytes.
fn memory() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// Reads the VM's value.
fn native(node: &Node) -> io::Result<String> {
    let mut text = fs::read_to_string(node.path)?;
    text.truncate(text.floor_char_boundary(MAX_NATIVE));
    Ok(text.trim_end().to_owned())
}

/// Raises the VM's value to at least `wanted`. A failure does not concern the container, which reads its own value.
fn raise(node: &Node, wanted: i64) {
    // Never lowered: other containers, and the VM, may need the higher value.
    let current = native(node).ok().and_then(|text| text.parse::<i64>().ok());
    if current.is_some_and(|current| current < wanted) {
        let _ = fs::write(node.path, wanted.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{files::NODES, sysctl_rules::Numbers, testing::container};

    #[test]
    fn the_vms_memory_is_that_of_meminfo() {
        let text = fs::read_to_string("/proc/meminfo").unwrap();
        let total: u64 = text.split_ascii_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(memory().abs_diff(total * 1024) < 16 << 20, "{} {total}", memory());
    }

    fn panic_node() -> &'static Node {
        NODES.iter().find(|node| node.path == "/proc/sys/kernel/panic").unwrap()
    }

    const ANY: Rule = Rule::PerContainer(Numbers { count: 1, low: 0, high: 1000 });

    #[test]
    fn containers_have_values_of_their_own_and_the_vm_keeps_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let [one, two] = ["a", "b"].map(|id| registry.enter(container(id)).unwrap());
        let values = Sysctls::new(registry.clone());
        let native = fs::read_to_string(panic_node().path).unwrap();
        values.set(one, panic_node(), ANY, b"77\n").unwrap();
        assert_eq!(values.get(one, panic_node()).unwrap(), "77");
        assert_eq!(values.get(two, panic_node()).unwrap(), native.trim());
        assert_eq!(fs::read_to_string(panic_node().path).unwrap(), native);
        // A restarted service reads the same.
        assert_eq!(Sysctls::new(registry).get(one, panic_node()).unwrap(), "77");
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let slot = registry.enter(container("a")).unwrap();
        let values = Sysctls::new(registry);
        values.set(slot, panic_node(), ANY, b"5").unwrap();
        let error = values.set(slot, panic_node(), ANY, b"5000").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(values.get(slot, panic_node()).unwrap(), "5");
    }
}
