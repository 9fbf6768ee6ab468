//! Directories of the host in requests and answers: real sockets, an engine that remembers, and files in a directory that
//! stands for the shares' file system.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::{
    convert::Infallible,
    fs,
    os::unix::fs::symlink,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bulkhead_gate::{Caller, Gate, Isolation, SharedDirectories, UnixAcceptor, serve_connection};
use bulkhead_policy::shares::Shares;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{
    HeaderMap, Request, StatusCode,
    body::{Body, Frame, Incoming},
    server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    net::{UnixListener, UnixStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(10);

/// An answer of the engine: status, type and body.
type Canned = (u16, &'static str, String);

/// Texts that the engine has received.
type Log = Arc<Mutex<Vec<String>>>;

/// A gate with the shares /home/me and /srv/data, and an engine behind it that gives one answer to everything.
struct Fixture {
    directory: TempDir,
    answer: Arc<Mutex<Canned>>,
    bodies: Log,
    targets: Log,
}

/// An answer as the client has it.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap()
    }

    fn message(&self) -> String {
        self.json()["message"].as_str().unwrap().to_owned()
    }
}

/// A body in pieces of three bytes.
struct Pieces(Bytes);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let length = self.0.len().min(3);
        let piece = self.0.split_to(length);
        Poll::Ready((length > 0).then_some(Ok(Frame::data(piece))))
    }
}

