//! The network devices that the engine has given to a container.
//!
//! The gate judges a network when a client makes it and when a client starts a container on it. A network from before
//! isolation, on which the engine itself starts a container again, passes no gate. So what counts here is the outcome:
//! crun has run the engine's hook, which connects the container's new network namespace, and no process of the
//! container runs yet. A device of the VM, or one that stands on such a device, would get the traffic of the engine and
//! of all other containers.

use std::{fs::File, io, os::fd::AsFd, path::Path};

use bulkhead_guest_common::bounded;
use bulkhead_policy::networks;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

use crate::{
    rtnetlink::{Device, Lower, Netlink},
    spec::checks,
};

/// Limit of crun's record of a container in bytes.
const MAX_STATE: u64 = 1 << 20;

/// A wire to another device, which for a container's is in a bridge.
const WIRE: &str = "veth";

/// The device that the engine makes for a network of another driver without a parent. It leads nowhere.
const NOWHERE: &str = "dummy";

/// A container whose network cannot be allowed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// It has a device of the VM.
    #[error("a network of the container is not allowed")]
    Refused(#[from] networks::Error),
    /// Its devices cannot be listed.
    #[error("cannot list the container's network devices")]
    List(#[from] io::Error),
}

/// Returns true if a container gets a network namespace of its own, and does not join another's.
pub(crate) fn is_own(spec: &Value) -> bool {
    checks::namespaces(spec).any(|(kind, path)| kind == "network" && path.is_none())
}

/// Judges the devices of a container that crun has created. `state` is crun's directory for it.
///
/// This process returns to its own network namespace.
pub(crate) fn judge(state: &Path) -> Result<(), NetworkError> {
    let state: Value =
        serde_json::from_slice(&bounded::read_file(state.join("status"), MAX_STATE)?).map_err(io::Error::from)?;
    let pid =
        state["pid"].as_u64().filter(|pid| *pid > 0).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    judge_namespace(&File::open(format!("/proc/{pid}/ns/net"))?)
}

fn judge_namespace(container: &File) -> Result<(), NetworkError> {
    let own = File::open("/proc/thread-self/ns/net")?;
    let enter = |namespace: &File| move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    enter(container).map_err(io::Error::from)?;
    // A socket stays where it was made.
    let netlink = Netlink::open();
    enter(&own).map_err(io::Error::from)?;
    let netlink = netlink?;
    let devices = netlink.devices()?;
    // Almost all containers have wires only, and nothing more is asked for them.
    let mut vm = None;
    for device in devices.iter().filter(|device| !is_harmless(device, &devices)) {
        let in_vm = match &vm {
            Some(in_vm) => in_vm,
            None => vm.insert((netlink.number_of(&own)?, Netlink::open()?)),
        };
        let (number, vm) = in_vm;
        let parent = match device.lower {
            Some(Lower { index, namespace }) if namespace.is_some() && namespace == *number => vm.device(index)?,
            // Hardware itself, or a device on one that is neither the container's nor the VM's.
            _ => device.clone(),
        };
        if parent.kind.as_deref() != Some(NOWHERE) {
            return Err(networks::Error::Parent(parent.name).into());
        }
    }
    Ok(())
}

/// Returns true for a device that stands on none outside of the container.
fn is_harmless(device: &Device, devices: &[Device]) -> bool {
    match (&device.kind, device.lower) {
        (None, _) => device.is_loopback,
        (Some(kind), _) if kind == WIRE => true,
        (_, None | Some(Lower { index: 0, namespace: None })) => true,
        // One in the container is judged itself.
        (_, Some(Lower { index, namespace: None })) => devices.iter().any(|other| other.index == index),
        (_, Some(Lower { namespace: Some(_), .. })) => false,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::Read,
        process::{Child, Command, Stdio},
    };

    use bulkhead_guest_common::error::chain;

    use super::*;
    use crate::spec::testing;

    /// A process that keeps a network namespace of its own.
    struct Namespace(Child);

    impl Namespace {
        /// `None` without root.
        fn new() -> Option<Self> {
            let mut command = Command::new("unshare");
            let mut child =
                command.args(["-n", "sh", "-c", "echo; exec sleep 100"]).stdout(Stdio::piped()).spawn().ok()?;
            child.stdout.as_mut()?.read_exact(&mut [0]).ok()?;
            Some(Self(child))
        }

        fn file(&self) -> File {
            File::open(format!("/proc/{}/ns/net", self.0.id())).unwrap()
        }
    }

    impl Drop for Namespace {
        fn drop(&mut self) {
            self.0.kill().unwrap();
            self.0.wait().unwrap();
        }
    }

    /// Makes devices in a namespace that stands for the VM's, and judges that of a container. `None` without root, or
    /// where this kernel lacks a kind of device.
    fn judged(commands: &[&str]) -> Option<Result<(), NetworkError>> {
        let (vm, container) = (Namespace::new()?, Namespace::new()?);
        let test = || {
            move_into_link_name_space(vm.file().as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            let made = commands.iter().all(|command| {
                let command = command.replace("CONTAINER", &container.0.id().to_string());
                Command::new("ip").arg("link").args(command.split(' ')).status().is_ok_and(|status| status.success())
            });
            made.then(|| judge_namespace(&container.file()))
        };
        // The namespace is a thread's.
        std::thread::scope(|scope| scope.spawn(test).join()).unwrap()
    }

    fn refused(commands: &[&str], device: &str) {
        let Some(result) = judged(commands) else { return };
        let text = chain(&result.unwrap_err());
        assert!(text.contains(&format!("parent device \"{device}\" is not allowed")), "{text}");
    }

    #[test]
    fn wires_and_devices_on_the_engines_own_ones_are_allowed() {
        for commands in [
            &[][..],
            &["add wire0 type veth peer name eth0 netns CONTAINER"],
            &["add dm-1 type dummy", "add link dm-1 name eth0 netns CONTAINER type macvlan mode bridge"],
        ] {
            if let Some(result) = judged(commands) {
                assert!(result.is_ok(), "{commands:?}: {result:?}");
            }
        }
    }

    #[test]
    fn a_device_on_one_of_the_vms_is_refused_by_that_ones_name() {
        // One end of a wire stands for the VM's card: like it, it is not what the engine makes for such a network.
        let card = "add card type veth peer name router";
        let over = |kind| format!("add link card name eth0 netns CONTAINER type {kind}");
        for kind in ["macvlan mode bridge", "macvlan mode passthru", "ipvlan mode l2", "vlan id 5"] {
            refused(&[card, &over(kind)], "card");
        }
    }

    #[test]
    fn hardware_is_refused_and_a_namespace_that_is_unknown_too() {
        let device = |kind: Option<&str>, lower| Device {
            index: 2,
            name: "eth0".into(),
            kind: kind.map(str::to_owned),
            is_loopback: false,
            lower,
        };
        let lower = |index, namespace| Some(Lower { index, namespace });
        let card = device(None, None);
        assert!(!is_harmless(&card, std::slice::from_ref(&card)));
        for (lower, is_known) in [
            (None, true),
            (lower(0, None), true),
            (lower(2, None), true),
            (lower(7, None), false),
            (lower(2, Some(0)), false),
        ] {
            let vlan = device(Some("vlan"), lower);
            assert_eq!(is_harmless(&vlan, std::slice::from_ref(&card)), is_known, "{lower:?}");
        }
    }

    #[test]
    fn only_a_namespace_of_its_own_is_judged() {
        let mut spec = testing::docker();
        assert!(is_own(&spec));
        for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            namespace["path"] = "/proc/1/ns/net".into();
        }
        assert!(!is_own(&spec));
    }
}
