//! The container's seccomp profile: mount calls that it allows are reported to the procfs service (seccomp_unotify(2)).
//!
//! The kernel holds such a call until the service has answered, which puts the container's own files onto a procfs or
//! sysfs that the container mounts. A call that the profile refuses stays refused: this only turns *allow*
//! into *notify*.

use std::path::Path;

use serde_json::{Value, json};

use super::object;

/// mount(2) and its reverse, and the first call of the newer way to mount.
const NOTIFIED_SYSCALLS: [&str; 4] = ["mount", "umount2", "umount", "fsopen"];

/// The kernel reports the call and holds it.
const ACT_NOTIFY: &str = "SCMP_ACT_NOTIFY";

const ACT_ALLOW: &str = "SCMP_ACT_ALLOW";

const ACT_ERRNO: &str = "SCMP_ACT_ERRNO";

/// Once received, a call is interrupted by a fatal signal only: another one would make the caller repeat a mount that
/// is under way.
const FLAG_WAIT_KILLABLE: &str = "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV";

/// The flag that crun sets where no flags are given.
const FLAG_SPEC_ALLOW: &str = "SECCOMP_FILTER_FLAG_SPEC_ALLOW";

/// All ABIs of this CPU; a call in an ABI that is not listed kills the caller.
const ARCHITECTURES: [&str; 3] = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];

/// True for an action that lets a call through.
fn allows_call(action: &Value) -> bool {
    action == ACT_ALLOW || action == "SCMP_ACT_LOG"
}

/// Removes a listener that the spec names: crun would connect to that socket of the VM as root.
///
/// The calls that the listener would have decided about are refused.
pub(crate) fn remove_foreign_listener(spec: &mut Value) {
    let Some(section) = spec.get_mut("linux").and_then(|linux| linux.get_mut("seccomp")) else { return };
    let Some(section) = section.as_object_mut() else { return };
    section.remove("listenerPath");
    section.remove("listenerMetadata");
    let refuse = |action: &mut Value| {
        if *action == ACT_NOTIFY {
            *action = ACT_ERRNO.into();
        }
    };
    section.get_mut("defaultAction").map(refuse);
    for rule in section.get_mut("syscalls").and_then(Value::as_array_mut).into_iter().flatten() {
        rule.get_mut("action").map(refuse);
    }
}

/// Has mount calls reported to the procfs service's `socket`, under the container's number there.
pub(crate) fn notify_mounts(spec: &mut Value, socket: &Path, slot: u64) {
    let linux = object(spec, "linux");
    // A privileged container has no profile; it gets one that allows all else.
    let section = linux.entry("seccomp").or_insert(Value::Null);
    if section.is_null() {
        *section = json!({ "defaultAction": ACT_ALLOW, "architectures": ARCHITECTURES, "syscalls": [] });
    }
    let default = allows_call(&section["defaultAction"]);
    let Some(section) = section.as_object_mut() else { return };
    let rules = section.entry("syscalls").or_insert(Value::Null);
    if rules.is_null() {
        *rules = json!([]);
    }
    let Some(rules) = rules.as_array_mut() else { return };
    let notified = split_rules(rules, default);
    // A listener without a call to report would only keep a thread of the service busy.
    if notified.is_empty() {
        return;
    }
    rules.extend(notified);
    section.insert("listenerPath".into(), socket.to_string_lossy().into());
    section.insert("listenerMetadata".into(), slot.to_string().into());
    let flags = section.entry("flags").or_insert(Value::Null);
    match flags.as_array_mut() {
        Some(flags) if flags.iter().any(|flag| flag == FLAG_WAIT_KILLABLE) => {}
        Some(flags) => flags.push(FLAG_WAIT_KILLABLE.into()),
        // With a list of flags crun sets no default of its own, so that one is named too.
        None => *flags = json!([FLAG_SPEC_ALLOW, FLAG_WAIT_KILLABLE]),
    }
}

