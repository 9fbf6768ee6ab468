//! Options of dockerd that a user may set.
//!
//! dockerd reads about 90 options. [`take`] takes those in a list, which say how containers are run, logged and
//! connected, and names the reason for each other one. The list is the same with isolation on and off, but for
//! runtimes, which a user may add without isolation.
//!
//! An option is taken in the lower-case spelling that dockerd documents. Go's decoder would take others as well, but
//! dockerd refuses to start with them, so nothing is lost, and no second spelling can get past the list.

use serde_json::{Map, Value};

/// Longest part of a user's text in a message, in characters.
const MAX_QUOTED: usize = 80;

/// The reason why an option, or a part of it, is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// Bulkhead's own value is the only one that works in the VM.
    #[error("the option {0:?} of the engine is left out: Bulkhead sets it itself")]
    Ours(String),
    /// It would lead dockerd to a file, program, socket, device or address of the VM.
    #[error("the option {0:?} of the engine is left out: it names a file, program, socket or device of the VM")]
    NamesVm(String),
    /// It would let clients past the gate, or show the engine to containers.
    #[error("the option {0:?} of the engine is left out: it opens another way into the engine")]
    OpensEngine(String),
    /// It would take the VM's network away from containers, or isolation from both.
    #[error("the option {0:?} of the engine is left out: the VM does not work with another value than its own")]
    BreaksVm(String),
    /// The option is taken, but not with this value.
    #[error("the option {0:?} of the engine is left out: its value is not one of those that are allowed")]
    Value(String),
    /// It is in no list: a new, removed or misspelled option.
    #[error("the option {0:?} of the engine is left out: it is not one that can be set; names are in lower case")]
    Unknown(String),
}

/// The options to pass on, and the reasons for those that were left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Taken {
    /// Options in dockerd's own spelling.
    pub options: Map<String, Value>,
    /// One reason for each option, or part of one, that was left out.
    pub refused: Vec<OptionError>,
}

/// The rule for an option.
#[derive(Clone, Copy)]
enum Rule {
    /// Taken with any value; dockerd itself checks the type.
    Any,
    /// Taken if the value passes.
    If(fn(&Value) -> bool),
    /// Taken without the members that do not pass.
    Members(fn(&str, &Value) -> bool),
    /// Left out.
    Never(fn(String) -> OptionError),
    /// Taken without isolation only.
    WithoutIsolation,
}

use Rule::{Any, If, Members, Never, WithoutIsolation};

