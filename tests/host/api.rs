//! The control API: its document, and the routes that need no VM.

use std::{
    fs,
    io::{Read, Write},
    path::Path,
    thread,
    time::Duration,
};

use serde_json::{Value, json};

use crate::{
    home::{Home, is_root},
    policy::under,
};

/// Sends a request and returns the status code and the JSON of the answer.
#[track_caller]
fn ask(home: &Home, method: &str, path: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let request =
        format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    let answer = home.ask(format!("{request}{body}").as_bytes());
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{answer}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    // A long answer comes in one chunk.
    let text = body.find('{').map_or("null", |start| &body[start..=body.rfind('}').unwrap()]);
    (code, serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {answer}")))
}

#[test]
fn the_document_is_printed_and_served_as_it_is_in_docs() {
    let home = Home::new();
    let shipped = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/control-api.json")).unwrap();
    let printed = home.bulkhead(&["api"]);
    assert!(printed.status.success() && printed.stdout == shipped, "`bulkhead api >docs/control-api.json` renews it");
    let _backend = home.backend();
    let (code, served) = ask(&home, "GET", "/openapi.json", "");
    assert_eq!((code, served), (200, serde_json::from_slice(&shipped).unwrap()));
}

#[test]
fn every_route_of_the_document_is_served_and_no_other_method() {
    let home = Home::new();
    let _backend = home.backend();
    let document: Value = serde_json::from_slice(&home.bulkhead(&["api"]).stdout).unwrap();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{key}", "cpus");
        // They change the state, or do not end; other tests have them.
        let apart = ["/v1/events", "/v1/start", "/v1/stop", "/v1/restart"].contains(&path.as_str());
        for method in methods.as_object().unwrap().keys().filter(|_| !apart) {
            let (code, answer) = ask(&home, &method.to_uppercase(), &path, "{}");
            // Without a VM an examination is refused, and `{}` lacks the value of a setting.
            let expected = if path == "/v1/examination" {
                409
            } else if method == "put" {
                400
            } else {
                200
            };
            assert_eq!(code, expected, "{method} {path}: {answer}");
        }
        assert_eq!(ask(&home, "PATCH", &path, "").0, 405, "{path}");
    }
}

#[test]
fn a_refused_request_is_answered_after_its_body_and_the_connection_goes_on() {
    let home = Home::new();
    let _backend = home.backend();
    let mut stream = home.control();
    for (request, connection) in
        [("PUT /v1/nothing", "keep-alive"), ("PATCH /v1/status", "keep-alive"), ("GET /v1/status", "close")]
    {
        let head = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: {connection}\r\nContent-Length: 2\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        // Time for an answer that does not wait for the body.
        thread::sleep(Duration::from_millis(200));
        stream.write_all(b"{}").unwrap();
    }
    let mut answers = String::new();
    stream.read_to_string(&mut answers).unwrap();
    let codes: Vec<_> = answers.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(codes, ["404", "405", "200"], "{answers}");
}

