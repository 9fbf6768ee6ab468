//! The section of system calls: which ones the kernel holds until the warden has answered.
//!
//! Those are the calls that mount procfs and sysfs, and only where the engine's profile allows them. A profile that
//! refuses them stays as it is.

use std::path::Path;

use serde_json::{Value, json};

use super::object;

/// mount(2), what undoes it, and what opens the other way to mount.
const HELD: [&str; 4] = ["mount", "umount2", "umount", "fsopen"];

/// The kernel reports the call and waits.
const NOTIFY: &str = "SCMP_ACT_NOTIFY";

const ALLOW: &str = "SCMP_ACT_ALLOW";

const ERRNO: &str = "SCMP_ACT_ERRNO";

/// A signal must not make the caller ask twice for what is under way.
const WAIT: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// What crun sets where no flags are given.
const SPECULATE: &str = "SECCOMP_FILTER_FLAG_SPEC_ALLOW";

/// All that this CPU runs; what an architecture that is not named asks for is killed.
const ARCHITECTURES: [&str; 3] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];

/// Whether an action lets a call through.
fn lets_through(action: &Value) -> bool {
    action == ALLOW || action == "SCMP_ACT_LOG"
}

/// Takes out a supervisor of the person's own: it would be a program of the VM's, connected to as root. What it was to
/// decide is refused.
pub(crate) fn forget_others(spec: &mut Value) {
    let Some(section) = spec.get_mut("linux").and_then(|linux| linux.get_mut("seccomp")) else { return };
    let Some(section) = section.as_object_mut() else { return };
    section.remove("listenerPath");
    section.remove("listenerMetadata");
    let refuse = |action: &mut Value| {
        if *action == NOTIFY {
            *action = ERRNO.into();
        }
    };
    section.get_mut("defaultAction").map(refuse);
    for rule in section.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten() {
        rule.get_mut("action").map(refuse);
    }
}

/// Has mounts reported to the warden's socket, under the container's number there.
pub(crate) fn hold(spec: &mut Value, socket: &Path, slot: u64) {
    let linux = object(spec, "linux");
    // Also of a privileged container, which comes without a section.
    let section = linux.entry("seccomp").or_insert(Value::Null);
    if section.is_null() {
        *section = json!({ "defaultAction": ALLOW, "architectures": ARCHITECTURES, "syscalls": [] });
    }
    let default = lets_through(&section["defaultAction"]);
    let Some(section) = section.as_object_mut() else { return };
    let rules = section.entry("syscalls").or_insert(Value::Null);
    if rules.is_null() {
        *rules = json!([]);
    }
    let Some(rules) = rules.as_array_mut() else { return };
    let held = split(rules, default);
    if held.is_empty() {
        return;
    }
    rules.extend(held);
    section.insert("listenerPath".into(), socket.to_string_lossy().into());
    section.insert("listenerMetadata".into(), slot.to_string().into());
    let flags = section.entry("flags").or_insert(Value::Null);
    match flags.as_array_mut() {
        Some(flags) if flags.iter().any(|flag| flag == WAIT) => {}
        Some(flags) => flags.push(WAIT.into()),
        None => *flags = json!([SPECULATE, WAIT]),
    }
}

