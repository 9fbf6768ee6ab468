//! The values that containers have set, one small file for each container.
//!
//! They are on a tmpfs and not in memory, so that a warden that is started anew has them.

use std::{collections::BTreeMap, fs, io, sync::Mutex};

use bulkhead_guest_common::registry::{self, Registry};

use crate::{files::Node, sysctl_rules::Rule};

/// Longest native value in bytes.
const MAX_NATIVE: usize = 4096;

/// Keeps and changes values.
#[derive(Debug)]
pub(crate) struct Values {
    registry: Registry,
    /// Held while a file is changed.
    changing: Mutex<()>,
}

impl Values {
    /// The values of the registry's containers.
    pub(crate) fn new(registry: Registry) -> Self {
        Self { registry, changing: Mutex::new(()) }
    }

    fn of(&self, slot: u64) -> BTreeMap<String, String> {
        registry::read(&self.registry.values_file(slot))
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    /// What the container reads, without the line's end: its own value, else the VM's.
    pub(crate) fn get(&self, slot: u64, node: &Node) -> io::Result<String> {
        match self.of(slot).remove(node.path) {
            Some(text) => Ok(text),
            None => native(node),
        }
    }

    /// Sets the container's value.
    ///
    /// # Errors
    /// `EINVAL` for what the rule refuses.
    pub(crate) fn set(&self, slot: u64, node: &Node, rule: Rule, data: &[u8]) -> io::Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let current = self.get(slot, node).unwrap_or_default();
        let written = rule.judge(data, &current).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?;
        let mut values = self.of(slot);
        values.insert(node.path.to_owned(), written.text);
        registry::replace(&self.registry.values_file(slot), &serde_json::to_vec(&values)?)?;
        if let Some(wanted) = written.raise {
            raise(node, wanted);
        }
        Ok(())
    }
}

/// The VM's own value.
fn native(node: &Node) -> io::Result<String> {
    let mut text = fs::read_to_string(node.path)?;
    text.truncate(text.floor_char_boundary(MAX_NATIVE));
    Ok(text.trim_end().to_owned())
}

/// Raises the VM's own value; that it can't be is no concern of the container, which has its own.
fn raise(node: &Node, wanted: i64) {
    let current = native(node).ok().and_then(|text| text.parse::<i64>().ok());
    if current.is_some_and(|current| current < wanted) {
        let _ = fs::write(node.path, wanted.to_string());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{files::NODES, sysctl_rules::Lines, testing::container};

    fn panic_node() -> &'static Node {
        NODES.iter().find(|node| node.path == "/proc/sys/kernel/panic").unwrap()
    }

    const ANY: Rule = Rule::Own(Lines { numbers: 1, low: 0, high: 1000 });

    #[test]
    fn containers_have_values_of_their_own_and_the_vm_keeps_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let [one, two] = ["a", "b"].map(|id| registry.enter(container(id)).unwrap());
        let values = Values::new(registry.clone());
        let native = fs::read_to_string(panic_node().path).unwrap();
        values.set(one, panic_node(), ANY, b"77\n").unwrap();
        assert_eq!(values.get(one, panic_node()).unwrap(), "77");
        assert_eq!(values.get(two, panic_node()).unwrap(), native.trim());
        assert_eq!(fs::read_to_string(panic_node().path).unwrap(), native);
        // What a warden that is started anew would read.
        assert_eq!(Values::new(registry).get(one, panic_node()).unwrap(), "77");
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let slot = registry.enter(container("a")).unwrap();
        let values = Values::new(registry);
        values.set(slot, panic_node(), ANY, b"5").unwrap();
        let error = values.set(slot, panic_node(), ANY, b"5000").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        assert_eq!(values.get(slot, panic_node()).unwrap(), "5");
    }
}
