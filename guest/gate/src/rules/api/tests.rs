//! The table as a whole: complete, without contradictions, and harmless to the requests of usual clients.

use serde_json::{Value, json};

use super::{super::segments, *};

/// The paths of `api/swagger.yaml` of Docker Engine 26.1.5, with the routes of its routers that are not described there.
const ENGINE: &str = include_str!("../../../tests/data/engine-26.1.5-routes.txt");

/// Requests that usual clients sent to a recorder, one JSON object a line: request line, body and names of headers.
const CLIENTS: [&str; 2] = [
    include_str!("../../../tests/data/docker-cli-28.2.2.jsonl"),
    include_str!("../../../tests/data/docker-py-7.1.0.jsonl"),
];

/// Routes of the engine that are refused on purpose.
const REFUSED: [&str; 18] = [
    "DELETE /containers/{name}/checkpoints/{checkpoint}",
    "DELETE /plugins/{name}",
    "GET /containers/{name}/checkpoints",
    "GET /debug/pprof",
    "GET /debug/pprof/cmdline",
    "GET /debug/pprof/profile",
    "GET /debug/pprof/symbol",
    "GET /debug/pprof/trace",
    "GET /debug/vars",
    "GET /plugins/privileges",
    "POST /containers/{name}/checkpoints",
    "POST /plugins/create",
    "POST /plugins/pull",
    "POST /plugins/{name}/disable",
    "POST /plugins/{name}/enable",
    "POST /plugins/{name}/push",
    "POST /plugins/{name}/set",
    "POST /plugins/{name}/upgrade",
];

fn found(request: &str) -> Option<String> {
    let (method, path) = request.split_once(' ').unwrap();
    find(method, &segments(path)).map(|found| format!("{:?} {}", found.route, found.name.join("/")))
}

#[test]
fn every_route_of_the_engine_is_known_or_refused_on_purpose() {
    let mut known = 0;
    for line in ENGINE.lines().filter(|line| !line.starts_with('#')) {
        let (method, path) = line.split_once(' ').unwrap();
        // A name as it could be in the place of a parameter.
        let concrete: Vec<&str> =
            path.split('/').map(|part| if part.starts_with('{') { "some" } else { part }).collect();
        let segments = segments(&concrete.join("/"));
        let row = find(method, &segments);
        let row = row.filter(|_| !is_checkpoint(method, &segments));
        assert_eq!(row.is_none(), REFUSED.contains(&line), "{line}: {row:?}");
        known += usize::from(row.is_some());
    }
    assert_eq!(known, routes().count(), "the table has a route that the engine does not have");
}

#[test]
fn rows_are_below_the_word_of_their_family_and_stand_once() {
    let mut seen = Vec::new();
    for family in routes::FAMILIES {
        for route in family.routes {
            assert_eq!(route.path.0.split('/').next(), Some(family.first), "{route:?}");
            let key = (route.method, route.path.with_name("x"));
            assert!(!seen.contains(&key), "{route:?} is there twice");
            seen.push(key);
            let mut names: Vec<_> = route.parameters.iter().map(|parameter| parameter.name).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), route.parameters.len(), "{route:?} has a parameter twice");
        }
    }
}

