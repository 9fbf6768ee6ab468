//! The kinds of a JSON document's values, which serde takes less seriously than a reader.

use serde_json::Value;

/// A value of another kind than the one that was read of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{}must be {expected}", path, if path.is_empty() { "" } else { " " })]
pub struct OtherKind {
    /// The value's place, such as `a.b[0]`; empty for the whole document.
    pub path: String,
    /// The kind that it should have, as the end of "must be …".
    pub expected: &'static str,
}

/// Refuses values of another kind than the document's, which serde accepts: a list for a struct (its fields in order)
/// and an object for an enum (`{"deny": null}`). `parsed` is the document written as JSON again, `raw` what was read.
pub fn same_kinds(parsed: &Value, raw: &Value) -> Result<(), OtherKind> {
    same_below(parsed, raw, "")
}

fn same_below(parsed: &Value, raw: &Value, path: &str) -> Result<(), OtherKind> {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let expected = match (parsed, raw) {
        (Value::Object(parsed), Value::Object(raw)) => {
            return parsed.iter().try_for_each(|(name, value)| match raw.get(name) {
                Some(raw) => same_below(value, raw, &below(name)),
                // A default that the document leaves out.
                None => Ok(()),
            });
        }
        (Value::Array(parsed), Value::Array(raw)) => {
            return parsed
                .iter()
                .zip(raw)
                .enumerate()
                .try_for_each(|(at, (value, raw))| same_below(value, raw, &format!("{path}[{at}]")));
        }
        (Value::Object(_), _) => "an object",
        (Value::Array(_), _) => "a list",
        (Value::String(_), Value::String(_))
        | (Value::Bool(_), Value::Bool(_))
        | (Value::Number(_), Value::Number(_))
        | (Value::Null, Value::Null) => return Ok(()),
        _ => "a single value",
    };
    Err(OtherKind { path: path.to_owned(), expected })
}
