//! The list of settings: names, kinds, defaults, and what each takes.

use serde_json::Value;

use super::{
    daemon,
    error::SettingsError,
    network::NetworkKind,
    proxy::{self, ProxyUrl},
    socket_mount,
    subnet::Subnet,
};

/// What kind of value a setting takes.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// `true` or `false`.
    Bool {
        /// When it is not set.
        default: bool,
    },
    /// A whole number.
    Integer {
        /// Smallest accepted value.
        min: u64,
        /// Largest accepted value.
        max: u64,
        /// When it is not set; `None` means that it follows the host.
        default: Option<u64>,
    },
    /// One of some words.
    Choice {
        /// The words; the first is the default.
        values: &'static [&'static str],
    },
    /// Text of a certain form.
    Text {
        /// When it is not set.
        default: &'static str,
        /// Whether a text has the form.
        fits: fn(&str) -> bool,
        /// What is accepted, as the end of "write …".
        expected: &'static str,
        /// What may be shown of a text that holds a secret.
        conceal: Option<fn(&str) -> String>,
    },
    /// Any number of texts; none is the default. The command line takes them with commas between.
    List {
        /// Whether one of them has the form.
        fits: fn(&str) -> bool,
        /// What is accepted, as the end of "write …".
        expected: &'static str,
    },
}

/// One setting.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// Its name in `settings.json` and on the command line.
    pub key: &'static str,
    /// What it takes.
    pub kind: Kind,
    /// One line for a person.
    pub description: &'static str,
}

/// Makes a constant of each setting, and the list of all from the same lines.
macro_rules! definitions {
    ($($name:ident: $key:literal, $kind:expr, $description:literal;)*) => {
        $(
            #[doc = $description]
            pub const $name: Definition = Definition { key: $key, kind: $kind, description: $description };
        )*
        /// Every setting there is, in the order in which they are shown.
        pub const DEFINITIONS: &[Definition] = &[$($name),*];
    };
}

const PROXY_URL: Kind = Kind::Text {
    default: "",
    fits: |text| text.is_empty() || text.parse::<ProxyUrl>().is_ok(),
    expected: "a proxy such as http://proxy.example.org:3128; a name and a password stand before an @, with special \
               characters as %XX",
    conceal: Some(proxy::conceal),
};

definitions! {
    ISOLATION: "enhancedContainerIsolation", Kind::Bool { default: true },
        "run every container in a user namespace of its own";
    SOCKET_MOUNT: "dockerSocketMount",
        Kind::Text {
            default: "",
            fits: |text| socket_mount::parse(text).is_some(),
            expected: "a JSON object as dockerSocketMount of a policy has it, such as \
                       {\"imageList\": {\"images\": [\"docker:cli\"]}, \"commandList\": {\"commands\": [\"push\"]}}",
            conceal: None,
        },
        "images whose containers may have the engine's socket, and what may be asked over it; locked with isolation";
    BLOCK_LOAD: "blockDockerLoad", Kind::Bool { default: false },
        "refuse docker load";
    CPUS: "cpus", Kind::Integer { min: 1, max: 32, default: None },
        "virtual CPUs (default: half of the host's)";
    MEMORY_MIB: "memoryMiB", Kind::Integer { min: 256, max: 1 << 24, default: None },
        "guest memory in MiB (default: a quarter of the host's)";
    DISK_GIB: "diskGiB", Kind::Integer { min: 1, max: 16_383, default: Some(64) },
        "largest size of the data disk in GiB; it grows, never shrinks";
    NETWORK: "network",
        Kind::Text {
            default: "user",
            fits: |text| text.parse::<NetworkKind>().is_ok(),
            expected: NetworkKind::EXPECTED,
            conceal: None,
        },
        "what the VM is connected to: the host's network through a process of this user, nothing, the host's passt, or \
         a tap device";
    SUBNET: "vpnkitCIDR",
        Kind::Text {
            default: "192.168.65.0/24",
            fits: |text| text.parse::<Subnet>().is_ok(),
            expected: Subnet::EXPECTED,
            conceal: None,
        },
        "the VM's IPv4 network; change it when the host has another use for these addresses";
    PORT_BINDING: "portBindingBehavior",
        Kind::Choice { values: &["default-port-binding", "default-local-port-binding", "local-only-port-binding"] },
        "where published ports listen: on all addresses of the host unless one is named, on its loopback unless one is \
         named, or on its loopback only";
    HOST_LOOPBACK: "hostLoopback", Kind::Bool { default: true },
        "let host.docker.internal and gateway.docker.internal lead to services on the host's loopback";
    PROXY_MODE: "proxyHttpMode", Kind::Choice { values: &["system", "manual"] },
        "the engine's HTTP proxy: of the environment in which the VM is started, or the three settings that follow";
    PROXY_HTTP: "overrideProxyHttp", PROXY_URL,
        "proxy for http, with proxyHttpMode manual";
    PROXY_HTTPS: "overrideProxyHttps", PROXY_URL,
        "proxy for https, with proxyHttpMode manual";
    PROXY_EXCLUDE: "overrideProxyExclude",
        Kind::List {
            fits: proxy::is_exclusion,
            expected: "names, addresses or networks with commas between, such as .example.org,10.0.0.0/8",
        },
        "what is reached without the proxy, with proxyHttpMode manual";
    CONTAINERS_PROXY: "containersProxy", Kind::Bool { default: false },
        "set HTTP_PROXY, HTTPS_PROXY and NO_PROXY in new containers to the engine's proxy";
    DAEMON_OPTIONS: "dockerDaemonOptions",
        Kind::Text {
            default: "",
            fits: |text| daemon::parse(text).is_some(),
            expected: "a JSON object of dockerd's options by their names in daemon.json, such as {\"debug\": true}",
            conceal: Some(daemon::conceal),
        },
        "options of dockerd as in daemon.json; those that the VM or isolation needs otherwise are ignored";
}

