//! The reader of bodies.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::rules::api::{Body, routes};

static OUTER: Shape = Shape::Object(&[INNER_FIELDS, &[("Inner", Shape::Object(&[INNER_FIELDS]))]]);
const INNER_FIELDS: &[Field] = &[
    ("Kind", Shape::Text(Text::Free)),
    ("Words", Shape::Words(Text::Free)),
    ("List", Shape::List(&Shape::Text(Text::Free))),
    ("Map", Shape::Map(Text::Free, &Shape::Text(Text::Free))),
    ("Set", Shape::Map(Text::Free, &Shape::Object(&[]))),
    ("Integer", Shape::Integer),
    ("Small", Shape::Unsigned(0xffff)),
    ("Float", Shape::Float),
    ("Flag", Shape::Bool),
];

fn of(body: &str) -> Result<Value, Refusal> {
    read(&OUTER, body.as_bytes())
}

#[test]
fn keys_in_any_case_get_their_one_spelling() {
    for body in [r#"{"kind":"x"}"#, r#"{"KIND":"x"}"#, r#"{"\u212aind":"x"}"#, r#"{"k\u0069nd":"x"}"#] {
        assert_eq!(of(body), Ok(json!({"Kind": "x"})), "{body}");
    }
    assert_eq!(of(r#"{"inner":{"word\u017f":["a"]}}"#), Ok(json!({"Inner": {"Words": ["a"]}})));
    // Keys of a map are the user's.
    assert_eq!(of(r#"{"Map":{"a":"1","A":"2"}}"#), Ok(json!({"Map": {"a": "1", "A": "2"}})));
}

#[test]
fn unknown_keys_are_dropped_with_all_that_is_below() {
    let deep = format!(r#"{{"Unknown":{}{},"Kind":"x"}}"#, "[".repeat(100), "]".repeat(100));
    assert_eq!(of(&deep), Ok(json!({"Kind": "x"})));
    assert_eq!(of(r#"{"Unknown":{"Kind":"y","x":1.50,"x":1},"Inner":{"Other":null}}"#), Ok(json!({"Inner": {}})));
}

#[test]
fn a_key_that_is_there_twice_is_refused_in_any_case() {
    for body in [
        r#"{"Kind":"x","Kind":"x"}"#,
        r#"{"Kind":null,"kind":"x"}"#,
        r#"{"Inner":{},"INNER":{}}"#,
        r#"{"Map":{"a":"1","a":"1"}}"#,
    ] {
        assert!(matches!(of(body), Err(Refusal::Malformed(_))), "{body}");
    }
}

#[test]
fn null_is_absent_in_an_object_and_an_empty_value_elsewhere() {
    assert_eq!(of("null"), Ok(json!({})));
    assert_eq!(of(r#"{"Kind":null,"List":null,"Inner":null}"#), Ok(json!({})));
    let body = r#"{"List":["a",null],"Map":{"a":null},"Set":{"a":null}}"#;
    assert_eq!(of(body), Ok(json!({"List": ["a", ""], "Map": {"a": ""}, "Set": {"a": {}}})));
}

#[test]
fn a_single_word_is_a_list_of_one() {
    assert_eq!(of(r#"{"Words":"sh -c"}"#), Ok(json!({"Words": ["sh -c"]})));
    assert_eq!(of(r#"{"Words":["sh","-c"]}"#), Ok(json!({"Words": ["sh", "-c"]})));
}

#[test]
fn numbers_are_exact_and_in_the_range_of_their_type() {
    for number in ["9223372036854775807", "-9223372036854775808", "0", "-1"] {
        assert_eq!(
            of(&format!(r#"{{"Integer":{number}}}"#)).unwrap().to_string(),
            format!(r#"{{"Integer":{number}}}"#)
        );
    }
    assert_eq!(of(r#"{"Integer":-0}"#), Ok(json!({"Integer": 0})));
    for number in ["0.5", "-6.527086918734216e+139"] {
        assert_eq!(of(&format!(r#"{{"Float":{number}}}"#)).unwrap().to_string(), format!(r#"{{"Float":{number}}}"#));
    }
    for member in [
        r#""Integer":9223372036854775808"#,
        r#""Integer":12345678901234567890123"#,
        r#""Integer":1.5"#,
        r#""Integer":1e3"#,
        r#""Small":65536"#,
        r#""Small":-1"#,
        r#""Float":1e999"#,
    ] {
        assert!(of(&format!("{{{member}}}")).is_err(), "{member}");
    }
}

#[test]
fn wrong_types_are_refused_with_a_word_about_what_belongs_there() {
    for (body, expected) in [
        (r#"{"Kind":1}"#, "a string"),
        (r#"{"Kind":["x"]}"#, "a string"),
        (r#"{"Kind":{}}"#, "a string"),
        (r#"{"List":"x"}"#, "a list"),
        (r#"{"Words":1}"#, "a list of strings"),
        (r#"{"Words":[["x"]]}"#, "a string"),
        (r#"{"Map":[]}"#, "an object"),
        (r#"{"Inner":"x"}"#, "an object"),
        (r#"{"Integer":"1"}"#, "an integer"),
        (r#"{"Flag":"true"}"#, "true or false"),
        ("[]", "an object"),
    ] {
        let Err(Refusal::Malformed(reason)) = of(body) else { panic!("{body}") };
        assert!(reason.contains(expected), "{body}: {reason}");
    }
}

#[test]
fn json_that_two_readers_could_understand_differently_is_refused() {
    for body in ["", "[", "{} {}", "{\"Kind\":}", "\u{feff}{}", "{\"\\ud800\":1}", "{\"Kind\":\"\\ud800\"}", "{'a':1}"]
    {
        assert!(matches!(of(body), Err(Refusal::Malformed(_))), "{body}");
    }
    for body in [&b"{\"Kind\":\"\xff\"}"[..], b"{\"Unknown\":\"\xff\"}", b"{\"\xff\":1}"] {
        assert!(read(&OUTER, body).is_err(), "{:?}", String::from_utf8_lossy(body));
    }
}

#[test]
fn depth_does_not_end_the_gate() {
    for (open, close) in [("[", "]"), ("{\"Inner\":", "}"), ("{\"x\":", "}")] {
        for prefix in ["", "{\"Unknown\":", "{\"List\":"] {
            let _ = of(&format!("{prefix}{}1{}", open.repeat(200_000), close.repeat(200_000)));
        }
    }
}

/// Any JSON, with a preference for the keys of the shape.
fn any_json() -> impl Strategy<Value = Value> {
    let names = prop_oneof![
        Just("Kind".to_owned()),
        Just("kInd".to_owned()),
        Just("Words".to_owned()),
        Just("List".to_owned()),
        Just("Map".to_owned()),
        Just("Set".to_owned()),
        Just("Inner".to_owned()),
        Just("Integer".to_owned()),
        Just("Float".to_owned()),
        ".{0,4}"
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 48, 5, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((names.clone(), inner), 0..5)
                .prop_map(|members| Value::Object(members.into_iter().collect()))
        ]
    })
}

/// Returns true if a value has nothing but what the shape names.
fn fits(shape: Shape, value: &Value) -> bool {
    match (shape, value) {
        (Shape::Object(groups), Value::Object(object)) => object.iter().all(|(key, value)| {
            let field = groups.iter().flat_map(|group| group.iter()).find(|(name, _)| name == key);
            field.is_some_and(|(_, shape)| fits(*shape, value))
        }),
        (Shape::Map(_, values), Value::Object(object)) => object.values().all(|value| fits(*values, value)),
        (Shape::List(element), Value::Array(elements)) => elements.iter().all(|value| fits(*element, value)),
        (Shape::Words(_), Value::Array(elements)) => elements.iter().all(Value::is_string),
        (Shape::Text(_), value) => value.is_string(),
        (Shape::Bool, value) => value.is_boolean(),
        (Shape::Integer | Shape::Unsigned(_) | Shape::Float, value) => value.is_number(),
        _ => false,
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(body in proptest::collection::vec(any::<u8>(), 0..256)) {
        for route in routes() {
            if let Body::Json(shape) = route.body {
                let _ = read(shape, &body);
            }
        }
    }

    #[test]
    fn what_passes_reads_to_the_same_again_and_has_known_keys_only(value in any_json()) {
        if let Ok(once) = of(&value.to_string()) {
            prop_assert!(fits(OUTER, &once), "{}", once);
            prop_assert_eq!(of(&once.to_string()), Ok(once));
        }
    }

    #[test]
    fn a_known_key_in_any_case_is_never_lost(mask in any::<u16>(), text in ".{0,8}") {
        let key: String = "Kind".chars().enumerate()
            .map(|(at, c)| if mask >> at & 1 == 1 { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() })
            .collect();
        let body = json!({key: text.clone()}).to_string();
        prop_assert_eq!(of(&body), Ok(json!({"Kind": text})));
    }
}
