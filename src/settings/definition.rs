//! The table of settings: the name, kind of value, default and description of each.
//!
//! A new setting is one line of [`DEFINITIONS`] and a getter of `Settings`. The command line, the check of the file and
//! `bulkhead settings list` follow the table.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{
    daemon,
    error::SettingsError,
    network::NetworkKind,
    proxy::{self, ProxyUrl},
    shares, socket_mount,
    ssh_agent::SshAgent,
    subnet::Subnet,
    vm_ports::{self, VmPort},
    zone::Zone,
};

/// The kind of value that a setting accepts.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `true` or `false`.
    Bool {
        /// The default.
        default: bool,
    },
    /// A whole number.
    Integer {
        /// Smallest accepted value.
        min: u64,
        /// Largest accepted value.
        max: u64,
        /// The default; `None` follows the host.
        default: Option<u64>,
    },
    /// One of some words.
    Choice {
        /// The words; the first is the default.
        values: &'static [&'static str],
    },
    /// Text of a certain form.
    Text {
        /// The default.
        default: &'static str,
        /// Accepts a text of the form.
        fits: fn(&str) -> bool,
        /// The accepted form, as the end of "must be …".
        expected: &'static str,
        /// Conceals the secrets of a text; `None` for one without any.
        conceal: Option<fn(&str) -> String>,
    },
    /// Any number of texts, separated by commas on the command line. The default is an empty list.
    List {
        /// Accepts an item of the form.
        fits: fn(&str) -> bool,
        /// The accepted form, as the end of "must be …".
        expected: &'static str,
    },
    /// JSON of a certain form, on the command line as well.
    Json {
        /// The default.
        default: fn() -> Value,
        /// Accepts a value of the form.
        fits: fn(&Value) -> bool,
        /// The accepted form, as the end of "must be …".
        expected: &'static str,
    },
}

/// The origin of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// The user.
    User,
    /// The policy, as a default that the user may change.
    Policy,
    /// The policy, for good.
    Locked,
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Its name in `settings.json` and on the command line.
    pub key: &'static str,
    /// Its kind of value.
    pub kind: Kind,
    /// One line for `bulkhead settings list`.
    pub description: &'static str,
}

/// Makes a constant for each setting, and the list of all from the same lines.
macro_rules! definitions {
    ($($name:ident: $key:literal, $kind:expr, $description:literal;)*) => {
        $(
            #[doc = $description]
            pub const $name: Definition = Definition { key: $key, kind: $kind, description: $description };
        )*
        /// All settings, in the order in which they are shown.
        pub const DEFINITIONS: &[Definition] = &[$($name),*];
    };
}

const PROXY_URL: Kind = Kind::Text {
    // Empty for no proxy: a policy has to be able to lock one of the two URLs to none.
    default: "",
    fits: |text| text.is_empty() || text.parse::<ProxyUrl>().is_ok(),
    expected: "a proxy URL such as http://proxy.example.org:3128; put user and password before an @, with special \
               characters as %XX",
    conceal: Some(proxy::conceal),
};

