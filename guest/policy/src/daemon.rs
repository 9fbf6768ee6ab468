//! Options of dockerd that a user may set.
//!
//! dockerd reads about 90 options. [`take`] takes those that the table in [`bulkhead_protocol::daemon_options`] allows,
//! which say how containers are run, logged and connected, and names the reason for each other one. The table is the
//! same with isolation on and off, but for runtimes, which a user may add without isolation.

use bulkhead_protocol::daemon_options::{Check, Reason, Rule, daemon_option};
use serde_json::{Map, Value};

use crate::{drivers, logs};

/// The log driver of containers if the user names none.
pub const DEFAULT_LOG_DRIVER: &str = "json-file";

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
    #[error("the option {0:?} of the engine is left out: the VM requires its own value")]
    BreaksVm(String),
    /// The option is taken, but not with this value.
    #[error("the option {0:?} of the engine is left out: its value is not allowed")]
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

/// Takes from a user's options those that dockerd may have.
pub fn take(wanted: &Map<String, Value>, isolation: bool) -> Taken {
    let mut taken = Taken::default();
    for (name, value) in wanted {
        let own = || name.clone();
        let allowed = match daemon_option(name).map(|option| option.rule) {
            Some(Rule::Any) => Ok(value.clone()),
            Some(Rule::WithoutIsolation) if !isolation => Ok(value.clone()),
            Some(Rule::Checked(check)) => checked(check, name, wanted, &mut taken.refused),
            Some(Rule::Never(Reason::Ours)) => Err(OptionError::Ours(own())),
            Some(Rule::WithoutIsolation | Rule::Never(Reason::NamesVm)) => Err(OptionError::NamesVm(own())),
            Some(Rule::Never(Reason::OpensEngine)) => Err(OptionError::OpensEngine(own())),
            Some(Rule::Never(Reason::BreaksVm)) => Err(OptionError::BreaksVm(own())),
            None => Err(OptionError::Unknown(quoted(name))),
        };
        match allowed {
            Ok(value) => drop(taken.options.insert(name.clone(), value)),
            Err(reason) => taken.refused.push(reason),
        }
    }
    taken
}

/// The beginning of a user's text, for a message.
fn quoted(text: &str) -> String {
    text.chars().take(MAX_QUOTED).collect()
}

/// A reason for the name of an option or of a member.
type ReasonFor = fn(String) -> OptionError;

/// Returns the option's value as far as it is allowed. The members that are not are added to `refused` as
/// `option.member`.
fn checked(
    check: Check,
    name: &str,
    wanted: &Map<String, Value>,
    refused: &mut Vec<OptionError>,
) -> Result<Value, OptionError> {
    let value = wanted.get(name).unwrap_or(&Value::Null);
    let one = |passes: bool| if passes { Ok(value.clone()) } else { Err(OptionError::Value(name.to_owned())) };
    let mut members = |judge: &dyn Fn(&str, &Value) -> Result<(), ReasonFor>| {
        let Value::Object(object) = value else { return Err(OptionError::Value(name.to_owned())) };
        let mut good = Map::new();
        for (member, value) in object {
            match judge(member, value) {
                Ok(()) => drop(good.insert(member.clone(), value.clone())),
                Err(reason) => refused.push(reason(format!("{name}.{}", quoted(member)))),
            }
        }
        Ok(Value::Object(good))
    };
    let listed = |passes: bool| if passes { Ok(()) } else { Err(OptionError::Value as ReasonFor) };
    match check {
        Check::LogDriver => one(log_driver(value).is_some()),
        // The profiles that have a name; everything else is the path of a file.
        Check::SeccompProfile => one(matches!(value.as_str(), Some("builtin" | "unconfined"))),
        Check::Proxies => members(&|member, _| listed(["http-proxy", "https-proxy", "no-proxy"].contains(&member))),
        // Not `entitlements`: they let build steps use the VM's network or run with all capabilities.
        Check::Builder => members(&|member, _| listed(["gc", "history"].contains(&member))),
        Check::NetworkOptions => members(&|driver, value| listed(is_network_option(driver, value))),
        Check::LogOptions => {
            // A driver that is left out is replaced with the default, and so is one that is not named.
            let driver = wanted.get("log-driver").and_then(log_driver).unwrap_or(DEFAULT_LOG_DRIVER);
            members(&|key, value| {
                let value = value.as_str().ok_or(OptionError::Value as ReasonFor)?;
                logs::judge(driver, [(key, value)]).map_err(|reason| match reason {
                    logs::Error::Key { .. } => OptionError::Unknown as ReasonFor,
                    logs::Error::File(_) => OptionError::NamesVm,
                    logs::Error::Address { .. } | logs::Error::Driver(_) => OptionError::Value,
                })
            })
        }
    }
}

