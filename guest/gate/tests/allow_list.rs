//! Requests that the gate knows, and others, by what reaches the engine: real sockets, and an engine that remembers.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use bulkhead_gate::{Caller, Gate, Isolation, UnixAcceptor, serve_connection};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(10);

/// A request as the engine received it.
#[derive(Clone, Debug, Default)]
struct Seen {
    line: String,
    headers: BTreeMap<String, String>,
    body: String,
}

/// A gate, and an engine behind it that has some descriptions.
struct Fixture {
    directory: TempDir,
    seen: Arc<Mutex<Vec<Seen>>>,
}

/// Reads a request or a response with a `Content-Length`. `None` at the end of the stream.
async fn read_message(stream: &mut UnixStream) -> Option<Seen> {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if timeout(SOON, stream.read_buf(&mut bytes)).await.expect("nothing comes").unwrap() == 0 {
            return None;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let mut lines = head.lines();
    let line = lines.next().unwrap().to_owned();
    let pairs = lines.filter_map(|line| line.split_once(": "));
    let headers: BTreeMap<_, _> = pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned())).collect();
    let length: usize = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    while bytes.len() < end + length {
        assert!(timeout(SOON, stream.read_buf(&mut bytes)).await.expect("nothing comes").unwrap() > 0, "ended early");
    }
    Some(Seen { line, headers, body: String::from_utf8(bytes[end..].to_vec()).unwrap() })
}

impl Fixture {
    fn new(isolation: Isolation, descriptions: Value) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let engine = UnixListener::bind(directory.path().join("engine")).unwrap();
        let (known, log) = (Arc::new(descriptions), Arc::clone(&seen));
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = engine.accept().await.unwrap();
                let (known, log) = (Arc::clone(&known), Arc::clone(&log));
                tokio::spawn(async move {
                    while let Some(request) = read_message(&mut stream).await {
                        let description = &known[&request.line.trim_end_matches(" HTTP/1.1")];
                        log.lock().unwrap().push(request);
                        let status = if description["status"].is_u64() { "404 Not Found" } else { "200 OK" };
                        let body = description.to_string();
                        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
                        stream.write_all(answer.as_bytes()).await.unwrap();
                    }
                });
            }
        });
        let gate = Arc::new(Gate::new(directory.path().join("engine"), isolation));
        let acceptor = UnixAcceptor::bind(&directory.path().join("gate")).unwrap();
        tokio::spawn(async move {
            loop {
                tokio::spawn(serve_connection(Arc::clone(&gate), acceptor.accept().await, Caller::Host));
            }
        });
        Self { directory, seen }
    }

    /// Sends a request and returns the status and the message or body.
    async fn send(&self, line: &str, headers: &str, body: &str) -> (String, String) {
        let mut client = UnixStream::connect(self.directory.path().join("gate")).await.unwrap();
        let request = format!("{line} HTTP/1.1\r\nHost: d\r\n{headers}Content-Length: {}\r\n\r\n{body}", body.len());
        client.write_all(request.as_bytes()).await.unwrap();
        let answer = read_message(&mut client).await.unwrap();
        let message: Value = serde_json::from_str(&answer.body).unwrap_or_default();
        let text = message["message"].as_str().map_or(answer.body.clone(), ToOwned::to_owned);
        (answer.line.split(' ').nth(1).unwrap().to_owned(), text)
    }

    async fn get(&self, line: &str) -> (String, String) {
        self.send(line, "", "").await
    }

    /// Returns the request lines that the engine has received since the last call.
    fn lines(&self) -> Vec<String> {
        let seen = std::mem::take(&mut *self.seen.lock().unwrap());
        seen.iter().map(|seen| seen.line.trim_end_matches(" HTTP/1.1").to_owned()).collect()
    }

    fn last(&self) -> Seen {
        self.seen.lock().unwrap().last().cloned().unwrap()
    }
}

fn id() -> String {
    "ab".repeat(32)
}

