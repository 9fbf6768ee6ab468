//! Containers that may use the engine: real sockets, and an engine that has some images.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_gate::{
    Caller, Directories, Gate, Isolation, Sockets, UnixAcceptor, adopt_socket, answer_runtime, serve_connection,
};
use bulkhead_protocol::{GRANTED, SocketCommands, SocketExceptions};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    time::timeout,
};

const SOON: Duration = Duration::from_secs(10);
const DENIED: &str = "docker socket mount denied for container with image";

/// The state of the engine, and the requests it received.
#[derive(Default)]
struct World {
    /// By ID.
    images: BTreeMap<String, Value>,
    /// Name to ID.
    names: BTreeMap<String, String>,
    /// Digests in registries, by `name:tag`.
    registry: BTreeMap<String, String>,
    /// Container to image.
    containers: BTreeMap<String, String>,
    /// A name and the image it is moved to between the gate's check and the creation of a container.
    retag: Option<(String, String)>,
    seen: Vec<String>,
}

type Shared = Arc<Mutex<World>>;

impl World {
    fn image(&mut self, number: u8, name: &str, digests: &[&str], layers: &[&str]) -> String {
        let id = format!("sha256:{}", format!("{number:02x}").repeat(32));
        let image = json!({"Id": id, "RepoTags": [name], "RepoDigests": digests, "RootFS": {"Layers": layers}});
        self.images.insert(id.clone(), image);
        self.names.insert(name.to_owned(), id.clone());
        id
    }

    fn find(&self, name: &str) -> Option<&Value> {
        self.images.get(self.names.get(name).map_or(name, String::as_str))
    }

    fn answer(&mut self, line: &str, body: &[u8], data: &Path) -> (u16, Value) {
        let mut words = line.split(' ');
        let (method, target) = (words.next().unwrap(), words.next().unwrap().replace("%2F", "/").replace("%3A", ":"));
        let path = target.split('?').next().unwrap();
        let inner = |first: &str, last: &str| path.strip_prefix(first)?.strip_suffix(last).map(str::to_owned);
        self.seen.push(format!("{method} {target}"));
        if method == "POST" && path.ends_with("/containers/create") {
            let body: Value = serde_json::from_slice(body).unwrap();
            if let Some((name, id)) = self.retag.take() {
                self.names.insert(name, id);
            }
            let Some(image) = self.find(body["Image"].as_str().unwrap()) else { return (404, json!({})) };
            let image = image["Id"].as_str().unwrap().to_owned();
            let id = format!("{:064x}", self.containers.len() + 1);
            std::fs::create_dir_all(data.join("containers").join(&id)).unwrap();
            let config = json!({"Config": {"Image": body["Image"]}}).to_string();
            std::fs::write(data.join("containers").join(&id).join("config.v2.json"), config).unwrap();
            self.containers.insert(id.clone(), image);
            return (201, json!({"Id": id, "Warnings": []}));
        }
        if path == "/images/json" {
            let list =
                self.images.values().map(|image| json!({"Id": image["Id"], "RepoDigests": image["RepoDigests"]}));
            return (200, list.collect());
        }
        if let Some(name) = inner("/images/", "/json") {
            return self.find(&name).map_or((404, json!({})), |image| (200, image.clone()));
        }
        if let Some(name) = inner("/distribution/", "/json") {
            let known = self.registry.get(&name);
            return known.map_or((500, json!({})), |digest| (200, json!({"Descriptor": {"digest": digest}})));
        }
        if let Some(id) = inner("/containers/", "/json").filter(|id| self.containers.contains_key(id)) {
            return (200, json!({"Id": id, "Image": self.containers[&id]}));
        }
        if method == "DELETE" {
            let id = path.strip_prefix("/containers/").unwrap();
            std::fs::remove_dir_all(data.join("containers").join(id)).unwrap();
            self.containers.remove(id);
            return (204, Value::Null);
        }
        (200, json!({"passed": target}))
    }
}

struct Fixture {
    directory: TempDir,
    gate: Arc<Gate>,
    world: Shared,
}

fn exceptions(images: &[&str]) -> SocketExceptions {
    SocketExceptions { images: images.iter().map(|image| (*image).to_owned()).collect(), derived: true, commands: None }
}