/// Takes the calls out of the rules that let them through, and returns rules that hold them.
fn split(rules: &mut [Value], default: bool) -> Vec<Value> {
    let mut held = Vec::new();
    let mut named = Vec::new();
    for rule in rules.iter_mut() {
        let allows = lets_through(&rule["action"]);
        let arguments = rule.get("args").cloned();
        let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) else { continue };
        let ours: Vec<Value> =
            names.iter().filter(|name| name.as_str().is_some_and(|name| HELD.contains(&name))).cloned().collect();
        if ours.is_empty() {
            continue;
        }
        named.extend(ours.clone());
        if allows {
            names.retain(|name| !ours.contains(name));
            let mut rule = json!({ "names": ours, "action": NOTIFY });
            if let Some(arguments) = arguments {
                rule["args"] = arguments;
            }
            held.push(rule);
        }
    }
    // What no rule names is let through by the default; what a rule names in part is that rule's to decide.
    if default {
        let others: Vec<_> = HELD.iter().filter(|name| !named.iter().any(|other| other == *name)).collect();
        if !others.is_empty() {
            held.push(json!({ "names": others, "action": NOTIFY }));
        }
    }
    held
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::testing;

    const SOCKET: &str = "/s";

    fn held(section: Value) -> Value {
        let mut spec = json!({ "linux": { "seccomp": section } });
        forget_others(&mut spec);
        hold(&mut spec, Path::new(SOCKET), 7);
        spec["linux"]["seccomp"].take()
    }

    /// As dockerd's own, in short.
    fn profile(administration: bool) -> Value {
        let mut rules = vec![json!({ "names": ["read", "write"], "action": ALLOW })];
        if administration {
            rules.push(json!({ "names": ["bpf", "fsopen", "mount", "umount", "umount2"], "action": ALLOW }));
        }
        json!({ "defaultAction": ERRNO, "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules })
    }

    #[test]
    fn a_profile_that_refuses_mounts_stays_as_it_is() {
        assert_eq!(held(profile(false)), profile(false));
    }

    #[test]
    fn a_profile_that_allows_mounts_has_them_held() {
        let section = held(profile(true));
        assert_eq!(section["syscalls"][0], profile(true)["syscalls"][0]);
        assert_eq!(section["syscalls"][1], json!({ "names": ["bpf"], "action": ALLOW }));
        let names = json!(["fsopen", "mount", "umount", "umount2"]);
        assert_eq!(section["syscalls"][2], json!({ "names": names, "action": NOTIFY }));
        assert_eq!(section["listenerPath"], SOCKET);
        assert_eq!(section["listenerMetadata"], "7");
        assert_eq!(section["flags"], json!([SPECULATE, WAIT]));
    }

    #[test]
    fn a_privileged_container_has_them_held_and_everything_else_allowed_in_every_abi() {
        for section in [Value::Null, json!({ "defaultAction": ALLOW, "architectures": ARCHITECTURES })] {
            let section = held(section);
            assert_eq!(section["defaultAction"], ALLOW);
            assert_eq!(section["architectures"], json!(ARCHITECTURES));
            assert_eq!(section["syscalls"], json!([{ "names": HELD, "action": NOTIFY }]));
        }
    }

    #[test]
    fn what_a_profile_refuses_stays_refused_and_conditions_stay() {
        let rules = json!([
            { "names": ["mount"], "action": ERRNO },
            { "names": ["umount2"], "action": ALLOW, "args": [{ "index": 1, "value": 2, "op": "SCMP_CMP_EQ" }] },
        ]);
        let section = held(json!({ "defaultAction": ALLOW, "syscalls": rules, "flags": ["SECCOMP_FILTER_FLAG_LOG"] }));
        assert_eq!(section["syscalls"][0], rules[0]);
        assert_eq!(section["syscalls"][2]["args"], rules[1]["args"]);
        assert_eq!(section["syscalls"][3]["names"], json!(["umount", "fsopen"]));
        assert_eq!(section["flags"], json!(["SECCOMP_FILTER_FLAG_LOG", WAIT]));
    }

    #[test]
    fn a_supervisor_of_the_persons_own_is_not_asked() {
        let section = held(json!({
            "defaultAction": NOTIFY,
            "listenerPath": "/run/bulkhead/dockerd.sock",
            "listenerMetadata": "GET / HTTP/1.1",
            "syscalls": [{ "names": ["mkdir", "mount"], "action": NOTIFY }],
        }));
        assert_eq!(
            section,
            json!({ "defaultAction": ERRNO, "syscalls": [{ "names": ["mkdir", "mount"], "action": ERRNO }] })
        );
    }

    proptest! {
        #[test]
        fn no_json_panics_and_no_other_listener_stays(spec in testing::any_json(), section in testing::any_json()) {
            let mut spec = spec;
            if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
                linux.insert("seccomp".into(), section);
            }
            forget_others(&mut spec);
            hold(&mut spec, Path::new(SOCKET), 7);
            let path = &spec["linux"]["seccomp"]["listenerPath"];
            prop_assert!(path.is_null() || path == SOCKET);
        }
    }
}
