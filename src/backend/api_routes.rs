//! The routes of the control API: one table, from which the server dispatches and the OpenAPI document is made.

use hyper::Method;
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::api::{
    Answer, Examination, LogLines, PolicyCheck, Ports, PortsAnswer, SettingChange, SettingView, SettingsView,
    SharesOutcome, StartOptions, Status, StopOptions, Usage,
};

/// A thing that a client can ask for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// The OpenAPI document.
    Document,
    /// The status.
    Status,
    /// The status now and after each change.
    Events,
    /// The published ports.
    Ports,
    /// Publishing of the VM's ports of the settings.
    PublishVmPorts,
    /// The use of disk and memory.
    Usage,
    /// The end of a log.
    Logs,
    /// The state of the VM's CPUs and threads.
    Examination,
    /// All settings.
    Settings,
    /// One setting.
    Setting,
    /// A new value of a setting.
    SetSetting,
    /// A setting without a value of the user.
    UnsetSetting,
    /// A check of a policy.
    ValidatePolicy,
    /// Sharing of the directories of the settings.
    Share,
    /// A start.
    Start,
    /// A stop.
    Stop,
    /// A restart.
    Restart,
}

/// Makes the schema of a message, and names the types that it has in it.
pub(super) type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// The content of a message.
#[derive(Clone, Copy)]
pub(super) enum Content {
    /// JSON of a type.
    Json(SchemaOf),
    /// Lines of JSON of a type, until the backend exits.
    Lines(SchemaOf),
    /// A JSON document that is not one of this API's messages.
    Any,
}

/// A row of the table.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) route: Route,
    pub(super) method: &'static str,
    /// The path; `{key}` stands for the name of a setting.
    pub(super) path: &'static str,
    /// Its effect, in a line.
    pub(super) summary: &'static str,
    /// Parameters of the query, each with its meaning and its schema.
    pub(super) query: &'static [(&'static str, &'static str, SchemaOf)],
    pub(super) body: Option<Content>,
    pub(super) answer: Content,
}

impl Row {
    const fn new(
        route: Route,
        method: &'static str,
        path: &'static str,
        summary: &'static str,
        answer: Content,
    ) -> Self {
        Self { route, method, path, summary, query: &[], body: None, answer }
    }

    const fn with_body(self, body: Content) -> Self {
        Self { body: Some(body), ..self }
    }

    const fn with_query(self, query: &'static [(&'static str, &'static str, SchemaOf)]) -> Self {
        Self { query, ..self }
    }
}

const fn json<T: JsonSchema>() -> Content {
    Content::Json(SchemaGenerator::subschema_for::<T>)
}

/// Most lines of a log in an answer.
pub const MAX_LINES: usize = 2000;

/// Lines of a log in an answer, unless the request says otherwise.
pub const LINES: usize = 200;

const LOG_QUERY: &[(&str, &str, SchemaOf)] = &[
    ("source", "The log; the guest's console by default.", SchemaGenerator::subschema_for::<super::api::LogSource>),
    (
        "lines",
        "Most lines from its end, 1 to 2000; 200 by default.",
        |_| schemars::json_schema!({ "type": "integer", "minimum": 1, "maximum": MAX_LINES }),
    ),
];