#[test]
fn a_request_is_found_with_its_name_in_any_spelling() {
    for (request, expected) in [
        ("GET /v1.45/containers/json", "GET /containers/json "),
        ("GET /containers/x/json", "GET /containers/{name}/json x"),
        ("GET /containers/parent/alias/archive", "GET /containers/{name}/archive parent/alias"),
        ("DELETE /containers/parent/alias", "DELETE /containers/{name} parent/alias"),
        ("POST //containers///%63reate/", "POST /containers/create "),
        ("POST /containers/./x/../create", "POST /containers/create "),
        ("GET /images/reg.io%2Fa/json", "GET /images/{name}/json reg.io/a"),
        ("DELETE /images/a/b", "DELETE /images/{name} a/b"),
        ("GET /networks/n", "GET /networks/{name} n"),
        ("POST /v1.24/networks/create", "POST /networks/create "),
        ("GET /services/x", "GET /services/{id} x"),
    ] {
        assert_eq!(found(request).as_deref(), Some(expected), "{request}");
    }
    for request in [
        "GET /",
        "GET /containers",
        "HEAD /containers/json",
        "post /containers/create",
        "GET /containers/create",
        "POST /containers/x/copy",
        "GET /services/x/y",
        "POST /v1.45/v1.45/containers/create",
        "GET /_hijack",
        "OPTIONS /info",
        "GET /debug/pprof/heap",
        "GET /future",
    ] {
        assert_eq!(found(request), None, "{request}");
    }
}

#[test]
fn checkpoints_are_recognised_with_names_of_any_depth() {
    for request in [
        "GET /containers/x/checkpoints",
        "POST /v1.45/containers/a/b/checkpoints/",
        "DELETE /containers/x/checkpoints/y",
        "delete /containers/a/b/%63heckpoints/y",
    ] {
        let (method, path) = request.split_once(' ').unwrap();
        assert!(is_checkpoint(method, &segments(path)), "{request}");
    }
    for request in ["GET /containers/checkpoints/json", "GET /images/x/checkpoints", "DELETE /containers/checkpoints"] {
        let (method, path) = request.split_once(' ').unwrap();
        assert!(!is_checkpoint(method, &segments(path)), "{request}");
    }
}

#[test]
fn only_routes_on_which_the_engine_switches_hijack() {
    let hijacking: Vec<String> = routes().filter(|route| route.hijacks).map(|route| format!("{route:?}")).collect();
    let expected = [
        "GET /containers/{name}/attach/ws",
        "POST /containers/{name}/attach",
        "POST /exec/{name}/start",
        "POST /session",
        "POST /grpc",
    ];
    assert_eq!(hijacking, expected);
}

#[test]
fn dockerd_opens_files_of_a_container_for_these_requests() {
    let opening: Vec<String> =
        routes().filter(|route| route.opens_files != OpensFiles::No).map(|route| format!("{route:?}")).collect();
    let expected = [
        "HEAD /containers/{name}/archive",
        "GET /containers/{name}/export",
        "GET /containers/{name}/archive",
        "POST /containers/{name}/restart",
        "POST /containers/{name}/start",
        "PUT /containers/{name}/archive",
        "POST /commit",
    ];
    assert_eq!(opening, expected);
}

#[test]
fn every_place_for_a_source_is_translated() {
    // A text of these kinds can be a path of the host.
    let is_source = |kind| matches!(kind, Text::Bind | Text::MountSource | Text::VolumeOption);
    for location in locations().filter(|location| is_source(location.kind)) {
        assert_ne!(location.route.names_sources, SourcePlaces::None, "{location:?}");
    }
    let showing: Vec<String> = routes()
        .filter(|route| route.shows_sources == Places::Descriptions)
        .map(|route| format!("{route:?}"))
        .collect();
    let expected = [
        "GET /containers/json",
        "GET /containers/{name}/json",
        "GET /volumes",
        "GET /volumes/{name}",
        "POST /volumes/create",
        "GET /system/df",
        "GET /services",
        "GET /services/{id}",
        "GET /tasks",
        "GET /tasks/{id}",
    ];
    assert_eq!(showing, expected);
}

/// Removes members that Go would not notice.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(object) => {
            object.retain(|_, value| !value.is_null());
            object.values_mut().for_each(without_nulls);
        }
        Value::Array(elements) => elements.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// Removes the keys that a client has for later engines only.
fn without(value: &mut Value, keys: &[&str]) {
    match value {
        Value::Object(object) => {
            object.retain(|key, _| !keys.contains(&key.as_str()));
            object.values_mut().for_each(|value| without(value, keys));
        }
        Value::Array(elements) => elements.iter_mut().for_each(|value| without(value, keys)),
        _ => {}
    }
}