/// Options and their rules: everything in dockerd 26.1's `daemon/config`, in its order of subjects.
const RULES: &[(&str, Rule)] = &[
    // Registries: names and URLs that a client could pull from anyway.
    ("registry-mirrors", Any),
    ("insecure-registries", Any),
    ("allow-nondistributable-artifacts", Any),
    ("max-concurrent-downloads", Any),
    ("max-concurrent-uploads", Any),
    ("max-download-attempts", Any),
    ("proxies", Members(is_proxy)),
    // Output of dockerd and of containers.
    ("debug", Any),
    ("log-level", Any),
    ("log-format", Any),
    ("raw-logs", Any),
    ("log-driver", If(is_plain_name)),
    ("log-opts", Members(is_log_option)),
    // Networks of containers: numbers and addresses inside of the VM.
    ("bip", Any),
    ("fixed-cidr", Any),
    ("fixed-cidr-v6", Any),
    ("ipv6", Any),
    ("ip6tables", Any),
    ("mtu", Any),
    ("icc", Any),
    ("ip", Any),
    ("default-gateway", Any),
    ("default-gateway-v6", Any),
    ("default-address-pools", Any),
    ("default-network-opts", Members(is_network_option)),
    ("network-control-plane-mtu", Any),
    ("dns", Any),
    ("dns-opts", Any),
    ("dns-search", Any),
    ("host-gateway-ip", Any),
    // Defaults of new containers. The runtime judges the result as if the client had asked for it.
    ("default-ulimits", Any),
    ("default-shm-size", Any),
    ("default-ipc-mode", Any),
    ("default-cgroupns-mode", Any),
    ("no-new-privileges", Any),
    ("init", Any),
    ("seccomp-profile", If(is_named_profile)),
    ("shutdown-timeout", Any),
    // The builder's garbage collection and history; what build steps may do is not the user's to say.
    ("builder", Members(is_builder_option)),
    // Descriptions.
    ("labels", Any),
    ("node-generic-resources", Any),
    ("swarm-default-advertise-addr", Any),
    // A runtime is a program that runs as the VM's root, outside of any container.
    ("runtimes", WithoutIsolation),
    ("default-runtime", WithoutIsolation),
    // Other ways to dockerd than through the gate, and its state shown to containers.
    ("hosts", Never(OptionError::OpensEngine)),
    ("group", Never(OptionError::OpensEngine)),
    ("tls", Never(OptionError::OpensEngine)),
    ("tlscacert", Never(OptionError::OpensEngine)),
    ("tlscert", Never(OptionError::OpensEngine)),
    ("tlskey", Never(OptionError::OpensEngine)),
    ("tlsverify", Never(OptionError::OpensEngine)),
    ("api-cors-header", Never(OptionError::OpensEngine)),
    ("metrics-addr", Never(OptionError::OpensEngine)),
    ("network-diagnostic-port", Never(OptionError::OpensEngine)),
    ("authorization-plugins", Never(OptionError::OpensEngine)),
    ("cri-containerd", Never(OptionError::OpensEngine)),
    // Paths of the VM, which dockerd would read, write or execute as its root.
    ("cdi-spec-dirs", Never(OptionError::NamesVm)),
    ("init-path", Never(OptionError::NamesVm)),
    ("default-init", Never(OptionError::NamesVm)),
    ("resolv-conf", Never(OptionError::NamesVm)),
    ("cgroup-parent", Never(OptionError::NamesVm)),
    ("bridge", Never(OptionError::NamesVm)),
    ("userland-proxy-path", Never(OptionError::NamesVm)),
    // State and drivers: on the data disk, and those that the runtime and init know.
    ("data-root", Never(OptionError::Ours)),
    ("graph", Never(OptionError::Ours)),
    ("exec-root", Never(OptionError::Ours)),
    ("pidfile", Never(OptionError::Ours)),
    ("containerd", Never(OptionError::Ours)),
    ("containerd-namespace", Never(OptionError::Ours)),
    ("containerd-plugin-namespace", Never(OptionError::Ours)),
    ("containerd-plugins-namespace", Never(OptionError::Ours)),
    ("storage-driver", Never(OptionError::Ours)),
    ("storage-opts", Never(OptionError::Ours)),
    ("exec-opts", Never(OptionError::Ours)),
    ("live-restore", Never(OptionError::Ours)),
    ("userland-proxy", Never(OptionError::Ours)),
    ("features", Never(OptionError::Ours)),
    ("experimental", Never(OptionError::Ours)),
    // The host knows the VM's address only, so containers without address translation have no network; the rest needs
    // what the VM does not have.
    ("iptables", Never(OptionError::BreaksVm)),
    ("ip-forward", Never(OptionError::BreaksVm)),
    ("ip-masq", Never(OptionError::BreaksVm)),
    ("userns-remap", Never(OptionError::BreaksVm)),
    ("rootless", Never(OptionError::BreaksVm)),
    ("selinux-enabled", Never(OptionError::BreaksVm)),
    ("cpu-rt-period", Never(OptionError::BreaksVm)),
    ("cpu-rt-runtime", Never(OptionError::BreaksVm)),
];