definitions! {
    // The names are Docker Desktop's where it has the same setting, so that its documentation and policies apply.
    //
    // On by default, without exceptions. Both stand under one lock of the policy.
    ISOLATION: "enhancedContainerIsolation", Kind::Bool { default: true },
        "run each container in its own user namespace";
    SOCKET_MOUNT: "dockerSocketMount",
        Kind::Text {
            default: "",
            fits: |text| socket_mount::parse(text).is_some(),
            expected: "a JSON object in the form of a policy's dockerSocketMount, such as \
                       {\"imageList\": {\"images\": [\"docker:cli\"]}, \"commandList\": {\"commands\": [\"push\"]}}",
            conceal: None,
        },
        "images whose containers may use the engine's socket, and the commands allowed over it; locked together with \
         isolation";
    BLOCK_LOAD: "blockDockerLoad", Kind::Bool { default: false },
        "refuse docker load";
    // The host may have less than these ranges allow; `backend/host.rs` compares. A default of `None` follows the host,
    // also after the file was copied to another one.
    CPUS: "cpus", Kind::Integer { min: 1, max: 32, default: None },
        "virtual CPUs (default: half of the host's)";
    MEMORY_MIB: "memoryMiB", Kind::Integer { min: 256, max: 1 << 24, default: None },
        "guest memory in MiB (default: a quarter of the host's, at most 16384)";
    // The limit of ext4 with 4 KiB blocks, less one GiB.
    DISK_GIB: "diskGiB", Kind::Integer { min: 1, max: 16_383, default: Some(64) },
        "maximum size of the data disk in GiB; it can grow but never shrinks";
    NETWORK: "network",
        Kind::Text {
            default: "user",
            fits: |text| text.parse::<NetworkKind>().is_ok(),
            expected: NetworkKind::EXPECTED,
            conceal: None,
        },
        "network of the VM: user (built-in user-mode networking), none, passt, or tap=NAME";
    SUBNET: "vpnkitCIDR",
        Kind::Text {
            default: "192.168.65.0/24",
            fits: |text| text.parse::<Subnet>().is_ok(),
            expected: Subnet::EXPECTED,
            conceal: None,
        },
        "IPv4 network of the VM; change it if the host uses these addresses for something else";
    PORT_BINDING: "portBindingBehavior",
        Kind::Choice { values: &["default-port-binding", "default-local-port-binding", "local-only-port-binding"] },
        "where published ports listen: on all host addresses unless one is given, on loopback unless one is given, or on \
         loopback only";
    VM_PORTS: "vmPorts",
        Kind::List { fits: |text| text.parse::<VmPort>().is_ok(), expected: vm_ports::EXPECTED },
        "ports of the VM itself that are published, without isolation only; `bulkhead ports publish` changes it";
    HOST_LOOPBACK: "hostLoopback", Kind::Bool { default: true },
        "let host.docker.internal and gateway.docker.internal reach services on the host's loopback";
    SHARES: "filesharingDirectories",
        Kind::Json {
            default: shares::default_value,
            fits: |value| shares::parse(value).is_some(),
            expected: shares::EXPECTED,
        },
        "directories of this machine that containers may mount; `bulkhead share` changes it";
    HOST_LOCKS: "filesharingHostLocks", Kind::Bool { default: false },
        "let locks on files in shared directories hold against programs of this machine, too";
    SSH_AGENT: "sshAgent",
        Kind::Text {
            default: "auto",
            fits: |text| text.parse::<SshAgent>().is_ok(),
            expected: SshAgent::EXPECTED,
            conceal: None,
        },
        "ssh-agent that containers may mount: auto (SSH_AUTH_SOCK of the command that starts the VM), off, or the path \
         of its socket";
    TIME_ZONE: "timeZone",
        Kind::Text {
            default: "host",
            fits: |text| text.parse::<Zone>().is_ok(),
            expected: Zone::EXPECTED,
            conceal: None,
        },
        "time zone of containers that mount /etc/localtime or /etc/timezone: host, or a name such as Europe/Berlin";
    SHARED_SOCKETS: "filesharingSockets",
        Kind::Json {
            default: || Value::Array(Vec::new()),
            fits: |value| shares::parse_sockets(value).is_some(),
            expected: shares::EXPECTED_SOCKETS,
        },
        "Unix sockets of this machine that containers may mount by their paths, as a JSON list";
    // The URLs count with mode manual only, so that switching back and forth does not lose them.
    PROXY_MODE: "proxyHttpMode", Kind::Choice { values: &["system", "manual"] },
        "the engine's HTTP proxy: from the environment in which the VM is started, or from the three settings below";
    PROXY_HTTP: "overrideProxyHttp", PROXY_URL,
        "proxy for HTTP, used with proxyHttpMode manual";
    PROXY_HTTPS: "overrideProxyHttps", PROXY_URL,
        "proxy for HTTPS, used with proxyHttpMode manual";
    PROXY_EXCLUDE: "overrideProxyExclude",
        Kind::List {
            fits: proxy::is_exclusion,
            expected: "names, addresses or networks separated by commas, such as .example.org,10.0.0.0/8",
        },
        "destinations reached without the proxy, used with proxyHttpMode manual";
    CONTAINERS_PROXY: "containersProxy", Kind::Bool { default: false },
        "set HTTP_PROXY, HTTPS_PROXY and NO_PROXY in new containers to the engine's proxy";
    // The guest's init drops the options that would move the data or open another way in.
    DAEMON_OPTIONS: "dockerDaemonOptions",
        Kind::Text {
            default: "",
            fits: |text| daemon::parse(text).is_some(),
            expected: "a JSON object of dockerd options as named in daemon.json, such as {\"debug\": true}",
            conceal: Some(daemon::conceal),
        },
        "dockerd options as in daemon.json; those that the VM or isolation depends on are ignored";
}