fn list(allow: bool, words: &str) -> SocketCommands {
    SocketCommands { allow, commands: words.split(' ').map(ToOwned::to_owned).collect() }
}

impl Fixture {
    fn new(exceptions: SocketExceptions) -> Self {
        Self::within(tempfile::tempdir().unwrap(), Shared::default(), exceptions)
    }

    /// A gate that starts with the files of an earlier one.
    fn within(directory: TempDir, world: Shared, exceptions: SocketExceptions) -> Self {
        let path = |name: &str| directory.path().join(name);
        let directories = Directories { sockets: path("sockets"), data: path("data") };
        let gate = Gate::new(path("engine"), Isolation::On).with_sockets(Sockets::new(exceptions, directories));
        let fixture = Self { gate: Arc::new(gate), world, directory };
        fixture.serve();
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn serve(&self) {
        let (gate, acceptor) = (Arc::clone(&self.gate), UnixAcceptor::bind(&self.path("gate")).unwrap());
        tokio::spawn(async move {
            loop {
                tokio::spawn(serve_connection(Arc::clone(&gate), acceptor.accept().await, Caller::Host));
            }
        });
        let (gate, runtime) = (Arc::clone(&self.gate), UnixAcceptor::bind(&self.path("runtime")).unwrap());
        tokio::spawn(async move {
            loop {
                answer_runtime(Arc::clone(&gate), runtime.accept().await).await;
            }
        });
        let _ = std::fs::remove_file(self.path("engine"));
        let engine = UnixListener::bind(self.path("engine")).unwrap();
        let (world, data) = (Arc::clone(&self.world), self.path("data"));
        tokio::spawn(async move {
            loop {
                let (stream, _) = engine.accept().await.unwrap();
                tokio::spawn(serve_engine(stream, Arc::clone(&world), data.clone()));
            }
        });
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        self.world.lock().unwrap()
    }

    /// Creates a container of this image that mounts the engine's socket.
    async fn create(&self, image: &str) -> (u16, Value) {
        let body = json!({"Image": image, "HostConfig": {"Binds": ["/var/run/docker.sock:/var/run/docker.sock"]}});
        self.create_with(&body).await
    }

    async fn create_with(&self, body: &Value) -> (u16, Value) {
        let answer = exchange(&self.path("gate"), &post("/v1.43/containers/create", &body.to_string())).await;
        (status(&answer), serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap())
    }

    /// Creates such a container, which has to be allowed, and returns its ID.
    async fn container(&self, image: &str) -> String {
        let (status, body) = self.create(image).await;
        assert_eq!(status, 201, "{body}");
        body["Id"].as_str().unwrap().to_owned()
    }

    /// The answer that the runtime gets when it starts the container.
    async fn start(&self, id: &str) -> String {
        exchange(&self.path("runtime"), &format!("{id}\n")).await
    }

    /// The socket of a new container.
    async fn socket(&self, image: &str) -> PathBuf {
        let id = self.container(image).await;
        assert_eq!(self.start(&id).await, GRANTED);
        self.path("sockets").join(id)
    }
}

async fn serve_engine(mut stream: UnixStream, world: Shared, data: PathBuf) {
    let mut bytes = Vec::new();
    let end = loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            break at + 4;
        }
        if stream.read_buf(&mut bytes).await.unwrap() == 0 {
            return;
        }
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
    let lower = head.to_ascii_lowercase();
    if lower.contains("upgrade: tcp") {
        world.lock().unwrap().seen.push(head.lines().next().unwrap().to_owned());
        stream.write_all(b"HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n").await.unwrap();
        let mut input = bytes[end..].to_vec();
        stream.read_to_end(&mut input).await.unwrap();
        let _ = stream.write_all(&input).await;
        return;
    }
    let length: usize = lower
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |length| length.trim().parse().unwrap());
    while bytes.len() < end + length {
        assert!(stream.read_buf(&mut bytes).await.unwrap() > 0);
    }
    let (status, body) = world.lock().unwrap().answer(head.lines().next().unwrap(), &bytes[end..], &data);
    let body = if status == 204 { String::new() } else { body.to_string() };
    let answer = format!(
        "HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    let _ = stream.write_all(answer.as_bytes()).await;
}

fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n")
}

fn status(answer: &str) -> u16 {
    answer.split(' ').nth(1).unwrap_or_else(|| panic!("no answer: {answer:?}")).parse().unwrap()
}

