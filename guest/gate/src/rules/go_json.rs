//! JSON objects as Go's `encoding/json` reads them, with the bytes of each value kept.
//!
//! Typed structures would drop the keys that they do not know, and reading into a map would drop all but one of several
//! equal keys, while Go merges them. So objects stay lists of members, and values stay text until they are needed.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use serde_json::value::RawValue;

use super::refusal::Refusal;

/// The members of an object in order, equal keys included.
#[derive(Debug, Default)]
pub(super) struct Object<'a>(pub(super) Vec<(String, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Object<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;
        impl<'de> Visitor<'de> for Members {
            type Value = Object<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Object(members))
            }
        }
        deserializer.deserialize_map(Members)
    }
}

/// Returns true if Go stores the member `key` in the field `name`, which has to be ASCII. Go compares under Unicode's
/// simple case folding.
pub(super) fn is_field(key: &str, name: &str) -> bool {
    let fold = |c: char| match c {
        // The only two characters outside ASCII that fold into it: the long s and the Kelvin sign.
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        c => c.to_ascii_lowercase(),
    };
    key.chars().map(fold).eq(name.chars().map(|c| c.to_ascii_lowercase()))
}

/// Reads a value.
pub(super) fn parse<'a, T: Deserialize<'a>>(text: &'a str) -> Result<T, Refusal> {
    serde_json::from_str(text).map_err(|error| Refusal::Malformed(error.to_string()))
}

/// Reads an array; any other value has no elements.
pub(super) fn array(value: &RawValue) -> Result<Vec<&RawValue>, Refusal> {
    if value.get().starts_with('[') { parse(value.get()) } else { Ok(Vec::new()) }
}

/// Reads a string, with its escapes resolved; `None` for any other value.
pub(super) fn string(value: &RawValue) -> Result<Option<String>, Refusal> {
    if value.get().starts_with('"') { parse(value.get()).map(Some) } else { Ok(None) }
}

/// Writes an object. The values are JSON already and go out byte for byte.
pub(super) fn write<'a>(members: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut text = String::from("{");
    for (at, (key, value)) in members.into_iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        text.push_str(&serde_json::Value::from(key).to_string());
        text.push(':');
        text.push_str(value);
    }
    text.push('}');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_match_as_in_go() {
        for key in ["Runtime", "runtime", "RUNTIME", "rUnTiMe"] {
            assert!(is_field(key, "Runtime"), "{key}");
        }
        assert!(is_field("Bind\u{17f}", "Binds"));
        assert!(is_field("\u{212a}ind", "Kind"));
        assert!(!is_field("Runtimes", "Runtime"));
        assert!(!is_field("Run-time", "Runtime"));
    }

    #[test]
    fn equal_keys_are_all_kept_and_values_keep_their_bytes() {
        let object: Object<'_> = parse(r#"{"a": 1.50, "A":{ "x" : [] }, "a":12345678901234567890123}"#).unwrap();
        let values: Vec<_> = object.0.iter().map(|(_, value)| value.get()).collect();
        assert_eq!(values, ["1.50", r#"{ "x" : [] }"#, "12345678901234567890123"]);
    }

    #[test]
    fn keys_are_written_as_json() {
        assert_eq!(write([("a\"b", "1"), ("c", "[]")]), r#"{"a\"b":1,"c":[]}"#);
    }
}