impl Definition {
    /// Finds a setting by its name.
    pub fn find(key: &str) -> Result<&'static Self, SettingsError> {
        DEFINITIONS
            .iter()
            .find(|definition| definition.key == key)
            .ok_or_else(|| SettingsError::UnknownKey(key.to_owned()))
    }

    /// Parses a value from the command line.
    pub fn parse(&self, text: &str) -> Result<Value, SettingsError> {
        let value = match self.kind {
            // As it is: a text may look like JSON, and those of some settings are.
            Kind::Text { .. } => Value::String(text.to_owned()),
            Kind::List { .. } if !text.starts_with('[') => {
                text.split(',').map(str::trim).filter(|word| !word.is_empty()).collect()
            }
            _ => match text {
                "on" => Value::Bool(true),
                "off" => Value::Bool(false),
                // A word that is not JSON, such as `manual`, is a text; the check below refuses it where a number is
                // due.
                _ => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned())),
            },
        };
        self.check(&value)?;
        Ok(value)
    }

    /// Checks a value of a file, a policy or the command line.
    pub(super) fn check(&self, value: &Value) -> Result<(), SettingsError> {
        let (accepted, expected) = match self.kind {
            Kind::Bool { .. } => (value.is_boolean(), "must be true or false".to_owned()),
            Kind::Integer { min, max, .. } => (
                value.as_u64().is_some_and(|number| (min..=max).contains(&number)),
                format!("must be a whole number from {min} to {max}"),
            ),
            Kind::Choice { values } => {
                (value.as_str().is_some_and(|word| values.contains(&word)), format!("must be {}", values.join(" or ")))
            }
            Kind::Text { fits, expected, .. } => (value.as_str().is_some_and(fits), format!("must be {expected}")),
            Kind::List { fits, expected } => (
                value.as_array().is_some_and(|all| all.iter().all(|one| one.as_str().is_some_and(fits))),
                format!("must be {expected}"),
            ),
            Kind::Json { fits, expected, .. } => (fits(value), format!("must be {expected}")),
        };
        if accepted {
            return Ok(());
        }
        // The message goes to terminals and logs, and a mistyped URL may still hold the right password.
        let value = match self.concealed(value) {
            Value::String(text) => text,
            other => other.to_string(),
        };
        Err(SettingsError::InvalidValue { key: self.key, value, expected })
    }

    /// The value without its secrets, for screens and logs.
    pub fn concealed(&self, value: &Value) -> Value {
        match (self.kind, value) {
            (Kind::Text { conceal: Some(conceal), .. }, Value::String(text)) => conceal(text).into(),
            // Of the wrong kind: there is no telling which part of it is secret.
            (Kind::Text { conceal: Some(_), .. }, _) => "***".into(),
            _ => value.clone(),
        }
    }

    /// The default; `null` follows the host.
    pub fn default_value(&self) -> Value {
        match self.kind {
            Kind::Bool { default } => default.into(),
            Kind::Integer { default, .. } => default.into(),
            Kind::Choice { values } => values.first().copied().into(),
            Kind::Text { default, .. } => default.into(),
            Kind::List { .. } => Value::Array(Vec::new()),
            Kind::Json { default, .. } => default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_default_is_a_value_of_its_own_setting() {
        for definition in DEFINITIONS {
            let default = definition.default_value();
            if !default.is_null() {
                definition.check(&default).unwrap();
            }
        }
    }

    #[test]
    fn no_two_settings_have_one_name() {
        let keys: BTreeSet<_> = DEFINITIONS.iter().map(|definition| definition.key).collect();
        assert_eq!(keys.len(), DEFINITIONS.len());
    }

    #[test]
    fn a_list_is_written_with_commas_or_as_json() {
        let expected = serde_json::json!([".example.org", "10.0.0.0/8"]);
        for text in [".example.org,10.0.0.0/8", " .example.org , 10.0.0.0/8,", r#"[".example.org","10.0.0.0/8"]"#] {
            assert_eq!(PROXY_EXCLUDE.parse(text).unwrap(), expected, "{text}");
        }
        assert_eq!(PROXY_EXCLUDE.parse("").unwrap(), serde_json::json!([]));
        for text in ["a b", "[1]", "[\"a,b\"]", "a\nb"] {
            assert!(PROXY_EXCLUDE.parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_password_is_in_no_message_and_not_shown() {
        for text in ["http://me:s3cret@proxy:99999", "ftp://me:s3cret@proxy", "me:s3cret@proxy:x", "http://s3cret@a b"]
        {
            let message = PROXY_HTTP.parse(text).unwrap_err().to_string();
            assert!(message.contains("overrideProxyHttp") && !message.contains("s3cret"), "{message}");
        }
        let value = PROXY_HTTP.parse("http://me:s3cret@proxy:3128").unwrap();
        assert_eq!(PROXY_HTTP.concealed(&value), "http://***@proxy:3128");
        assert_eq!(PROXY_HTTP.concealed(&serde_json::json!(["s3cret"])), "***");
    }

    proptest! {
        #[test]
        fn what_a_setting_takes_it_finds_valid_again(index in 0..DEFINITIONS.len(), text in ".{0,40}") {
            let definition = &DEFINITIONS[index];
            if let Ok(value) = definition.parse(&text) {
                prop_assert!(definition.check(&value).is_ok());
            }
        }
    }
}