#[tokio::test]
async fn a_request_that_is_not_in_the_table_is_refused_with_its_name() {
    let fixture = Fixture::new(Isolation::On, json!({}));
    for line in ["POST /v1.45/plugins/pull?remote=x", "GET /debug/pprof/", "PATCH /containers/x", "GET /future"] {
        let (status, message) = fixture.get(line).await;
        let path = line.split([' ', '?']).nth(1).unwrap().trim_end_matches('/');
        let expected = format!("the gate does not know {} {path}; ", line.split(' ').next().unwrap());
        assert!(status == "403" && message.starts_with(&expected), "{line}: {status} {message}");
    }
    assert_eq!(fixture.lines(), [""; 0]);
}

#[tokio::test]
async fn every_client_is_passed_on_in_one_spelling_with_known_parameters() {
    let fixture = Fixture::new(Isolation::On, json!({}));
    for (line, expected) in [
        ("GET //v1.45/./containers///%6Ason?all=1&unknown=2&all=0", "GET /v1.45/containers/json?all=1"),
        ("GET http://x/info", "GET /info"),
        ("GET /images/get?names=a%2Fb&names=c", "GET /images/get?names=a/b&names=c"),
        ("POST /containers/x/kill?signal=SIG+HUP", "POST /containers/x/kill?signal=SIG%20HUP"),
        ("DELETE /containers/parent/alias?link=1", "DELETE /containers/parent/alias?link=1"),
    ] {
        assert_eq!(fixture.get(line).await.0, "200", "{line}");
        assert_eq!(fixture.lines(), [expected]);
    }
    let (status, message) = fixture.get("GET /containers/json?all=1;b=2").await;
    assert!(status == "400" && message.contains("all=1;b=2"), "{message}");
}

