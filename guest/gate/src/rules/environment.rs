//! The environment of new containers: the variables for proxies, where a container does not set them itself.

use serde_json::{Value, value::RawValue};

use super::{
    go_json::{Object, array, is_field, parse, string, write},
    refusal::Refusal,
};

/// Returns the name in `NAME=VALUE`, or in `NAME`, which removes a variable of the image.
fn name(variable: &str) -> &str {
    variable.split('=').next().unwrap_or_default()
}

/// Returns the elements of `Env`, followed by those of `environment` whose names, in any case, it does not have.
fn extended(env: Option<&RawValue>, environment: &[String]) -> Result<String, Refusal> {
    let there = env.map(array).transpose()?.unwrap_or_default();
    let mut variables = Vec::with_capacity(there.len());
    for variable in &there {
        variables.extend(string(variable)?);
    }
    let names: Vec<&str> = variables.iter().map(|variable| name(variable)).collect();
    let added = missing(&names, environment).map(|variable| Value::from(variable.as_str()).to_string());
    let elements: Vec<String> = there.iter().map(|variable| variable.get().to_owned()).chain(added).collect();
    Ok(format!("[{}]", elements.join(",")))
}

/// Returns the elements of `environment` whose names, in any case, are not among these.
fn missing<'a>(names: &[&str], environment: &'a [String]) -> impl Iterator<Item = &'a String> {
    // In any case, because programs read `http_proxy` and `HTTP_PROXY` alike: a user who sets one must not get the
    // administrator's other one beside it.
    environment.iter().filter(|variable| !names.iter().any(|known| known.eq_ignore_ascii_case(name(variable))))
}

/// Adds to `Env` of a body that was read by its shape.
pub(crate) fn extend(body: &mut Value, environment: &[String]) {
    let Some(body) = body.as_object_mut().filter(|_| !environment.is_empty()) else { return };
    let entry = body.entry("Env").or_insert_with(|| Value::Array(Vec::new()));
    let Some(there) = entry.as_array_mut() else { return };
    let names: Vec<&str> = there.iter().filter_map(Value::as_str).map(name).collect();
    let added: Vec<Value> = missing(&names, environment).map(|variable| Value::from(variable.as_str())).collect();
    there.extend(added);
}

/// Adds to `Env` of a `POST /containers/create` without isolation; the rest of the body stays byte for byte.
pub(crate) fn add(body: &[u8], environment: &[String]) -> Result<String, Refusal> {
    let text = std::str::from_utf8(body).map_err(|error| Refusal::Malformed(error.to_string()))?;
    let config: Object<'_> = parse(text)?;
    let mut members: Vec<(&str, String)> = Vec::with_capacity(config.0.len() + 1);
    let mut found = false;
    for (key, value) in &config.0 {
        let mut kept = value.get().to_owned();
        if is_field(key, "Env") {
            found = true;
            // dockerd refuses any other type.
            if kept.starts_with('[') || kept == "null" {
                kept = extended(Some(value), environment)?;
            }
        }
        members.push((key, kept));
    }
    if !found {
        members.push(("Env", extended(None, environment)?));
    }
    Ok(write(members.iter().map(|(key, value)| (*key, value.as_str()))))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn added(body: &str) -> Value {
        let environment = ["HTTP_PROXY=http://p:1", "http_proxy=http://p:1", "NO_PROXY=a,b"].map(ToOwned::to_owned);
        serde_json::from_str(&add(body.as_bytes(), &environment).unwrap()).unwrap()
    }

    #[test]
    fn a_container_that_says_nothing_has_it() {
        let all = json!(["HTTP_PROXY=http://p:1", "http_proxy=http://p:1", "NO_PROXY=a,b"]);
        for body in [r"{}", r#"{"Env":[]}"#, r#"{"Env":null}"#] {
            assert_eq!(added(body)["Env"], all, "{body}");
        }
    }

    #[test]
    fn what_a_container_sets_or_takes_away_in_any_case_is_left_alone() {
        assert_eq!(added(r#"{"env":["http_proxy=own"]}"#)["env"], json!(["http_proxy=own", "NO_PROXY=a,b"]));
        assert_eq!(added(r#"{"Env":["HTTP_PROXY","X=1"]}"#)["Env"], json!(["HTTP_PROXY", "X=1", "NO_PROXY=a,b"]));
        assert_eq!(added(r#"{"Env":{"a":1}}"#)["Env"], json!({"a": 1}));
    }

    #[test]
    fn both_ways_to_add_come_to_the_same() {
        let environment = ["HTTP_PROXY=http://p:1", "NO_PROXY=a,b"].map(ToOwned::to_owned);
        for body in [json!({}), json!({"Env": []}), json!({"Env": ["http_proxy=own", "X"]})] {
            let mut extended = body.clone();
            extend(&mut extended, &environment);
            let added: Value = serde_json::from_str(&add(body.to_string().as_bytes(), &environment).unwrap()).unwrap();
            assert_eq!(extended, added, "{body}");
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_it_panic_and_nothing_else_changes(body in "[{}\\[\\]\",:a-z0-9EnvV= ]{0,60}") {
            if let Ok(text) = add(body.as_bytes(), &["A=1".to_owned()]) {
                let (before, after): (Value, Value) = (serde_json::from_str(&body).unwrap(), serde_json::from_str(&text).unwrap());
                for (key, value) in before.as_object().unwrap() {
                    if !is_field(key, "Env") {
                        prop_assert_eq!(value, &after[key]);
                    }
                }
            }
        }
    }
}