/// Takes from a user's options those that dockerd may have.
pub fn take(wanted: &Map<String, Value>, isolation: bool) -> Taken {
    let mut taken = Taken::default();
    for (name, value) in wanted {
        let name = name.as_str();
        let rule = RULES.iter().find(|(known, _)| *known == name).map(|(_, rule)| *rule);
        let allowed = match rule {
            Some(Any) => Ok(value.clone()),
            Some(If(passes)) if passes(value) => Ok(value.clone()),
            Some(If(_)) => Err(OptionError::Value(name.to_owned())),
            Some(Members(passes)) => members(name, value, passes, &mut taken.refused),
            Some(WithoutIsolation) if !isolation => Ok(value.clone()),
            Some(WithoutIsolation) => Err(OptionError::NamesVm(name.to_owned())),
            Some(Never(reason)) => Err(reason(name.to_owned())),
            None => Err(OptionError::Unknown(name.chars().take(MAX_QUOTED).collect())),
        };
        match allowed {
            Ok(value) => drop(taken.options.insert(name.to_owned(), value)),
            Err(reason) => taken.refused.push(reason),
        }
    }
    taken
}

/// Returns an object without the members that do not pass, which are added to `refused` as `option.member`.
fn members(
    name: &str,
    value: &Value,
    passes: fn(&str, &Value) -> bool,
    refused: &mut Vec<OptionError>,
) -> Result<Value, OptionError> {
    let Value::Object(object) = value else { return Err(OptionError::Value(name.to_owned())) };
    let (good, bad): (Map<_, _>, Map<_, _>) =
        object.clone().into_iter().partition(|(member, value)| passes(member, value));
    let quoted = |member: String| format!("{name}.{}", member.chars().take(MAX_QUOTED).collect::<String>());
    refused.extend(bad.into_iter().map(|(member, _)| OptionError::Value(quoted(member))));
    Ok(Value::Object(good))
}

fn is_proxy(member: &str, _: &Value) -> bool {
    ["http-proxy", "https-proxy", "no-proxy"].contains(&member)
}

/// A driver's name; one with a slash is the path of a plugin's socket.
fn is_plain_name(value: &Value) -> bool {
    let plain = |name: &str| name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
    value.as_str().is_some_and(plain)
}

/// A value that is neither a path nor the address of a unix socket: drivers connect to one and read the other.
fn is_log_option(_: &str, value: &Value) -> bool {
    let is_place = |text: &str| {
        // Also behind something that Go's URL parser or a driver would skip.
        let text = text.trim_start().to_ascii_lowercase();
        text.starts_with(['/', '.', '~']) || text.starts_with("unix") || text.starts_with("file:")
    };
    value.as_str().is_some_and(|text| !is_place(text))
}

/// Options of bridges that say how containers are reached, and not which device of the VM the bridge is.
fn is_network_option(driver: &str, value: &Value) -> bool {
    let known = [
        "com.docker.network.bridge.host_binding_ipv4",
        "com.docker.network.bridge.enable_icc",
        "com.docker.network.bridge.enable_ip_masquerade",
        "com.docker.network.driver.mtu",
    ];
    driver == "bridge" && value.as_object().is_some_and(|object| object.keys().all(|key| known.contains(&key.as_str())))
}

/// The profiles that have a name; everything else is the path of a file.
fn is_named_profile(value: &Value) -> bool {
    matches!(value.as_str(), Some("builtin" | "unconfined"))
}