#[tokio::test]
async fn keys_that_the_engine_does_not_know_stay_behind() {
    let fixture = Fixture::new(Isolation::On, json!({}));
    let json = "Content-Type: application/json\r\nX-Registry-Auth: e30=\r\nX-Other: 1\r\n";
    fixture.send("POST /containers/x/exec", json, r#"{"cmd":["a"],"Later":{"x":1},"TTY":true}"#).await;
    let seen = fixture.last();
    assert_eq!(serde_json::from_str::<Value>(&seen.body).unwrap(), json!({"Cmd": ["a"], "Tty": true}));
    assert_eq!(seen.headers["content-type"], "application/json");
    assert!(seen.headers.contains_key("x-registry-auth") && !seen.headers.contains_key("x-other"));
    let (status, message) = fixture.send("POST /containers/x/exec", json, r#"{"Cmd":["a"],"cmd":["b"]}"#).await;
    assert!(status == "400" && message.contains("\"Cmd\" is there more than once"), "{status} {message}");
}

#[tokio::test]
async fn a_body_where_none_belongs_and_parameters_in_a_body_stay_behind() {
    let fixture = Fixture::new(Isolation::On, json!({}));
    let form = "Content-Type: application/x-www-form-urlencoded\r\n";
    fixture.send("POST /containers/x/kill?signal=HUP", form, "signal=KILL").await;
    let seen = fixture.last();
    assert_eq!((seen.body.as_str(), seen.headers.get("content-type")), ("", None));
    fixture.send("POST /images/create?fromSrc=-", form, "fromImage=x").await;
    let seen = fixture.last();
    assert_eq!((seen.body.as_str(), seen.headers.get("content-type")), ("fromImage=x", None));
}

#[tokio::test]
async fn the_mounts_of_a_container_are_asked_for_once_and_the_request_goes_to_its_id() {
    let (plain, mounting) = (id(), "cd".repeat(32));
    let volume = |path: &str| {
        json!({"Type": "volume", "Name": "v", "Source": "/var/lib/docker/volumes/v/_data",
        "Destination": path, "Driver": "local"})
    };
    let fixture = Fixture::new(
        Isolation::On,
        json!({
            "GET /containers/plain/json": {"Id": plain, "Mounts": [], "HostConfig": {}},
            "GET /containers/a%2Fb/json": {"Id": mounting, "Mounts": [volume("/a"), volume("/b")], "HostConfig": {}},
            "GET /volumes/v": {"Name": "v", "Driver": "local", "Options": null},
            "GET /containers/none/json": {"status": 404},
        }),
    );
    fixture.get("POST /v1.45/containers/plain/start?checkpoint=x&checkpoint-dir=/etc").await;
    assert_eq!(
        fixture.lines(),
        ["GET /containers/plain/json".to_owned(), format!("POST /v1.45/containers/{plain}/start")]
    );
    fixture.get("GET /containers/a/b/archive?path=/x%FF").await;
    let expected = [
        "GET /containers/a%2Fb/json".to_owned(),
        "GET /volumes/v".to_owned(),
        format!("GET /containers/{mounting}/archive?path=/x%FF"),
    ];
    assert_eq!(fixture.lines(), expected);
    fixture.get("POST /commit?container=plain&repo=r").await;
    let lines = fixture.lines();
    assert_eq!(lines[0], "GET /containers/plain/json");
    // A running container could put a link where a file was, so it is paused.
    assert_eq!(lines[1], format!("POST /commit?container={plain}&repo=r&pause=1"));
    // Meanwhile the name could be given to a container that nobody has judged.
    let (status, message) = fixture.get("POST /containers/none/restart?t=1").await;
    assert_eq!((status.as_str(), message.as_str()), ("404", "No such container: none"));
    assert_eq!(fixture.lines(), ["GET /containers/none/json"]);
}

#[tokio::test]
async fn a_container_from_before_isolation_gives_no_files_of_the_vm() {
    let bind = json!({"Type": "bind", "Source": "/etc", "Destination": "/m"});
    let volume = json!({"Type": "volume", "Name": "v", "Destination": "/m", "Driver": "local"});
    let fixture = Fixture::new(
        Isolation::On,
        json!({
            "GET /containers/bind/json": {"Id": id(), "Mounts": [bind], "HostConfig": {"Binds": ["/etc:/m"]}},
            "GET /containers/volume/json": {"Id": id(), "Mounts": [volume], "HostConfig": {"Binds": ["v:/m"]}},
            "GET /volumes/v": {"Name": "v", "Driver": "local", "Options": {"type": "none", "o": "bind", "device": "/etc"}},
            "GET /containers/cdi/json": {"Id": id(), "Mounts": [], "HostConfig": {"DeviceRequests": [{"Driver": "cdi"}]}},
        }),
    );
    for container in ["bind", "volume"] {
        for request in [
            format!("GET /containers/{container}/archive?path=/m"),
            format!("PUT /containers/{container}/archive?path=/m"),
            format!("GET /containers/{container}/export"),
            format!("POST /containers/{container}/start"),
            format!("POST /containers/{container}/restart"),
            format!("POST /commit?container={container}"),
        ] {
            assert_eq!(fixture.get(&request).await.0, "403", "{request}");
        }
        assert_eq!(fixture.get(&format!("POST /containers/{container}/stop")).await.0, "200", "it can be stopped");
    }
    assert_eq!(fixture.get("POST /containers/cdi/start").await.0, "403", "settings count at the start");
    assert_eq!(fixture.get("GET /containers/cdi/export").await.0, "200");
    let forbidden = |line: &String| !line.starts_with("GET /") && !line.ends_with("/stop");
    assert_eq!(fixture.lines().into_iter().filter(forbidden).collect::<Vec<_>>(), [""; 0]);
}

#[tokio::test]
async fn a_network_from_before_isolation_is_judged_when_a_container_joins_it() {
    let on = |network: &str| json!({"Id": id(), "Mounts": [], "HostConfig": {}, "NetworkSettings": {"Networks": {network: {}}}});
    let fixture = Fixture::new(
        Isolation::On,
        json!({
            "GET /containers/old/json": on("wire"), "GET /containers/new/json": on("plain"),
            "GET /containers/usual/json": on("bridge"),
            "GET /networks/wire": {"Name": "wire", "Driver": "macvlan", "Options": {"parent": "eth0"}},
            "GET /networks/plain": {"Name": "plain", "Driver": "bridge", "Options": {}},
            "GET /networks/none-such": {"status": 404},
        }),
    );
    for (request, body) in
        [("POST /containers/old/start", ""), ("POST /networks/wire/connect", r#"{"Container": "x"}"#)]
    {
        let (status, message) = fixture.send(request, "", body).await;
        assert!(status == "403" && message.contains("eth0"), "{request}: {message}");
    }
    fixture.lines();
    for request in ["POST /networks/plain/connect", "POST /networks/none-such/connect"] {
        assert_eq!(fixture.send(request, "", r#"{"Container": "x"}"#).await.0, "200", "{request}");
        assert_eq!(fixture.lines().last().unwrap(), request);
    }
    fixture.get("POST /containers/new/start").await;
    let expected = ["GET /containers/new/json", "GET /networks/plain", &format!("POST /containers/{}/start", id())];
    assert_eq!(fixture.lines(), expected);
    fixture.get("POST /containers/usual/start").await;
    assert_eq!(fixture.lines(), ["GET /containers/usual/json", &format!("POST /containers/{}/start", id())]);
}

#[tokio::test]
async fn a_container_with_more_volumes_than_can_be_checked_is_refused() {
    let mounts: Vec<Value> = (0..65).map(|number| json!({"Type": "volume", "Name": format!("v{number}")})).collect();
    let fixture = Fixture::new(
        Isolation::On,
        json!({"GET /containers/x/json": {"Id": id(), "Mounts": mounts, "HostConfig": {}}}),
    );
    let (status, message) = fixture.get("POST /containers/x/start").await;
    assert!(status == "403" && message.contains("more than 64 volumes"), "{message}");
    assert_eq!(fixture.lines(), ["GET /containers/x/json"]);
}

#[tokio::test]
async fn checkpoints_never_reach_the_engine() {
    for isolation in [Isolation::On, Isolation::Off] {
        let fixture = Fixture::new(isolation, json!({}));
        for line in [
            "GET /containers/x/checkpoints?dir=/run",
            "POST /v1.45/containers/x/checkpoints",
            "DELETE /containers/x/%63heckpoints/y?dir=/etc",
        ] {
            let (status, message) = fixture.get(line).await;
            assert!(status == "403" && message.starts_with("docker checkpoint is not supported"), "{line}: {message}");
        }
        assert_eq!(fixture.lines(), [""; 0], "{isolation:?}");
    }
}

#[tokio::test]
async fn without_isolation_requests_pass_as_they_are_but_for_the_directory_of_a_checkpoint() {
    let fixture = Fixture::new(Isolation::Off, json!({}));
    for (line, expected) in [
        ("GET //containers/json?unknown=1", "GET //containers/json?unknown=1"),
        ("POST /plugins/pull?remote=x", "POST /plugins/pull?remote=x"),
        ("POST /v1.45/containers/x/start?checkpoint=c&checkpoint-dir=/etc", "POST /v1.45/containers/x/start"),
        ("POST /containers//x/%73tart?%63heckpoint-dir=/etc", "POST /containers/x/start"),
    ] {
        assert_eq!(fixture.get(line).await.0, "200", "{line}");
        assert_eq!(fixture.lines(), [expected]);
    }
}

/// Prints the time that the gate adds to a creation: `cargo nextest run --run-ignored all --no-capture -- time`.
#[tokio::test]
#[ignore = "measures, and decides nothing"]
async fn the_time_that_a_creation_takes_longer() {
    const ROUNDS: u32 = 500;
    let mut recorded = include_str!("data/docker-cli-28.2.2.jsonl").lines();
    let create = |line: &&str| line.contains("containers/create?name=full");
    let body = serde_json::from_str::<Value>(recorded.find(create).unwrap()).unwrap();
    // Only what every judge lets pass.
    let mut body = body["body"].clone();
    for key in ["Binds", "Devices", "DeviceRequests", "BlkioDeviceReadBps", "VolumesFrom", "Annotations", "Links"] {
        body["HostConfig"][key] = Value::Null;
    }
    let body = body.to_string();
    let mut times = Vec::new();
    for isolation in [Isolation::Off, Isolation::On] {
        let fixture = Fixture::new(isolation, json!({}));
        let mut client = UnixStream::connect(fixture.directory.path().join("gate")).await.unwrap();
        let request = format!(
            "POST /v1.45/containers/create?name=x HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let mut best = Duration::MAX;
        for _ in 0..5 {
            let start = Instant::now();
            for _ in 0..ROUNDS {
                client.write_all(request.as_bytes()).await.unwrap();
                let answer = read_message(&mut client).await.unwrap();
                assert!(answer.line.contains(" 200 "), "{answer:?}");
            }
            best = best.min(start.elapsed() / ROUNDS);
        }
        times.push(best);
    }
    println!("a creation of {} bytes: {:?} without isolation, {:?} with", body.len(), times[0], times[1]);
}
