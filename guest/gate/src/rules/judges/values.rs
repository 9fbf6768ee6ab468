//! Access to the members of a canonical body. A value of another type than expected is refused, never passed over.

use serde_json::Value;

use crate::rules::Refusal;

fn wrong_type(key: &str, expected: &str) -> Refusal {
    Refusal::Malformed(format!("{key} must be {expected}"))
}

/// Returns a string; empty if it is not there, which means the same to the engine.
pub(super) fn text<'a>(object: &'a Value, key: &str) -> Result<&'a str, Refusal> {
    match &object[key] {
        Value::Null => Ok(""),
        Value::String(text) => Ok(text),
        _ => Err(wrong_type(key, "a string")),
    }
}

/// Returns the elements of an array; none if it is not there.
pub(super) fn elements<'a>(object: &'a Value, key: &str) -> Result<&'a [Value], Refusal> {
    match &object[key] {
        Value::Null => Ok(&[]),
        Value::Array(elements) => Ok(elements),
        _ => Err(wrong_type(key, "an array")),
    }
}

/// Returns the strings of an array.
pub(super) fn texts<'a>(object: &'a Value, key: &str) -> Result<Vec<&'a str>, Refusal> {
    let strings = elements(object, key)?.iter().map(Value::as_str).collect::<Option<_>>();
    strings.ok_or_else(|| wrong_type(key, "an array of strings"))
}

/// Returns the members of an object of strings.
pub(super) fn pairs<'a>(object: &'a Value, key: &str) -> Result<Vec<(&'a str, &'a str)>, Refusal> {
    let wrong = || wrong_type(key, "an object of strings");
    match &object[key] {
        Value::Null => Ok(Vec::new()),
        Value::Object(members) => members
            .iter()
            .map(|(key, value)| Some((key.as_str(), value.as_str()?)))
            .collect::<Option<_>>()
            .ok_or_else(wrong),
        _ => Err(wrong()),
    }
}

/// Returns the values of an object.
pub(super) fn members<'a>(object: &'a Value, key: &str) -> Result<Vec<&'a Value>, Refusal> {
    match &object[key] {
        Value::Null => Ok(Vec::new()),
        Value::Object(members) => Ok(members.values().collect()),
        _ => Err(wrong_type(key, "an object")),
    }
}

/// Returns true if a member is there and not empty.
pub(super) fn is_set(object: &Value, key: &str) -> bool {
    match &object[key] {
        Value::Null => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(elements) => !elements.is_empty(),
        Value::Object(members) => !members.is_empty(),
        Value::Bool(_) | Value::Number(_) => true,
    }
}
