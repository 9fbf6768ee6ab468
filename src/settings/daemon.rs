//! Options of dockerd, as a text that holds what `daemon.json` would.

use serde_json::{Map, Value};

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

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,80}") {
            let _ = parse(&text);
        }
    }
}