#[test]
fn requests_of_usual_clients_keep_their_meaning() {
    // Parameters and keys that Docker Engine 26.1 does not read.
    const LATER: [&str; 2] = ["GwPriority", "only_ids"];
    for line in CLIENTS.iter().flat_map(|text| text.lines()) {
        let recorded: Value = serde_json::from_str(line).unwrap();
        let request = recorded["request"].as_str().unwrap();
        let (method, target) = request.split_once(' ').unwrap();
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let segments = segments(path);
        let route = find(method, &segments).unwrap_or_else(|| panic!("{request}")).route;
        let kept = Query::read(route.parameters, query).unwrap().text();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let name = pair.split('=').next().unwrap();
            let there = kept.split('&').any(|pair| pair.split('=').next() == Some(name));
            assert_eq!(there, !LATER.contains(&name), "{request}: {name}");
        }
        if recorded["body"].is_null() {
            continue;
        }
        let Body::Json(shape) = route.body else { panic!("{request} has a body") };
        let mut expected = recorded["body"].clone();
        without_nulls(&mut expected);
        without(&mut expected, &LATER);
        if request.ends_with("/exec") {
            // docker-py repeats the path here; the engine does not read it.
            without(&mut expected, &["Container"]);
        }
        assert_eq!(read(shape, recorded["body"].to_string().as_bytes()).unwrap(), expected, "{request}");
    }
}

#[test]
fn headers_of_usual_clients_are_kept_or_describe_the_connection_only() {
    for line in CLIENTS.iter().flat_map(|text| text.lines()) {
        let recorded: Value = serde_json::from_str(line).unwrap();
        let (method, target) = recorded["request"].as_str().unwrap().split_once(' ').unwrap();
        let segments = segments(target.split('?').next().unwrap());
        let route = find(method, &segments).unwrap().route;
        let mut headers = hyper::HeaderMap::new();
        for name in recorded["headers"].as_array().unwrap() {
            let name: hyper::header::HeaderName = name.as_str().unwrap().parse().unwrap();
            headers.insert(name, hyper::header::HeaderValue::from_static("x"));
        }
        let kept = crate::rules::headers::kept(&headers, route);
        for name in headers.keys().filter(|name| !kept.contains_key(*name)) {
            // The gate sets the length itself, unless the body streams.
            let framing = ["content-length", "content-type", "transfer-encoding"].contains(&name.as_str());
            let dropped = framing && !matches!(route.body, Body::Stream) || name == "connection" && !route.hijacks;
            assert!(dropped, "{line}: {name}");
        }
    }
}

#[test]
fn every_string_has_a_place_and_the_walk_finds_them_all() {
    let all: Vec<Location> = locations().collect();
    let binds = |location: &&Location| location.kind == Text::Bind;
    assert_eq!(
        all.iter().find(binds).map(|location| &location.place),
        Some(&Place::Body(vec![Step::Field("HostConfig"), Step::Field("Binds"), Step::Element]))
    );
    assert!(all.len() > 400, "{}", all.len());
}

#[test]
fn a_create_with_all_that_the_engine_reads_keeps_it() {
    let body = json!({"Image": "a", "HostConfig": {"Binds": ["v:/x"], "Memory": 9_223_372_036_854_775_807_i64,
        "MemorySwappiness": -1, "IOMaximumIOps": u64::MAX, "BlkioWeight": 65535, "Mounts": [{"Type": "tmpfs",
        "Target": "/t", "TmpfsOptions": {"SizeBytes": 1, "Mode": 448}}]}, "Cmd": ["a"]});
    let Body::Json(shape) = find("POST", &segments("/containers/create")).unwrap().route.body else { unreachable!() };
    assert_eq!(read(shape, body.to_string().as_bytes()).unwrap(), body);
}