#[test]
fn a_setting_is_listed_set_and_unset_as_on_the_command_line() {
    let home = Home::new();
    let _backend = home.backend();
    let (code, list) = ask(&home, "GET", "/v1/settings", "");
    assert_eq!(code, 200);
    let keys: Vec<_> = list["settings"].as_array().unwrap().iter().map(|one| one["key"].clone()).collect();
    assert!(keys.len() > 10 && keys.contains(&json!("enhancedContainerIsolation")), "{keys:?}");
    let (code, setting) = ask(&home, "PUT", "/v1/settings/cpus", r#"{"value": 3}"#);
    assert_eq!((code, &setting["value"], &setting["origin"]), (200, &json!(3), &json!("user")));
    assert_eq!(setting["accepts"], json!({"type": "integer", "min": 1, "max": 32}));
    assert_eq!(home.bulkhead(&["settings", "get", "cpus"]).stdout, b"3\n");
    let (code, setting) = ask(&home, "DELETE", "/v1/settings/cpus", "");
    assert_eq!((code, &setting["value"], &setting["origin"]), (200, &Value::Null, &json!("default")));
    for (path, body, expected, words) in [
        ("/v1/settings/cpus", r#"{"value": 0}"#, 400, "must be a whole number from 1 to 32"),
        ("/v1/settings/cpus", r#"{"value": 1, "force": true}"#, 400, "unknown field `force`"),
        ("/v1/settings/cpus", "1", 400, "invalid body"),
        ("/v1/settings/nothing", r#"{"value": 1}"#, 404, "unknown setting `nothing`"),
    ] {
        let (code, problem) = ask(&home, "PUT", path, body);
        assert!(code == expected && problem["message"].as_str().unwrap().contains(words), "{code} {problem}");
    }
    assert_eq!(ask(&home, "PUT", "/v1/settings/cpus", &"x".repeat(100_000)).0, 413);
}

#[test]
fn a_password_is_not_in_the_list() {
    let home = Home::new();
    let _backend = home.backend();
    let change = json!({"value": "http://me:s3cret@proxy.example.org:3128"}).to_string();
    for (method, path) in [("PUT", "/v1/settings/overrideProxyHttp"), ("GET", "/v1/settings")] {
        let (code, answer) = ask(&home, method, path, &change);
        let text = answer.to_string();
        assert!(code == 200 && text.contains("http://***@proxy") && !text.contains("s3cret"), "{text}");
    }
}

#[test]
fn a_locked_setting_names_the_file_and_cannot_be_changed() {
    let home = Home::new();
    let locked = r#"{"enhancedContainerIsolation": {"value": true, "locked": true}}"#;
    let Some(mut command) = under(&home, locked) else { return };
    let _backend = Home::listening(command.arg("backend"));
    let path = "/v1/settings/enhancedContainerIsolation";
    let (_, setting) = ask(&home, "GET", path, "");
    assert_eq!(setting["lockedBy"], "/etc/bulkhead/admin-settings.json");
    assert_eq!(setting["origin"], "locked");
    for (method, body) in [("PUT", r#"{"value": false}"#), ("DELETE", "")] {
        let (code, problem) = ask(&home, method, path, body);
        let message = problem["message"].as_str().unwrap();
        assert!(code == 403 && message.contains("is locked by /etc/bulkhead/admin-settings.json"), "{code} {message}");
    }
    assert!(!home.path("config/bulkhead/default/settings.json").exists());
}

#[test]
fn the_logs_have_their_last_lines_without_control_characters() {
    let home = Home::new();
    let _backend = home.backend();
    fs::write(home.path("state/bulkhead/default/console.log"), "one\ntwo \u{1b}[31mred\u{1b}[0m\u{7}\nthree").unwrap();
    let (code, answer) = ask(&home, "GET", "/v1/logs?source=console&lines=2", "");
    assert_eq!((code, answer), (200, json!({"source": "console", "lines": ["two red", "three"]})));
    let (_, answer) = ask(&home, "GET", "/v1/logs?source=backend", "");
    assert!(answer["lines"].to_string().contains("the backend starts"), "{answer}");
    for query in ["source=/etc/passwd", "lines=0", "lines=9999", "file=x"] {
        assert_eq!(ask(&home, "GET", &format!("/v1/logs?{query}"), "").0, 400, "{query}");
    }
}

#[test]
fn a_policy_is_checked_without_being_in_force() {
    let home = Home::new();
    let _backend = home.backend();
    let check = |text: &str| ask(&home, "POST", "/v1/policy/validate", text).1;
    assert_eq!(
        check(r#"{"blockDockerLoad": {"locked": true, "value": true}, "analyticsEnabled": {}}"#),
        json!({"valid": true, "unknown": ["analyticsEnabled"]})
    );
    let wrong = check("{\n \"proxy\": }");
    assert!(wrong["valid"] == false && wrong["problem"].as_str().unwrap().contains("line 2"), "{wrong}");
    if !is_root() || !Path::new("/etc/bulkhead/admin-settings.json").exists() {
        assert_eq!(ask(&home, "GET", "/v1/settings/blockDockerLoad", "").1["origin"], "default");
    }
}

#[test]
fn the_usage_counts_the_disks_blocks_and_not_its_size() {
    let home = Home::new();
    let _backend = home.backend();
    assert_eq!(ask(&home, "GET", "/v1/usage", ""), (200, json!({})));
    let disk = fs::File::create(home.path("data/bulkhead/default/data.img")).unwrap();
    disk.set_len(1 << 33).unwrap();
    let (_, usage) = ask(&home, "GET", "/v1/usage", "");
    assert_eq!(usage["disk"]["sizeBytes"], 1_u64 << 33);
    assert!(usage["disk"]["allocatedBytes"].as_u64().unwrap() < 1 << 20, "{usage}");
}