/// All routes, in the order of the document.
pub(super) const ROUTES: &[Row] = &[
    Row::new(Route::Document, "GET", "/openapi.json", "This document.", Content::Any),
    Row::new(Route::Status, "GET", "/v1/status", "The state of the engine.", json::<Status>()),
    Row::new(
        Route::Events,
        "GET",
        "/v1/events",
        "The state of the engine now and after each change, a line each, until the backend exits. Each line is complete; \
         a slow reader gets the newest state and not each one before it.",
        Content::Lines(SchemaGenerator::subschema_for::<Status>),
    ),
    Row::new(
        Route::Ports,
        "GET",
        "/v1/ports",
        "The host's ports that lead to containers and to the VM.",
        json::<Ports>(),
    ),
    Row::new(
        Route::PublishVmPorts,
        "POST",
        "/v1/ports",
        "Publish the ports of the VM that the setting vmPorts names, and no other ones of it.",
        json::<PortsAnswer>(),
    ),
    Row::new(Route::Usage, "GET", "/v1/usage", "The use of disk and memory.", json::<Usage>()),
    Row::new(Route::Logs, "GET", "/v1/logs", "The last lines of a log.", json::<LogLines>()).with_query(LOG_QUERY),
    Row::new(
        Route::Settings,
        "GET",
        "/v1/settings",
        "All settings, with the file that locks each. A change takes effect at the next start or restart.",
        json::<SettingsView>(),
    ),
    Row::new(Route::Setting, "GET", "/v1/settings/{key}", "One setting.", json::<SettingView>()),
    Row::new(
        Route::SetSetting,
        "PUT",
        "/v1/settings/{key}",
        "Set a setting; 403 if the administrator's policy locks it.",
        json::<SettingView>(),
    )
    .with_body(json::<SettingChange>()),
    Row::new(
        Route::UnsetSetting,
        "DELETE",
        "/v1/settings/{key}",
        "Return a setting to its default; 403 if the administrator's policy locks it.",
        json::<SettingView>(),
    ),
    Row::new(
        Route::ValidatePolicy,
        "POST",
        "/v1/policy/validate",
        "Check the text of an admin-settings.json. Nothing is changed.",
        json::<PolicyCheck>(),
    )
    .with_body(Content::Any),
    Row::new(
        Route::Share,
        "POST",
        "/v1/shares",
        "Share the directories of the settings with the running engine.",
        json::<SharesOutcome>(),
    ),
    Row::new(
        Route::Start,
        "POST",
        "/v1/start",
        "Start the engine. The answer comes at once; the events show the progress.",
        json::<Answer>(),
    )
    .with_body(json::<StartOptions>()),
    Row::new(
        Route::Stop,
        "POST",
        "/v1/stop",
        "Stop the engine; the backend exits after it, which ends the events.",
        json::<Answer>(),
    )
    .with_body(json::<StopOptions>()),
    Row::new(
        Route::Restart,
        "POST",
        "/v1/restart",
        "Shut the VM down and boot a new one with the present settings, or boot one.",
        json::<Answer>(),
    )
    .with_body(json::<StopOptions>()),
    Row::new(
        Route::Examination,
        "GET",
        "/v1/examination",
        "The state of the VM's CPUs and threads, after some seconds; for the diagnosis of a hang. Its contents follow \
         the kernel and are not a stable part of the API.",
        json::<Examination>(),
    ),
];

/// The outcome of a look into the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    /// The route, with the text in the place of `{key}`, or an empty one.
    Route(Route, &'a str),
    /// The path has other methods, which are these.
    OtherMethod(String),
    /// No path like it.
    Nothing,
}

/// Finds the route of a request.
pub fn find<'a>(method: &Method, path: &'a str) -> Found<'a> {
    let mut others = Vec::new();
    for row in ROUTES {
        let Some(key) = fits(row.path, path) else { continue };
        if row.method == method.as_str() {
            return Found::Route(row.route, key);
        }
        others.push(row.method);
    }
    if others.is_empty() { Found::Nothing } else { Found::OtherMethod(others.join(", ")) }
}

/// Compares a path with one of the table; returns the text in the place of `{key}`.
fn fits<'a>(pattern: &str, path: &'a str) -> Option<&'a str> {
    match pattern.strip_suffix("{key}") {
        Some(start) => path.strip_prefix(start).filter(|key| {
            // Names of settings have nothing that a URL would have to escape.
            (1..=64).contains(&key.len()) && key.bytes().all(|byte| byte.is_ascii_alphanumeric())
        }),
        None => (pattern == path).then_some(""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_finds_its_route_the_methods_of_its_path_or_nothing() {
        assert_eq!(find(&Method::GET, "/v1/status"), Found::Route(Route::Status, ""));
        assert_eq!(find(&Method::PUT, "/v1/settings/cpus"), Found::Route(Route::SetSetting, "cpus"));
        assert_eq!(find(&Method::POST, "/v1/settings/cpus"), Found::OtherMethod("GET, PUT, DELETE".into()));
        for path in ["/", "/v1/settings/", "/v1/settings/a/b", "/v1/settings/..", "/v1/status/", "/v2/status"] {
            assert_eq!(find(&Method::GET, path), Found::Nothing, "{path}");
        }
    }

    #[test]
    fn no_two_routes_are_for_the_same_request() {
        for row in ROUTES {
            let path = row.path.replace("{key}", "x");
            assert!(
                matches!(find(&row.method.parse().unwrap(), &path), Found::Route(route, _) if route == row.route),
                "{path}"
            );
        }
    }
}
