//! Options of dockerd, as a text that holds what `daemon.json` would.

use serde_json::{Map, Value, json};

/// Longest text, in bytes: with all else that the guest is told it fits into one message.
const LONGEST: usize = 16 * 1024;

/// The options; `None` when the text holds none. All names of dockerd's are lower case, and it could take one in
/// another case for the same as ours.
pub(super) fn parse(text: &str) -> Option<Map<String, Value>> {
    if text.trim().is_empty() {
        return Some(Map::new());
    }
    let options: Map<String, Value> =
        Some(text).filter(|text| text.len() <= LONGEST)?.parse::<Value>().ok().and_then(|value| match value {
            Value::Object(options) => Some(options),
            _ => None,
        })?;
    let name = |key: &String| {
        !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
    };
    options.keys().all(name).then_some(options)
}

/// Has dockerd publish ports on the loopback when no address is named.
pub(super) fn publish_on_loopback(options: &mut Map<String, Value>) {
    const LOOPBACK: &str = "127.0.0.1";
    options.insert("ip".to_owned(), LOOPBACK.into());
    // The option above is for the default network; networks that are made have options of their own.
    let networks = object(options.entry("default-network-opts").or_insert_with(|| json!({})));
    let bridge = object(networks.entry("bridge").or_insert_with(|| json!({})));
    bridge.insert("com.docker.network.bridge.host_binding_ipv4".to_owned(), LOOPBACK.into());
}

/// The object that a value is; it becomes an empty one when it is anything else.
fn object(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("it was made one"),
    }
}

/// The text in one line. Names and passwords are in URLs, before an @.
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
        assert!(parse(&format!("{{\"a\": \"{}\"}}", "x".repeat(LONGEST))).is_none());
    }

    #[test]
    fn a_password_is_not_shown_and_the_text_has_one_line() {
        assert_eq!(conceal("{\"registry-mirrors\": [\"https://me:s3cret@m\"]}"), "***");
        assert_eq!(conceal("{\n\"debug\": true}"), "{ \"debug\": true}");
    }

    #[test]
    fn ports_on_the_loopback_are_an_option_of_the_default_network_and_of_new_ones() {
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
