//! The OpenAPI 3.1 document of the control API, made from the table of routes and the types of the messages.
//!
//! The schemas of OpenAPI 3.1 are those of JSON Schema 2020-12, which schemars makes; only their place is another.

use schemars::generate::{Contract, SchemaGenerator, SchemaSettings};
use serde_json::{Map, Value, json};

use super::{
    api::Problem,
    api_routes::{Content, ROUTES, Row},
};

/// Version of the API. The second number grows with each addition; another first number would be another API, with
/// `/v2` in its paths.
const VERSION: &str = "1.2";

const DESCRIPTION: &str = "HTTP/1.1 on the unix socket `control.sock` in the runtime directory of a profile, for \
                           processes of the same user. Every answer but 200 has a `Problem`. Clients must ignore keys \
                           that they do not know.";

/// Returns the document as text, with a newline at its end.
pub fn document() -> String {
    format!("{:#}\n", assemble())
}

fn assemble() -> Value {
    let generator = |contract: Contract| {
        SchemaSettings::draft2020_12()
            .with(|settings| {
                settings.definitions_path = "/components/schemas".into();
                settings.meta_schema = None;
                settings.contract = contract;
            })
            .into_generator()
    };
    // A key with a default may be left out of a request, but is in every answer.
    let mut schemas = Schemas { asked: generator(Contract::Deserialize), answered: generator(Contract::Serialize) };
    let problem = media(Content::Json(SchemaGenerator::subschema_for::<Problem>), &mut schemas.answered);
    let mut paths = Map::new();
    for row in ROUTES {
        let path = paths.entry(row.path).or_insert_with(|| json!({}));
        path[row.method.to_lowercase()] = operation(row, &mut schemas, &problem);
    }
    let mut components = schemas.asked.take_definitions(true);
    components.extend(schemas.answered.take_definitions(true));
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Control API of Bulkhead",
            "version": VERSION,
            "description": DESCRIPTION,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "paths": paths,
        "components": { "schemas": components },
    })
}

/// The generators of schemas, for each direction.
struct Schemas {
    asked: SchemaGenerator,
    answered: SchemaGenerator,
}

fn operation(row: &Row, schemas: &mut Schemas, problem: &Value) -> Value {
    let mut parameters: Vec<_> = row
        .query
        .iter()
        .map(|(name, meaning, schema)| {
            json!({ "name": name, "in": "query", "description": meaning, "schema": schema(&mut schemas.asked) })
        })
        .collect();
    if row.path.ends_with("{key}") {
        parameters.push(json!({
            "name": "key", "in": "path", "required": true, "description": "Name of the setting.",
            "schema": { "type": "string" },
        }));
    }
    let mut operation = json!({
        "operationId": format!("{:?}", row.route),
        "summary": row.summary,
        "responses": {
            "200": { "description": "Success.", "content": media(row.answer, &mut schemas.answered) },
            "default": { "description": "The request was refused.", "content": problem },
        },
    });
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(body) = row.body {
        operation["requestBody"] = json!({ "content": media(body, &mut schemas.asked) });
    }
    operation
}

fn media(content: Content, generator: &mut SchemaGenerator) -> Value {
    let (kind, schema) = match content {
        Content::Json(schema) => ("application/json", schema(generator).to_value()),
        Content::Lines(schema) => ("application/x-ndjson", schema(generator).to_value()),
        Content::Any => ("application/json", json!({})),
    };
    json!({ kind: { "schema": schema } })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_of_the_document_leads_to_a_schema_in_it() {
        let document = assemble();
        let text = document.to_string();
        let references: Vec<_> = text.split("\"$ref\":\"#").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        assert!(references.len() > 10, "{references:?}");
        for reference in references {
            assert!(document.pointer(reference).is_some(), "{reference}");
        }
    }

    #[test]
    fn a_request_may_leave_out_what_an_answer_always_has() {
        let document = assemble();
        let required = |name: &str| document["components"]["schemas"][name]["required"].clone();
        assert_eq!(required("StartOptions"), Value::Null);
        assert_eq!(required("Answer"), json!(["outcome", "boot"]));
        assert!(required("Status").as_array().unwrap().contains(&json!("ending")));
    }

    #[test]
    fn stages_and_transports_have_the_names_of_the_messages() {
        let schemas = &assemble()["components"]["schemas"];
        assert_eq!(schemas["StageTime"]["properties"]["stage"]["enum"], json!(["kernel", "agent", "disk", "engine"]));
        assert_eq!(schemas["PublishedPort"]["properties"]["protocol"]["enum"], json!(["tcp", "udp"]));
    }
}