impl Fixture {
    fn new(isolation: Isolation) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for path in ["root/home/me/src", "root/srv/data"] {
            fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        let answer = Arc::new(Mutex::new((200, "application/json", "{}".to_owned())));
        let (bodies, targets) = (Log::default(), Log::default());
        let engine = UnixListener::bind(directory.path().join("engine")).unwrap();
        let (canned, seen, asked) = (Arc::clone(&answer), Arc::clone(&bodies), Arc::clone(&targets));
        tokio::spawn(async move {
            loop {
                let (stream, _) = engine.accept().await.unwrap();
                let (canned, seen, asked) = (Arc::clone(&canned), Arc::clone(&seen), Arc::clone(&asked));
                let service = service_fn(move |request: Request<Incoming>| {
                    let (canned, seen) = (Arc::clone(&canned), Arc::clone(&seen));
                    asked.lock().unwrap().push(request.uri().to_string());
                    async move {
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        seen.lock().unwrap().push(String::from_utf8(body.to_vec()).unwrap());
                        let (status, kind, text) = canned.lock().unwrap().clone();
                        let length = text.len();
                        hyper::Response::builder()
                            .status(status)
                            .header("content-type", kind)
                            .header("content-length", length)
                            .header("etag", "\"/host_mnt/home/me\"")
                            .body(Pieces(text.into()))
                    }
                });
                tokio::spawn(server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
            }
        });
        let shares = Shares::new(["/home/me", "/srv/data"].map(str::to_owned));
        let shares = SharedDirectories::below(&directory.path().join("root"), shares);
        let gate = Arc::new(Gate::new(directory.path().join("engine"), isolation).with_shares(shares));
        let acceptor = UnixAcceptor::bind(&directory.path().join("gate")).unwrap();
        tokio::spawn(async move {
            loop {
                tokio::spawn(serve_connection(Arc::clone(&gate), acceptor.accept().await, Caller::Host));
            }
        });
        Self { directory, answer, bodies, targets }
    }

    fn answers(&self, status: u16, kind: &'static str, text: &str) {
        *self.answer.lock().unwrap() = (status, kind, text.to_owned());
    }

    async fn send(&self, method: &str, path: &str, body: &Value) -> Answer {
        let stream = UnixStream::connect(self.directory.path().join("gate")).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = Request::builder().method(method).uri(path).header("host", "docker");
        let request = request.header("content-type", "application/json").body(Full::new(Bytes::from(body))).unwrap();
        let response = timeout(SOON, sender.send_request(request)).await.expect("no answer").unwrap();
        let (parts, body) = response.into_parts();
        let bytes = timeout(SOON, body.collect()).await.expect("no end").unwrap().to_bytes();
        Answer { status: parts.status, headers: parts.headers, text: String::from_utf8(bytes.to_vec()).unwrap() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.send("GET", path, &Value::Null).await
    }

    /// Sends a body, and returns the one that the engine has received.
    async fn passed(&self, path: &str, body: &Value) -> Value {
        let answer = self.send("POST", path, body).await;
        assert_eq!(answer.status, StatusCode::OK, "{}", answer.text);
        serde_json::from_str(&self.bodies.lock().unwrap().pop().unwrap()).unwrap()
    }
}

fn creation(binds: Value, mounts: Value) -> Value {
    json!({"Image": "alpine", "Labels": {"folder": "/home/me"}, "HostConfig": {"Binds": binds, "Mounts": mounts}})
}

#[tokio::test]
async fn sources_in_the_shares_become_paths_of_the_vm_with_isolation_and_without() {
    for isolation in [Isolation::On, Isolation::Off] {
        let fixture = Fixture::new(isolation);
        symlink("/srv/data", fixture.directory.path().join("root/home/me/link")).unwrap();
        let mount = |source: &str| json!([{"Type": "bind", "Source": source, "Target": "/t", "BindOptions": {"CreateMountpoint": true}}]);
        let binds =
            json!(["/home/me:/src", "/home/me/./src/:/x:ro", "/host_mnt/srv/data:/d", "/home/me/link:/l", "v:/v"]);
        let passed = fixture.passed("/v1.45/containers/create", &creation(binds, mount("/home/me/new"))).await;
        let expected = json!([
            "/host_mnt/home/me:/src",
            "/host_mnt/home/me/src:/x:ro",
            "/host_mnt/srv/data:/d",
            "/host_mnt/srv/data:/l",
            "v:/v"
        ]);
        assert_eq!(passed["HostConfig"]["Binds"], expected);
        assert_eq!(passed["HostConfig"]["Mounts"], mount("/host_mnt/home/me/new"));
        assert_eq!(passed["Labels"]["folder"], "/home/me");

        let volume = |device: &str| json!({"Name": "v", "DriverOpts": {"type": "none", "o": "bind", "device": device}});
        assert_eq!(fixture.passed("/volumes/create", &volume("/srv/data")).await, volume("/host_mnt/srv/data"));
        let service = |source: &str| json!({"TaskTemplate": {"ContainerSpec": {"Mounts": mount(source)}}});
        for path in ["/services/create", "/services/x/update?version=1"] {
            assert_eq!(fixture.passed(path, &service("/home/me")).await, service("/host_mnt/home/me"), "{path}");
        }
    }
}

#[tokio::test]
async fn an_agents_socket_that_the_host_does_not_offer_is_refused_with_the_remedy() {
    for isolation in [Isolation::On, Isolation::Off] {
        let fixture = Fixture::new(isolation);
        let body = creation(json!(["/run/host-services/ssh-auth.sock:/agent"]), json!([]));
        let answer = fixture.send("POST", "/v1.45/containers/create", &body).await;
        let message = answer.message();
        assert!(message.contains("the VM has no ssh-agent") && message.contains("SSH_AUTH_SOCK"), "{message}");
        assert!(fixture.bodies.lock().unwrap().is_empty());
    }
}

#[tokio::test]
async fn a_path_that_is_not_shared_is_refused_with_the_remedy_and_one_of_the_vm_as_ever() {
    let fixture = Fixture::new(Isolation::On);
    symlink("..", fixture.directory.path().join("root/home/me/up")).unwrap();
    for (source, named) in [
        ("/home/you", "/home/you"),
        ("/home", "/home"),
        ("/host_mnt/home", "/home"),
        ("/home/me/up", "/home"),
        ("/tmp/x/", "/tmp/x"),
    ] {
        let text = format!(
            "mounts denied: the path {named} is not shared from the host; share it with: bulkhead share add {named}"
        );
        let mount = json!([{"Type": "bind", "Source": source, "Target": "/t"}]);
        let volume = json!({"DriverOpts": {"type": "none", "o": "bind", "device": source}});
        let service = json!({"TaskTemplate": {"ContainerSpec": {"Mounts": mount}}});
        for (path, body) in [
            ("/containers/create", creation(json!([format!("{source}:/x")]), json!([]))),
            ("/containers/create", creation(json!([]), mount)),
            ("/volumes/create", volume),
            ("/services/create", service),
        ] {
            let answer = fixture.send("POST", path, &body).await;
            assert_eq!((answer.status, answer.message()), (StatusCode::FORBIDDEN, text.clone()), "{body}");
        }
    }
    let restricted = creation(json!(["/etc/docker/daemon.json:/x"]), json!([]));
    let message = fixture.send("POST", "/containers/create", &restricted).await.message();
    assert!(message.ends_with("configured as a restricted host mount: unknown"), "{message}");
    let outside = creation(json!(["/home/me/../you:/x"]), json!([]));
    assert_eq!(fixture.send("POST", "/containers/create", &outside).await.status, StatusCode::FORBIDDEN);
    let socket = creation(json!(["/run/docker.sock:/x"]), json!([]));
    assert!(fixture.send("POST", "/containers/create", &socket).await.message().contains("docker socket mount denied"));
    assert!(fixture.bodies.lock().unwrap().is_empty(), "the engine has received one of them");
}

#[tokio::test]
async fn without_isolation_paths_that_are_not_shared_are_the_vms_own_and_a_body_without_shares_stays_as_it_is() {
    let fixture = Fixture::new(Isolation::Off);
    let body = creation(json!(["/etc:/x", "/home/you:/y", "/var/run/docker.sock:/s", "/host_mnt/z:/z"]), json!([]));
    assert_eq!(fixture.passed("/containers/create", &body).await, body);
}

#[tokio::test]
async fn a_description_shows_the_hosts_paths_and_can_be_sent_again() {
    for isolation in [Isolation::On, Isolation::Off] {
        let fixture = Fixture::new(isolation);
        let described = |prefix: &str| {
            json!({"Id": "x", "Config": {"Cmd": ["ls", "/host_mnt/home/me"]}, "HostConfig": {
                "Binds": [format!("{prefix}/home/me:/src:rw")],
                "Mounts": [{"Type": "bind", "Source": format!("{prefix}/srv/data"), "Target": "/d"}]},
                "Mounts": [{"Type": "bind", "Source": format!("{prefix}/home/me"), "Destination": "/src"}]})
        };
        fixture.answers(200, "application/json", &described("/host_mnt").to_string());
        let answer = fixture.get("/v1.45/containers/x/json").await;
        assert_eq!(answer.json(), described(""));
        assert_eq!(answer.headers["content-length"], answer.text.len().to_string());
        assert_eq!(answer.headers["etag"], "\"/host_mnt/home/me\"");

        let again = json!({"Image": "alpine", "HostConfig": answer.json()["HostConfig"]});
        let mut passed = fixture.passed("/containers/create", &again).await;
        passed["HostConfig"].as_object_mut().unwrap().remove("Runtime");
        assert_eq!(passed["HostConfig"], described("/host_mnt")["HostConfig"]);

        let many = |prefix: &str| Value::from(vec![described(prefix); 500]);
        fixture.answers(200, "application/json", &many("/host_mnt").to_string());
        let list = fixture.get("/containers/json").await;
        assert_eq!(list.json(), many(""));
        assert!(!list.headers.contains_key("content-length"), "{:?}", list.headers);

        let volume =
            |prefix: &str| json!({"Name": "v", "Options": {"device": format!("{prefix}/srv/data"), "o": "bind"}});
        fixture.answers(200, "application/json", &volume("/host_mnt").to_string());
        assert_eq!(fixture.get("/volumes/v").await.json(), volume(""));
    }
}

#[tokio::test]
async fn a_list_can_be_filtered_by_the_hosts_path() {
    for isolation in [Isolation::On, Isolation::Off] {
        let fixture = Fixture::new(isolation);
        fixture.get("/containers/json?all=1&filters=%7B%22volume%22%3A%5B%22%2Fhome%2Fme%22%5D%7D").await;
        let target = fixture.targets.lock().unwrap().pop().unwrap();
        let expected = "/containers/json?all=1&filters=%7B%22volume%22:%5B%22/home/me%22,%22/host_mnt/home/me%22%5D%7D";
        assert_eq!(target, expected);
        fixture.get("/containers/json?limit=1").await;
        assert_eq!(fixture.targets.lock().unwrap().pop().unwrap(), "/containers/json?limit=1");
    }
}

#[tokio::test]
async fn an_error_names_the_hosts_path_on_every_route() {
    let fixture = Fixture::new(Isolation::On);
    let text =
        r#"{"message":"invalid mount config for type \"bind\": bind source path does not exist: /host_mnt/home/me/x"}"#;
    fixture.answers(400, "application/json", text);
    for (method, path) in
        [("POST", "/containers/create"), ("GET", "/info"), ("POST", "/build"), ("GET", "/containers/x/logs")]
    {
        let body = if path == "/containers/create" { creation(json!([]), json!([])) } else { Value::Null };
        let answer = fixture.send(method, path, &body).await;
        assert!(answer.message().ends_with("does not exist: /home/me/x"), "{path}: {}", answer.text);
    }
}

#[tokio::test]
async fn streams_and_other_documents_pass_byte_for_byte() {
    let fixture = Fixture::new(Isolation::On);
    let text = r#"{"Mounts":[{"Source":"/host_mnt/home/me"}],"message":"/host_mnt/home/me/x"}"#;
    for (kind, path) in [
        ("application/vnd.docker.raw-stream", "/containers/x/logs"),
        ("application/vnd.docker.multiplexed-stream", "/containers/x/logs"),
        ("application/json", "/images/x/json"),
        ("application/json", "/events"),
        ("application/x-tar", "/images/x/get"),
        ("text/plain", "/containers/x/json"),
    ] {
        fixture.answers(200, kind, text);
        let answer = fixture.get(path).await;
        assert_eq!(answer.text, text, "{path}");
        assert_eq!(answer.headers["content-length"], text.len().to_string());
    }
    fixture.answers(200, "application/json", text);
    assert_eq!(fixture.send("POST", "/build", &Value::Null).await.text, text);
}

#[tokio::test]
async fn a_container_with_a_directory_that_is_no_longer_shared_does_not_start() {
    let fixture = Fixture::new(Isolation::On);
    let container = |source: &str| {
        json!({"Id": "a".repeat(64), "Config": {"Image": "alpine"}, "HostConfig": {"Binds": null},
            "Mounts": [{"Type": "bind", "Source": source}]})
        .to_string()
    };
    fixture.answers(200, "application/json", &container("/host_mnt/home/you"));
    let refused = fixture.send("POST", "/containers/x/start", &Value::Null).await;
    assert!(refused.message().contains("the path /home/you is not shared"), "{}", refused.text);
    fixture.answers(200, "application/json", &container("/host_mnt/home/me/x"));
    assert_eq!(fixture.send("POST", "/containers/x/start", &Value::Null).await.status, StatusCode::OK);
}
