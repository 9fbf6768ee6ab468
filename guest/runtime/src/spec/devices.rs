//! Devices: a container gets only those that are safe for every user.
//!
//! The kernel refuses mknod in a user namespace. But crun creates the nodes of a spec before it enters the namespace,
//! and gives them to the container's root: a listed disk could be read and written past every file permission.

use serde_json::{Map, Value, json};

/// Character devices that need no privilege of the VM, as `(major, minor)` of the kernel's `devices.txt`.
///
/// The nodes of null, zero, full, random, urandom, tty, console and ptmx come from crun.
const SAFE_DEVICES: &[(u64, u64)] = &[
    (1, 3),    // /dev/null
    (1, 5),    // /dev/zero
    (1, 7),    // /dev/full
    (1, 8),    // /dev/random
    (1, 9),    // /dev/urandom
    (5, 0),    // /dev/tty
    (5, 2),    // /dev/ptmx
    (10, 200), // /dev/net/tun: acts in the container's own network namespace
    (10, 229), // /dev/fuse: mounts need the container's own user namespace
];
/// The major number of pseudo-terminals.
const PTS_MAJOR: u64 = 136;

/// A device of the VM that the spec names; the text follows the one for namespaces.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "sysbox containers can't have the host device {path} (because they use the linux user-namespace for isolation)"
)]
pub(crate) struct DeviceError {
    path: String,
}

/// Keeps the safe devices and replaces the rules of the device controller.
///
/// A privileged container's list is everything that the VM happens to have, so unsafe devices are dropped from it. An
/// unsafe device that a user named is an error: a container without it would fail later and say less.
pub(crate) fn restrict(spec: &mut Value) -> Result<(), DeviceError> {
    let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) else { return Ok(()) };
    // dockerd lists devices the same way in both cases; only the rules beside them differ.
    let privileged = allows_all(linux);
    if let Some(devices) = linux.get_mut("devices") {
        let listed = devices.as_array_mut().map(std::mem::take).unwrap_or_default();
        let (safe, unsafe_): (Vec<_>, Vec<_>) = listed.into_iter().partition(is_safe);
        if let (false, Some(device)) = (privileged, unsafe_.first()) {
            // The path is the client's text and goes into a log: its length is bounded.
            let path = device.get("path").and_then(Value::as_str).unwrap_or("without a path");
            return Err(DeviceError { path: path.chars().take(200).collect() });
        }
        *devices = Value::Array(safe);
    }
    // Also without a list of devices: in a volume or an image there can be nodes made elsewhere.
    let resources = super::object_of(linux.entry("resources").or_insert(Value::Null));
    resources.insert("devices".into(), rules());
    Ok(())
}

/// True for rules that open every device, as dockerd writes them for `--privileged`.
fn allows_all(linux: &Map<String, Value>) -> bool {
    let rules = linux.get("resources").and_then(|resources| resources.get("devices")).and_then(Value::as_array);
    rules.is_some_and(|rules| {
        rules.iter().any(|rule| {
            // A number that is missing or negative stands for all (OCI runtime specification, config-linux.md).
            let any = |key: &str| rule.get(key).is_none_or(|value| value.as_i64().is_some_and(|number| number < 0));
            let kind = rule.get("type").and_then(Value::as_str).unwrap_or("a");
            rule.get("allow") == Some(&Value::Bool(true)) && matches!(kind, "a" | "") && any("major") && any("minor")
        })
    })
}

fn is_safe(device: &Value) -> bool {
    let number = |key: &str| device.get(key).and_then(Value::as_u64);
    match device.get("type").and_then(Value::as_str) {
        // A FIFO has no device number, and leads nowhere but to its own readers and writers.
        Some("p") => true,
        Some("c" | "u") => match (number("major"), number("minor")) {
            (Some(PTS_MAJOR), Some(_)) => true,
            (Some(major), Some(minor)) => SAFE_DEVICES.contains(&(major, minor)),
            _ => false,
        },
        // Block devices, and types that crun may learn some day.
        _ => false,
    }
}

/// The rules of the device controller: only the safe devices, whatever nodes a container comes by.
fn rules() -> Value {
    // The last rule that matches decides, so the one that refuses everything comes first.
    let mut rules = vec![json!({ "allow": false, "access": "rwm" })];
    let allow = |major: u64, minor: Option<u64>| {
        let mut rule = json!({ "allow": true, "type": "c", "major": major, "access": "rwm" });
        if let Some(minor) = minor {
            rule["minor"] = minor.into();
        }
        rule
    };
    rules.extend(SAFE_DEVICES.iter().map(|(major, minor)| allow(*major, Some(*minor))));
    rules.push(allow(5, Some(1))); // /dev/console, a pseudo-terminal bound there
    rules.push(allow(PTS_MAJOR, None));
    Value::Array(rules)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::testing;

    fn device(path: &str, kind: &str, major: u64, minor: u64) -> Value {
        json!({ "path": path, "type": kind, "major": major, "minor": minor, "fileMode": 432, "uid": 0, "gid": 0 })
    }

    fn privileged(devices: Vec<Value>) -> Value {
        json!({ "linux": { "devices": devices, "resources": { "devices": [{ "allow": true, "access": "rwm" }] } } })
    }

    #[test]
    fn a_privileged_container_gets_no_disk_and_keeps_fuse_and_tun() {
        let mut spec = privileged(vec![
            device("/dev/vda", "b", 254, 0),
            device("/dev/fuse", "c", 10, 229),
            device("/dev/mem", "c", 1, 1),
            device("/dev/net/tun", "c", 10, 200),
            device("/dev/kmsg", "c", 1, 11),
            device("/dev/hvc0", "c", 229, 0),
        ]);
        restrict(&mut spec).unwrap();
        let paths: Vec<_> = spec["linux"]["devices"].as_array().unwrap().iter().map(|d| d["path"].clone()).collect();
        assert_eq!(paths, ["/dev/fuse", "/dev/net/tun"]);
    }

    #[test]
    fn naming_a_disk_is_an_error_that_names_it() {
        let mut spec = json!({ "linux": {
            "devices": [device("/dev/vdb", "b", 254, 16)],
            "resources": { "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "b", "major": 254, "minor": 16, "access": "rwm" }
            ] }
        } });
        assert!(restrict(&mut spec).unwrap_err().to_string().contains("/dev/vdb"));
    }

    #[test]
    fn no_rule_is_left_that_allows_a_block_device_or_everything() {
        let mut spec = privileged(Vec::new());
        restrict(&mut spec).unwrap();
        let linux = spec["linux"].as_object().unwrap();
        assert!(!allows_all(linux));
        let rules = linux["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules[0], json!({ "allow": false, "access": "rwm" }));
        assert!(rules[1..].iter().all(|rule| rule["type"] == "c"));
    }

    proptest! {
        #[test]
        fn no_json_panics_or_leaves_an_unsafe_device(devices in proptest::collection::vec(testing::any_json(), 0..6)) {
            let mut spec = privileged(devices);
            restrict(&mut spec).unwrap();
            prop_assert!(spec["linux"]["devices"].as_array().unwrap().iter().all(is_safe));
        }
    }
}