/// The name of a log driver, if it is one of the engine's own.
fn log_driver(value: &Value) -> Option<&str> {
    value.as_str().filter(|name| !name.is_empty() && drivers::log(name).is_ok())
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

#[cfg(test)]
mod tests {
    use bulkhead_protocol::daemon_options::DAEMON_OPTIONS;
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
            ("log-driver", json!("plugin")),
            ("log-driver", json!("")),
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
        assert!(taken.refused.contains(&OptionError::Unknown("log-opts.syslog-address".to_owned())));
    }

    #[test]
    fn runtimes_are_the_users_without_isolation_only() {
        let options = json!({"runtimes": {"kata": {"path": "/k"}}, "default-runtime": "kata"});
        assert_eq!(Value::Object(take(options.as_object().unwrap(), false).options), options);
        assert!(taken(options).options.is_empty());
    }

    #[test]
    fn log_options_are_those_that_the_driver_has() {
        let log = |driver: Value, options: Value| {
            let taken = taken(json!({"log-driver": driver, "log-opts": options}));
            (taken.options["log-opts"].clone(), taken.refused)
        };
        let syslog = json!({"syslog-address": "udp://10.0.0.1:514", "syslog-facility": "daemon", "tag": "x"});
        assert_eq!(log(json!("syslog"), syslog.clone()), (syslog.clone(), vec![]));
        // Without a driver, and with one that is left out, they are judged as json-file's.
        let names = |refused: Vec<OptionError>| refused.iter().map(ToString::to_string).collect::<String>();
        let (left, refused) = log(json!("plugin"), syslog);
        assert_eq!(left, json!({"tag": "x"}));
        let text = names(refused);
        assert!(text.contains("log-driver") && text.contains("syslog-address") && text.contains("syslog-facility"));
        // Nothing that a driver would read or reach in the VM, however it is written.
        for (driver, key, value) in [
            ("syslog", "syslog-address", " unix:///run/x"),
            ("syslog", "syslog-address", "udp:///run/x"),
            ("syslog", "syslog-tls-ca-cert", "etc/shadow"),
            ("fluentd", "fluentd-address", "unix://x"),
            ("splunk", "splunk-url", "FILE:///etc/shadow"),
            ("splunk", "splunk-capath", "x"),
            ("json-file", "new-path", "x"),
            ("json-file", "Max-Size", "1m"),
        ] {
            let (left, refused) = log(json!(driver), json!({ key: value }));
            assert_eq!((left, refused.len()), (json!({}), 1), "{driver} {key}={value}");
        }
        assert_eq!(log(json!("local"), json!({"max-size": 5})).0, json!({}));
    }

    proptest! {
        #[test]
        fn no_spelling_of_an_option_that_is_left_out_gets_through(
            index in 0..DAEMON_OPTIONS.len(), upper in any::<u32>()
        ) {
            let (name, rule) = (DAEMON_OPTIONS[index].name, DAEMON_OPTIONS[index].rule);
            let spelt = |(at, c): (usize, char)| {
                if upper >> (at % 32) & 1 == 1 { c.to_ascii_uppercase() } else { c }
            };
            let spelling: String = name.chars().enumerate().map(spelt).collect();
            let taken = taken(json!({ spelling.clone(): "x" }));
            if matches!(rule, Rule::Never(_) | Rule::WithoutIsolation) || spelling != name {
                prop_assert!(taken.options.is_empty());
                prop_assert_eq!(taken.refused.len(), 1);
            }
        }

        #[test]
        fn only_listed_options_pass_and_nothing_panics(name in "[a-zA-Z.-]{0,30}|[a-z-]{0,12}", text in ".{0,20}") {
            let taken = taken(json!({ name.clone(): text, "builder": { name.clone(): 1 } }));
            prop_assert!(taken.options.keys().all(|name| daemon_option(name).is_some()));
        }
    }
}