async fn exchange(socket: &Path, request: &str) -> String {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(SOON, stream.read_to_end(&mut answer)).await.expect("no end").unwrap();
    String::from_utf8(answer).unwrap()
}

const CLI: &str = "docker@sha256:aaaa";

#[tokio::test]
async fn an_allowed_image_gets_a_socket_of_its_own_and_another_does_not() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    fixture.world().image(2, "alpine", &["alpine@sha256:bbbb"], &["z"]);
    let one = fixture.socket("docker:cli").await;
    let two = fixture.socket("docker:cli").await;
    assert_ne!(one, two);
    assert!(exchange(&one, &get("/containers/json")).await.contains("passed"));
    let (status, body) = fixture.create("alpine").await;
    let text = body["message"].as_str().unwrap();
    assert_eq!(status, 403, "{text}");
    assert!(text.contains(DENIED) && text.contains("\"docker.io/library/alpine\""), "{text}");
}

#[tokio::test]
async fn an_image_that_only_bears_an_allowed_name_is_refused() {
    let fixture = Fixture::new(exceptions(&["docker:cli", "docker:*"]));
    // As after `docker tag alpine docker:cli`, and as after `docker load` of an image of that name.
    fixture.world().image(1, "docker:cli", &["alpine@sha256:bbbb"], &["z"]);
    assert_eq!(fixture.create("docker:cli").await.0, 403);
    fixture.world().image(1, "docker:cli", &[], &["z"]);
    assert_eq!(fixture.create("docker:cli").await.0, 403);
    // An allowed image is allowed under any name.
    fixture.world().image(2, "mine", &[CLI], &["a"]);
    assert_eq!(fixture.create("mine").await.0, 201);
}

#[tokio::test]
async fn a_tag_means_the_digest_in_its_registry_or_the_last_known_one() {
    let fixture = Fixture::new(exceptions(&["docker:cli"]));
    let reference = "docker.io/library/docker:cli".to_owned();
    fixture.world().registry.insert(reference.clone(), "sha256:aaaa".to_owned());
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    // Another tag of the same repository, given the allowed tag's name.
    fixture.world().image(2, "docker:dind", &["docker@sha256:dddd"], &["d"]);
    assert_eq!((fixture.create("docker:cli").await.0, fixture.create("docker:dind").await.0), (201, 403));
    // A gate that starts without a network uses the saved digest.
    let (directory, world) = (fixture.directory, Arc::clone(&fixture.world));
    world.lock().unwrap().registry.clear();
    let fixture = Fixture::within(directory, world, exceptions(&["docker:cli"]));
    assert_eq!((fixture.create("docker:cli").await.0, fixture.create("docker:dind").await.0), (201, 403));
    let fresh = Fixture::new(exceptions(&["docker:cli"]));
    fresh.world().image(1, "docker:cli", &[CLI], &["a"]);
    assert_eq!(fresh.create("docker:cli").await.0, 403, "the tag has no known digest");
}

#[tokio::test]
async fn a_pull_asks_what_the_tag_is_while_the_registry_can_be_reached() {
    let fixture = Fixture::new(exceptions(&["docker:cli"]));
    let reference = "docker.io/library/docker:cli".to_owned();
    fixture.world().registry.insert(reference, "sha256:aaaa".to_owned());
    exchange(&fixture.path("gate"), &post("/v1.43/images/create?fromImage=docker&tag=cli", "")).await;
    let remembered = async {
        while !std::fs::read_to_string(fixture.path("data/bulkhead/digests.json"))
            .is_ok_and(|text| text.contains("aaaa"))
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, remembered).await.expect("the registry was not asked");
    exchange(&fixture.path("gate"), &post("/v1.43/images/create?fromImage=alpine", "")).await;
    assert!(!fixture.world().seen.iter().any(|line| line.contains("/distribution/docker.io/library/alpine")));
}