/// Removes the mount calls from the rules that allow them, and returns rules that report them.
///
/// A call moves out of its rule, because two rules for one call exclude each other in libseccomp.
fn split_rules(rules: &mut [Value], default_allows: bool) -> Vec<Value> {
    let mut notified = Vec::new();
    let mut named = Vec::new();
    for rule in rules.iter_mut() {
        let allows = allows_call(&rule["action"]);
        let arguments = rule.get("args").cloned();
        let Some(names) = rule.get_mut("names").and_then(Value::as_array_mut) else { continue };
        let ours: Vec<Value> = names
            .iter()
            .filter(|name| name.as_str().is_some_and(|name| NOTIFIED_SYSCALLS.contains(&name)))
            .cloned()
            .collect();
        if ours.is_empty() {
            continue;
        }
        named.extend(ours.clone());
        if allows {
            names.retain(|name| !ours.contains(name));
            let mut rule = json!({ "names": ours, "action": ACT_NOTIFY });
            // The rule's conditions stay: for other arguments it said nothing.
            if let Some(arguments) = arguments {
                rule["args"] = arguments;
            }
            notified.push(rule);
        }
    }
    // The default covers the calls that no rule names. A call that a rule names is that rule's to decide, also where
    // its conditions do not hold: a second rule could contradict it.
    if default_allows {
        let others: Vec<_> =
            NOTIFIED_SYSCALLS.iter().filter(|name| !named.iter().any(|other| other == *name)).collect();
        if !others.is_empty() {
            notified.push(json!({ "names": others, "action": ACT_NOTIFY }));
        }
    }
    notified
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::testing;

    const SOCKET: &str = "/s";

    fn rewritten(section: Value) -> Value {
        let mut spec = json!({ "linux": { "seccomp": section } });
        remove_foreign_listener(&mut spec);
        notify_mounts(&mut spec, Path::new(SOCKET), 7);
        spec["linux"]["seccomp"].take()
    }

    /// As dockerd's own, in short.
    fn profile(administration: bool) -> Value {
        let mut rules = vec![json!({ "names": ["read", "write"], "action": ACT_ALLOW })];
        if administration {
            rules.push(json!({ "names": ["bpf", "fsopen", "mount", "umount", "umount2"], "action": ACT_ALLOW }));
        }
        json!({ "defaultAction": ACT_ERRNO, "defaultErrnoRet": 1, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": rules })
    }

    #[test]
    fn a_profile_that_refuses_mounts_stays_as_it_is() {
        assert_eq!(rewritten(profile(false)), profile(false));
    }

    #[test]
    fn a_profile_that_allows_mounts_has_them_reported() {
        let section = rewritten(profile(true));
        assert_eq!(section["syscalls"][0], profile(true)["syscalls"][0]);
        assert_eq!(section["syscalls"][1], json!({ "names": ["bpf"], "action": ACT_ALLOW }));
        let names = json!(["fsopen", "mount", "umount", "umount2"]);
        assert_eq!(section["syscalls"][2], json!({ "names": names, "action": ACT_NOTIFY }));
        assert_eq!(section["listenerPath"], SOCKET);
        assert_eq!(section["listenerMetadata"], "7");
        assert_eq!(section["flags"], json!([FLAG_SPEC_ALLOW, FLAG_WAIT_KILLABLE]));
    }

    #[test]
    fn a_privileged_container_has_mounts_reported_and_all_else_allowed() {
        for section in [Value::Null, json!({ "defaultAction": ACT_ALLOW, "architectures": ARCHITECTURES })] {
            let section = rewritten(section);
            assert_eq!(section["defaultAction"], ACT_ALLOW);
            assert_eq!(section["architectures"], json!(ARCHITECTURES));
            assert_eq!(section["syscalls"], json!([{ "names": NOTIFIED_SYSCALLS, "action": ACT_NOTIFY }]));
        }
    }

    #[test]
    fn what_a_profile_refuses_stays_refused_and_conditions_stay() {
        let rules = json!([
            { "names": ["mount"], "action": ACT_ERRNO },
            { "names": ["umount2"], "action": ACT_ALLOW, "args": [{ "index": 1, "value": 2, "op": "SCMP_CMP_EQ" }] },
        ]);
        let section =
            rewritten(json!({ "defaultAction": ACT_ALLOW, "syscalls": rules, "flags": ["SECCOMP_FILTER_FLAG_LOG"] }));
        assert_eq!(section["syscalls"][0], rules[0]);
        assert_eq!(section["syscalls"][2]["args"], rules[1]["args"]);
        assert_eq!(section["syscalls"][3]["names"], json!(["umount", "fsopen"]));
        assert_eq!(section["flags"], json!(["SECCOMP_FILTER_FLAG_LOG", FLAG_WAIT_KILLABLE]));
    }

    #[test]
    fn a_users_own_listener_is_removed() {
        let section = rewritten(json!({
            "defaultAction": ACT_NOTIFY,
            "listenerPath": "/run/bulkhead/dockerd.sock",
            "listenerMetadata": "GET / HTTP/1.1",
            "syscalls": [{ "names": ["mkdir", "mount"], "action": ACT_NOTIFY }],
        }));
        assert_eq!(
            section,
            json!({ "defaultAction": ACT_ERRNO, "syscalls": [{ "names": ["mkdir", "mount"], "action": ACT_ERRNO }] })
        );
    }

    proptest! {
        #[test]
        fn no_json_panics_and_no_other_listener_stays(spec in testing::any_json(), section in testing::any_json()) {
            let mut spec = spec;
            if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
                linux.insert("seccomp".into(), section);
            }
            remove_foreign_listener(&mut spec);
            notify_mounts(&mut spec, Path::new(SOCKET), 7);
            let path = &spec["linux"]["seccomp"]["listenerPath"];
            prop_assert!(path.is_null() || path == SOCKET);
        }
    }
}
