//! Shapes of JSON bodies, and the reader that keeps of a body what its shape names.
//!
//! dockerd reads a body with Go's `encoding/json`: keys match in any case, unknown ones are ignored, of several equal
//! keys the last one wins or is merged. What a judge sees must be what dockerd sees, so a body is not passed on but
//! written again: known keys in their one spelling, each once, with values of the expected types.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::kind::Text;
use crate::rules::{go_json::is_field, refusal::Refusal};

/// The shape of a JSON value, as one of the engine's Go types defines it.
#[derive(Clone, Copy, Debug)]
pub enum Shape {
    /// A structure. The groups are the structure's own fields and those of embedded structures.
    Object(&'static [&'static [Field]]),
    /// A map: the kind of its keys, and the shape of its values.
    Map(Text, &'static Shape),
    /// A list (`[]T` and `[N]T`).
    List(&'static Shape),
    /// A list of strings for which a single string may stand (`strslice.StrSlice`).
    Words(Text),
    /// A string. Bytes (`[]byte`) are one too, in base64.
    Text(Text),
    /// A signed integer of 64 bits (`int`, `int64`, `time.Duration`).
    Integer,
    /// An unsigned integer up to a maximum (`uint16`, `uint32`, `uint64`, `os.FileMode`).
    Unsigned(u64),
    /// A number with a fraction.
    Float,
    /// `true` or `false`.
    Bool,
}

/// A field of a structure.
pub type Field = (&'static str, Shape);

impl Shape {
    /// Returns the value that Go leaves in a new variable of this shape.
    fn zero(self) -> Value {
        match self {
            Self::Object(_) | Self::Map(..) => Value::Object(Map::new()),
            Self::List(_) | Self::Words(_) => Value::Array(Vec::new()),
            Self::Text(_) => Value::from(""),
            Self::Integer | Self::Unsigned(_) => Value::from(0),
            Self::Float => Value::from(0.0),
            Self::Bool => Value::from(false),
        }
    }

    /// Returns the field that Go stores the member `key` in, with its number.
    fn field(groups: &'static [&'static [Field]], key: &str) -> Option<(usize, &'static Field)> {
        let fields = || groups.iter().flat_map(|group| group.iter()).enumerate();
        // Clients nearly always write the exact name, which also costs less to compare.
        fields().find(|(_, (name, _))| *name == key).or_else(|| fields().find(|(_, (name, _))| is_field(key, name)))
    }
}

/// Reads a body by its shape. The result has known keys only, each once and in its canonical spelling.
pub fn read(shape: &'static Shape, body: &[u8]) -> Result<Value, Refusal> {
    // Go would replace invalid UTF-8 and lone surrogates, and so see other names and paths than the gate. serde_json
    // refuses both in strings that it reads, but skips those below unknown keys; here all of the body has to be valid.
    let text = std::str::from_utf8(body).map_err(|error| Refusal::Malformed(error.to_string()))?;
    let mut reader = serde_json::Deserializer::from_str(text);
    let read = Reader(*shape).deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    // A `null` instead of a body changes nothing in dockerd's empty structure.
    read.map(|value| value.unwrap_or_else(|| shape.zero())).map_err(|error| Refusal::Malformed(error.to_string()))
}

/// Reads one value. `None` stands for `null`, which leaves dockerd's variable as it is.
///
/// The depth is bounded by that of the shape, which is static; unknown values are skipped without recursion.
#[derive(Clone, Copy)]
struct Reader(Shape);

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Reader {
    fn integer<E: Error>(self, value: i128) -> Result<Option<Value>, E> {
        let (low, high) = match self.0 {
            Shape::Integer => (i128::from(i64::MIN), i128::from(i64::MAX)),
            Shape::Unsigned(high) => (0, i128::from(high)),
            Shape::Float => return Ok(Some(Value::from(value as f64))),
            _ => return Err(E::invalid_type(serde::de::Unexpected::Other("a number"), &self)),
        };
        if !(low..=high).contains(&value) {
            return Err(E::custom(format_args!("the number {value} is not between {low} and {high}")));
        }
        // One of the two always holds it, because no range reaches beyond both.
        let number = u64::try_from(value).map(Value::from).or_else(|_| i64::try_from(value).map(Value::from));
        number.map(Some).map_err(E::custom)
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Shape::Object(_) | Shape::Map(..) => "an object",
            Shape::List(_) => "a list",
            Shape::Words(_) => "a list of strings",
            Shape::Text(_) => "a string",
            Shape::Integer | Shape::Unsigned(_) => "an integer",
            Shape::Float => "a number",
            Shape::Bool => "true or false",
        })
    }

    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Self::Value, E> {
        match self.0 {
            Shape::Bool => Ok(Some(Value::from(value))),
            _ => Err(E::invalid_type(serde::de::Unexpected::Bool(value), &self)),
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Self::Value, E> {
        self.integer(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Self::Value, E> {
        self.integer(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Self::Value, E> {
        match self.0 {
            Shape::Float => Ok(Some(Value::from(value))),
            // `-0` is an integer for Go. serde_json gives it as a float, like numbers beyond 64 bits and fractions,
            // which Go refuses here as well.
            Shape::Integer if value == 0.0 => Ok(Some(Value::from(0))),
            _ => Err(E::invalid_type(serde::de::Unexpected::Float(value), &self)),
        }
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Self::Value, E> {
        match self.0 {
            Shape::Text(_) => Ok(Some(Value::from(value))),
            Shape::Words(_) => Ok(Some(Value::from(vec![value]))),
            _ => Err(E::invalid_type(serde::de::Unexpected::Str(value), &self)),
        }
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let element = match self.0 {
            Shape::List(element) => *element,
            Shape::Words(kind) => Shape::Text(kind),
            _ => return Err(A::Error::invalid_type(serde::de::Unexpected::Seq, &self)),
        };
        let mut elements = Vec::new();
        while let Some(value) = list.next_element_seed(Reader(element))? {
            // `null` is an element, with the value that a new one has.
            elements.push(value.unwrap_or_else(|| element.zero()));
        }
        Ok(Some(Value::Array(elements)))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        match self.0 {
            Shape::Object(groups) => read_object(groups, map),
            Shape::Map(_, values) => read_map(*values, map),
            _ => Err(A::Error::invalid_type(serde::de::Unexpected::Map, &self)),
        }
    }
}

fn read_object<'de, A: MapAccess<'de>>(
    groups: &'static [&'static [Field]],
    mut map: A,
) -> Result<Option<Value>, A::Error> {
    let mut seen = vec![false; groups.iter().map(|group| group.len()).sum()];
    let mut object = Map::new();
    while let Some(key) = map.next_key::<String>()? {
        let Some((number, (name, shape))) = Shape::field(groups, &key) else {
            // dockerd ignores it, and so would a later engine that knows it: it does not pass.
            map.next_value::<IgnoredAny>()?;
            continue;
        };
        // Go merges or replaces values of equal keys in ways that differ by type. No client means that.
        if std::mem::replace(&mut seen[number], true) {
            return Err(A::Error::custom(format_args!("the key {name:?} is there more than once")));
        }
        if let Some(value) = map.next_value_seed(Reader(*shape))? {
            object.insert((*name).to_owned(), value);
        }
    }
    Ok(Some(Value::Object(object)))
}

fn read_map<'de, A: MapAccess<'de>>(values: Shape, mut map: A) -> Result<Option<Value>, A::Error> {
    let mut object = Map::new();
    while let Some(key) = map.next_key::<String>()? {
        let value = map.next_value_seed(Reader(values))?.unwrap_or_else(|| values.zero());
        if object.contains_key(&key) {
            return Err(A::Error::custom(format_args!("the key {key:?} is there more than once")));
        }
        object.insert(key, value);
    }
    Ok(Some(Value::Object(object)))
}

#[cfg(test)]
#[path = "shape_tests.rs"]
mod tests;