impl Definition {
    /// The setting of this name.
    pub fn find(key: &str) -> Result<&'static Self, SettingsError> {
        DEFINITIONS
            .iter()
            .find(|definition| definition.key == key)
            .ok_or_else(|| SettingsError::UnknownKey(key.to_owned()))
    }

    /// Reads a value as it is written on the command line.
    pub fn parse(&self, text: &str) -> Result<Value, SettingsError> {
        let value = match self.kind {
            Kind::Text { .. } => Value::String(text.to_owned()),
            Kind::List { .. } if !text.starts_with('[') => {
                text.split(',').map(str::trim).filter(|word| !word.is_empty()).collect()
            }
            _ => match text {
                "on" => Value::Bool(true),
                "off" => Value::Bool(false),
                _ => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned())),
            },
        };
        self.check(&value)?;
        Ok(value)
    }

    pub(super) fn check(&self, value: &Value) -> Result<(), SettingsError> {
        let (accepted, expected) = match self.kind {
            Kind::Bool { .. } => (value.is_boolean(), "write true or false".to_owned()),
            Kind::Integer { min, max, .. } => (
                value.as_u64().is_some_and(|number| (min..=max).contains(&number)),
                format!("write a whole number from {min} to {max}"),
            ),
            Kind::Choice { values } => {
                (value.as_str().is_some_and(|word| values.contains(&word)), format!("write {}", values.join(" or ")))
            }
            Kind::Text { fits, expected, .. } => (value.as_str().is_some_and(fits), format!("write {expected}")),
            Kind::List { fits, expected } => (
                value.as_array().is_some_and(|all| all.iter().all(|one| one.as_str().is_some_and(fits))),
                format!("write {expected}"),
            ),
        };
        if accepted {
            return Ok(());
        }
        let value = match self.concealed(value) {
            Value::String(text) => text,
            other => other.to_string(),
        };
        Err(SettingsError::InvalidValue { key: self.key, value, expected })
    }

    /// The value as it may be shown to whoever looks over the person's shoulder.
    pub fn concealed(&self, value: &Value) -> Value {
        match (self.kind, value) {
            (Kind::Text { conceal: Some(conceal), .. }, Value::String(text)) => conceal(text).into(),
            // Whatever it is, it does not belong here.
            (Kind::Text { conceal: Some(_), .. }, _) => "***".into(),
            _ => value.clone(),
        }
    }

    /// The value when nobody set one; `null` means that it follows the host.
    pub fn default_value(&self) -> Value {
        match self.kind {
            Kind::Bool { default } => default.into(),
            Kind::Integer { default, .. } => default.into(),
            Kind::Choice { values } => values.first().copied().into(),
            Kind::Text { default, .. } => default.into(),
            Kind::List { .. } => Value::Array(Vec::new()),
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
