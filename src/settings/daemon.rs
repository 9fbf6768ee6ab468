//! The setting `dockerDaemonOptions`: a text with the contents of a `daemon.json`.

use serde_json::{Map, Value, json};

/// Longest text, in bytes. All of the guest's configuration has to fit into one message.
const MAX_TEXT: usize = 16 * 1024;

/// Parses the options; `None` for a text that is not an object of options.
pub(super) fn parse(text: &str) -> Option<Map<String, Value>> {
    if text.trim().is_empty() {
        return Some(Map::new());
    }
    let options: Map<String, Value> =
        Some(text).filter(|text| text.len() <= MAX_TEXT)?.parse::<Value>().ok().and_then(|value| match value {
            Value::Object(options) => Some(options),
            _ => None,
        })?;
    // Every option of dockerd has a lower-case name, but Go's JSON decoder ignores case: dockerd would take `Proxies`
    // for the `proxies` that `Settings::daemon_options` removes.
    let name = |key: &String| {
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    options.keys().all(name).then_some(options)
}

/// Lets dockerd publish ports on the loopback address unless a container names another.
pub(super) fn publish_on_loopback(options: &mut Map<String, Value>) {
    const LOOPBACK: &str = "127.0.0.1";
    options.insert("ip".to_owned(), LOOPBACK.into());
    // `ip` is for the default bridge only; networks that are created later take their address from these options. Other
    // options of the user's in the same objects stay.
    let networks = object(options.entry("default-network-opts").or_insert_with(|| json!({})));
    let bridge = object(networks.entry("bridge").or_insert_with(|| json!({})));
    bridge.insert("com.docker.network.bridge.host_binding_ipv4".to_owned(), LOOPBACK.into());
}

/// Returns the value as an object, after replacing anything else by an empty one.
fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("just made an object"),
    }
}

/// The text in one line without passwords, which are in URLs before an `@`.
pub(super) fn conceal(text: &str) -> String {
    if text.contains('@') { "***".into() } else { text.replace(char::is_control, " ") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_an_object_of_lower_case_names_is_taken() {
        for text in ["", " \n", "{}", r#"{"debug": true, "registry-mirrors": ["https://m"]}"#] {
            assert!(parse(text).is_some(), "{text}");
        }
        for text in ["[]", "null", "{", "debug", r#"{"Runtimes": {}}"#, r#"{"": 1}"#, r#"{"a b": 1}"#] {
            assert!(parse(text).is_none(), "{text}");
        }
        assert!(parse(&format!("{{\"a\": \"{}\"}}", "x".repeat(MAX_TEXT))).is_none());
    }

    #[test]
    fn a_password_is_not_shown_and_the_text_has_one_line() {
        assert_eq!(conceal("{\"registry-mirrors\": [\"https://me:s3cret@m\"]}"), "***");
        assert_eq!(conceal("{\n\"debug\": true}"), "{ \"debug\": true}");
    }

    #[test]
    fn ports_on_the_loopback_are_set_for_the_default_and_for_new_networks() {
        let mut options =
            parse(r#"{"ip": "0.0.0.0", "default-network-opts": {"macvlan": {"a": "b"}, "bridge": 1}}"#).unwrap();
        publish_on_loopback(&mut options);
        let bridge = json!({"com.docker.network.bridge.host_binding_ipv4": "127.0.0.1"});
        let networks = json!({"macvlan": {"a": "b"}, "bridge": bridge});
        assert_eq!(Value::Object(options), json!({"ip": "127.0.0.1", "default-network-opts": networks}));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,80}") {
            let _ = parse(&text);
        }
    }
}