#[tokio::test]
async fn digests_ids_wildcards_and_the_star() {
    let digest = format!("sha256:{}", "ab".repeat(32));
    let id = format!("sha256:{}", "05".repeat(32));
    for (entry, allowed) in [
        (format!("docker@{digest}"), "pulled"),
        (format!("docker.io/library/docker:any@{digest}"), "pulled"),
        ("docker.io/library/*:*".to_owned(), "pulled"),
        (id.clone(), "local"),
        ("*".to_owned(), "pulled local other"),
    ] {
        let fixture = Fixture::new(exceptions(&[&entry]));
        fixture.world().image(1, "pulled", &[&format!("docker@{digest}")], &["a"]);
        fixture.world().image(5, "local", &[], &["b"]);
        fixture.world().image(6, "other", &["evil.io/library/docker@sha256:00"], &["c"]);
        for image in ["pulled", "local", "other"] {
            let expected = if allowed.contains(image) { 201 } else { 403 };
            assert_eq!(fixture.create(image).await.0, expected, "{entry}: {image}");
        }
    }
}

#[tokio::test]
async fn an_image_built_on_an_allowed_one_is_allowed_unless_that_is_off() {
    let build = |world: &Shared| {
        let mut world = world.lock().unwrap();
        world.image(1, "docker:cli", &[CLI], &["a", "b"]);
        world.image(2, "derived", &[], &["a", "b", "c"]);
        world.image(3, "unrelated", &[], &["b", "a", "c"]);
        // Pulled from another registry, so not built on this machine.
        world.image(4, "foreign", &["evil.io/x@sha256:00"], &["a", "b", "c"]);
    };
    let on = Fixture::new(exceptions(&["docker:*"]));
    build(&on.world);
    let off = Fixture::new(SocketExceptions { derived: false, ..exceptions(&["docker:*"]) });
    build(&off.world);
    assert_eq!((on.create("derived").await.0, off.create("derived").await.0), (201, 403));
    assert_eq!((on.create("unrelated").await.0, on.create("foreign").await.0), (403, 403));
    // The parent has to be there.
    on.world().images.remove(&format!("sha256:{}", "01".repeat(32)));
    assert_eq!(on.create("derived").await.0, 403);
}

#[tokio::test]
async fn a_name_that_changes_its_meaning_in_between_gains_nothing() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    let evil = fixture.world().image(2, "evil", &[], &["z"]);
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    fixture.world().retag = Some(("docker:cli".to_owned(), evil));
    assert_eq!(fixture.create("docker:cli").await.0, 403);
    assert!(fixture.world().containers.is_empty(), "the container is still there");
}

#[tokio::test]
async fn a_missing_image_is_the_engines_to_miss() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    assert_eq!(fixture.create("docker:cli").await.0, 404);
}

#[tokio::test]
async fn a_container_without_a_grant_gets_no_socket_at_its_start() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    fixture.world().image(2, "alpine", &[], &["z"]);
    // It could have the socket of another container.
    let (status, body) =
        fixture.create_with(&json!({"Image": "alpine", "HostConfig": {"VolumesFrom": ["allowed"]}})).await;
    assert_eq!(status, 201, "the other container may have no socket");
    let answer = fixture.start(body["Id"].as_str().unwrap()).await;
    assert!(answer.contains(DENIED) && answer.contains("\"docker.io/library/alpine\""), "{answer}");
    for id in ["", "x", "../etc", &"0".repeat(64), &"A".repeat(64)] {
        assert!(fixture.start(id).await.contains(DENIED), "{id}");
    }
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    let (_, body) =
        fixture.create_with(&json!({"Image": "docker:cli", "HostConfig": {"VolumesFrom": ["allowed"]}})).await;
    assert_eq!(fixture.start(body["Id"].as_str().unwrap()).await, GRANTED);
}

#[tokio::test]
async fn a_container_of_before_needs_the_list_of_today() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    let id = fixture.container("docker:cli").await;
    let (directory, world) = (fixture.directory, Arc::clone(&fixture.world));
    let fixture = Fixture::within(directory, world, exceptions(&["podman:*"]));
    assert!(fixture.start(&id).await.contains(DENIED));
}

#[tokio::test]
async fn a_socket_ends_with_its_container_and_with_it_what_uses_it() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    let (one, two) = (fixture.socket("docker:cli").await, fixture.socket("docker:cli").await);
    let mut attached = UnixStream::connect(&one).await.unwrap();
    attached
        .write_all(b"POST /containers/x/attach HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
        .await
        .unwrap();
    let mut head = [0; 12];
    timeout(SOON, attached.read_exact(&mut head)).await.unwrap().unwrap();
    assert_eq!(&head, b"HTTP/1.1 101");
    std::fs::remove_dir_all(fixture.path("data/containers").join(one.file_name().unwrap())).unwrap();
    timeout(SOON, async { while attached.read_buf(&mut Vec::new()).await.unwrap_or(0) > 0 {} })
        .await
        .expect("it goes on");
    assert!(!one.exists() && UnixStream::connect(&one).await.is_err());
    assert!(exchange(&two, &get("/containers/json")).await.contains("passed"), "the other one is gone, too");
}