/// Not `entitlements`: they let build steps use the VM's network or run with all capabilities.
fn is_builder_option(member: &str, _: &Value) -> bool {
    ["gc", "history"].contains(&member)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn taken(options: Value) -> Taken {
        take(options.as_object().unwrap(), true)
    }

    #[test]
    fn usual_options_pass_unchanged_and_without_a_word() {
        let options = json!({
            "registry-mirrors": ["https://mirror.lan"], "insecure-registries": ["registry.lan:5000"], "debug": true,
            "log-driver": "local", "log-opts": {"max-size": "5m"}, "dns": ["1.1.1.1"], "bip": "10.5.0.1/24",
            "default-address-pools": [{"base": "10.6.0.0/16", "size": 24}], "ipv6": true, "fixed-cidr-v6": "fd00::/80",
            "default-ulimits": {"nofile": {"Name": "nofile", "Hard": 64000, "Soft": 64000}}, "labels": ["a=b"],
            "proxies": {"http-proxy": "http://proxy.lan:1"}, "builder": {"gc": {"enabled": true}}, "ip": "127.0.0.1",
            "default-network-opts": {"bridge": {"com.docker.network.bridge.host_binding_ipv4": "127.0.0.1"}},
            "seccomp-profile": "unconfined",
        });
        let taken = taken(options.clone());
        assert_eq!(Value::Object(taken.options), options);
        assert_eq!(taken.refused, []);
    }

    #[test]
    fn what_reaches_the_vm_or_opens_the_engine_is_left_out_and_named() {
        for (name, value) in [
            ("cdi-spec-dirs", json!(["/var/lib/docker/volumes/v/_data"])),
            ("features", json!({"cdi": true})),
            ("hosts", json!(["tcp://0.0.0.0:2375"])),
            ("authorization-plugins", json!(["../../x"])),
            ("runtimes", json!({"x": {"path": "/usr/bin/crun"}})),
            ("init-path", json!("/var/lib/docker/volumes/v/_data/x")),
            ("metrics-addr", json!("0.0.0.0:1")),
            ("experimental", json!(true)),
            ("data-root", json!("/tmp")),
            ("cgroup-parent", json!("/system")),
            ("seccomp-profile", json!("/etc/shadow")),
            ("log-driver", json!("../../volumes/v/_data/p")),
            ("never-heard-of", json!(1)),
        ] {
            let taken = taken(json!({ name: value }));
            assert!(taken.options.is_empty(), "{name}");
            let text = taken.refused[0].to_string();
            assert!(taken.refused.len() == 1 && text.contains(name), "{text}");
        }
    }

    #[test]
    fn parts_of_an_option_are_left_out_alone() {
        let taken = taken(json!({
            "log-opts": {"tag": "x", "syslog-address": "unixgram:///run/notify", "splunk-capath": "/etc/shadow"},
            "builder": {"gc": {"enabled": true}, "Entitlements": {"network-host": true}, "entitlements": {}},
            "default-network-opts": {"macvlan": {"parent": "eth0"},
                "bridge": {"com.docker.network.bridge.name": "eth0"}},
        }));
        assert_eq!(
            Value::Object(taken.options),
            json!({"log-opts": {"tag": "x"}, "builder": {"gc": {"enabled": true}}, "default-network-opts": {}})
        );
        assert_eq!(taken.refused.len(), 6);
        assert!(taken.refused.contains(&OptionError::Value("log-opts.syslog-address".to_owned())));
    }

    #[test]
    fn runtimes_are_the_users_without_isolation_only() {
        let options = json!({"runtimes": {"kata": {"path": "/k"}}, "default-runtime": "kata"});
        assert_eq!(Value::Object(take(options.as_object().unwrap(), false).options), options);
        assert!(taken(options).options.is_empty());
    }

    #[test]
    fn no_option_has_two_rules() {
        let mut names: Vec<_> = RULES.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    proptest! {
        #[test]
        fn no_spelling_of_an_option_that_is_left_out_gets_through(index in 0..RULES.len(), upper in any::<u32>()) {
            let (name, rule) = RULES[index];
            let spelt = |(at, c): (usize, char)| {
                if upper >> (at % 32) & 1 == 1 { c.to_ascii_uppercase() } else { c }
            };
            let spelling: String = name.chars().enumerate().map(spelt).collect();
            let taken = taken(json!({ spelling.clone(): "x" }));
            if matches!(rule, Never(_) | WithoutIsolation) || spelling != name {
                prop_assert!(taken.options.is_empty());
                prop_assert_eq!(taken.refused.len(), 1);
            }
        }

        #[test]
        fn only_listed_options_pass_and_nothing_panics(name in "[a-zA-Z.-]{0,30}|[a-z-]{0,12}", text in ".{0,20}") {
            let taken = taken(json!({ name.clone(): text, "builder": { name.clone(): 1 } }));
            prop_assert!(taken.options.keys().all(|name| RULES.iter().any(|(known, _)| known == name)));
        }
    }
}