#[tokio::test]
async fn a_socket_that_was_kept_goes_on_with_a_new_gate() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    let id = "ab".repeat(32);
    std::fs::create_dir_all(fixture.path("data/containers").join(&id)).unwrap();
    let path = fixture.path("kept");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    // A request while no gate runs.
    let waiting = tokio::spawn({
        let path = path.clone();
        async move { exchange(&path, &get("/containers/json")).await }
    });
    tokio::time::sleep(Duration::from_millis(100)).await;
    adopt_socket(&fixture.gate, &id, listener);
    assert!(timeout(SOON, waiting).await.unwrap().unwrap().contains("passed"));
    std::fs::remove_dir_all(fixture.path("data/containers").join(&id)).unwrap();
    let gone = async {
        while UnixStream::connect(&path).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(SOON, gone).await.expect("it outlives its container");
}

#[tokio::test]
async fn a_blocked_command_has_the_documented_text_and_stops_at_the_gate() {
    let fixture =
        Fixture::new(SocketExceptions { commands: Some(list(false, "push build")), ..exceptions(&["docker:*"]) });
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    let socket = fixture.socket("docker:cli").await;
    fixture.world().seen.clear();
    let answer = exchange(&socket, &post("/v1.43/images/myimage/push?tag=latest", "")).await;
    assert_eq!(status(&answer), 403);
    let body: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    assert_eq!(
        body["message"],
        "enhanced container isolation: docker command \"/v1.43/images/myimage/push?tag=latest\" is blocked; if you wish \
         to allow it, configure the docker socket command list in the Docker Desktop settings."
    );
    for request in [
        post("/images/myimage/push", ""),
        post("//v1.43//images/./a/../myimage/%70ush/", ""),
        post("http://localhost/v1.43/images/myimage/push?tag=latest", ""),
        post("/v1.43/images/reg.io%2Fa%2Fb/push", ""),
        "post /images/x/push HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n".to_owned(),
        "POST /session HTTP/1.1\r\nHost: d\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n".to_owned(),
        "POST /grpc HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
            .replace("Upgrade\r\nUp", "Upgrade, close\r\nUp"),
        post("/build?t=x", ""),
        "POST /build HTTP/1.1\r\nHost: d\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            .to_owned(),
    ] {
        let answer = exchange(&socket, &request).await;
        assert!(status(&answer) == 403 && answer.contains("is blocked; if you wish to allow it"), "{request}{answer}");
    }
    assert!(fixture.world().seen.is_empty(), "{:?}", fixture.world().seen);
    // The list does not apply to the host.
    assert!(exchange(&fixture.path("gate"), &post("/v1.43/images/x/push", "")).await.contains("passed"));
}

#[tokio::test]
async fn a_request_behind_another_on_the_same_connection_is_judged_as_well() {
    let fixture = Fixture::new(SocketExceptions { commands: Some(list(true, "ps")), ..exceptions(&["docker:*"]) });
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    let socket = fixture.socket("docker:cli").await;
    fixture.world().seen.clear();
    let answers = exchange(
        &socket,
        "GET /containers/json HTTP/1.1\r\nHost: d\r\n\r\nPOST /images/x/push HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n",
    )
    .await;
    assert!(answers.starts_with("HTTP/1.1 200") && answers.contains("HTTP/1.1 403"), "{answers}");
    // Two lengths: one side would see a second request where the other sees a body.
    let hidden = "POST /images/x/push HTTP/1.1\r\nHost: d\r\n\r\n";
    for ambiguous in [
        format!(
            "GET /containers/json HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: {}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}",
            hidden.len() + 5
        ),
        format!(
            "GET /containers/json HTTP/1.1\r\nHost: d\r\nConnection: close\r\nContent-Length: 0\r\nContent-Length: {}\r\n\r\n{hidden}",
            hidden.len()
        ),
        format!(
            "GET /containers/json HTTP/1.1\r\nHost: d\r\nConnection: close\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n{hidden}"
        ),
        format!(
            "GET /containers/json HTTP/1.1\r\nHost: d\r\nConnection: Upgrade, close\r\nUpgrade: tcp\r\n\r\n{hidden}"
        ),
    ] {
        let answer = exchange(&socket, &ambiguous).await;
        assert!(!answer.starts_with("HTTP/1.1 101"), "{answer}");
    }
    let seen = fixture.world().seen.clone();
    assert!(seen.iter().all(|line| line.starts_with("GET /containers/json")), "{seen:?}");
}

#[tokio::test]
async fn what_a_container_makes_is_held_to_isolation_too() {
    let fixture = Fixture::new(exceptions(&["docker:*"]));
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    fixture.world().image(2, "alpine", &[], &["z"]);
    let socket = fixture.socket("docker:cli").await;
    let bind = |image: &str, source: &str| {
        post(
            "/containers/create",
            &json!({"Image": image, "HostConfig": {"Runtime": "runc", "Binds": [format!("{source}:/s")]}}).to_string(),
        )
    };
    assert!(exchange(&socket, &bind("alpine", "/var/run/docker.sock")).await.contains(DENIED));
    assert!(exchange(&socket, &bind("docker:cli", "/run")).await.contains(DENIED));
    assert_eq!(status(&exchange(&socket, &bind("docker:cli", "/run/docker.sock")).await), 201);
    let odd = bind("alpine", "/run/docker.sock").replace("/containers/create", "/containers//x/../%63reate/");
    assert!(exchange(&socket, &odd).await.contains(DENIED));
}

#[tokio::test]
async fn input_ends_on_its_own_over_a_containers_socket() {
    let fixture =
        Fixture::new(SocketExceptions { commands: Some(list(true, "run build")), ..exceptions(&["docker:*"]) });
    fixture.world().image(1, "docker:cli", &[CLI], &["a"]);
    let socket = fixture.socket("docker:cli").await;
    for path in ["/containers/x/attach?stdin=1", "/v1.43/containers/x/attach", "/session", "/v1.45/grpc"] {
        let mut stream = UnixStream::connect(&socket).await.unwrap();
        let head = format!("POST {path} HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(b"input").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        timeout(SOON, stream.read_to_end(&mut answer)).await.expect("no end").unwrap();
        assert!(
            answer.starts_with(b"HTTP/1.1 101") && answer.ends_with(b"\r\n\r\ninput"),
            "{:?}",
            String::from_utf8_lossy(&answer)
        );
    }
}

#[tokio::test]
async fn docker_load_can_be_blocked() {
    let directory = tempfile::tempdir().unwrap();
    let gate = Arc::new(Gate::new(directory.path().join("engine"), Isolation::Off).with_load_blocked(true));
    let acceptor = UnixAcceptor::bind(&directory.path().join("gate")).unwrap();
    tokio::spawn(async move { serve_connection(gate, acceptor.accept().await, Caller::Host).await });
    let answer = exchange(&directory.path().join("gate"), &post("/v1.43/images//%6coad?quiet=1", "tar")).await;
    assert!(answer.starts_with("HTTP/1.1 403") && answer.contains("docker load is blocked"), "{answer}");
}

#[tokio::test]
async fn a_refusal_reaches_a_client_that_is_still_sending() {
    let directory = tempfile::tempdir().unwrap();
    let gate = Arc::new(Gate::new(directory.path().join("engine"), Isolation::Off).with_load_blocked(true));
    let acceptor = UnixAcceptor::bind(&directory.path().join("gate")).unwrap();
    tokio::spawn(async move { serve_connection(gate, acceptor.accept().await, Caller::Host).await });
    let mut stream = UnixStream::connect(directory.path().join("gate")).await.unwrap();
    let tar = vec![0; 8 << 20];
    let head = format!("POST /images/load HTTP/1.1\r\nHost: d\r\nContent-Length: {}\r\n\r\n", tar.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    timeout(SOON, stream.write_all(&tar)).await.expect("it is not taken").expect("the connection was closed");
    let mut answer = [0; 12];
    timeout(SOON, stream.read_exact(&mut answer)).await.expect("no answer").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 403");
}
