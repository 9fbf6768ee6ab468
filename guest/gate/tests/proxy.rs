//! The gate between a real client socket and an engine that speaks raw HTTP.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::{
    future::Future,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bulkhead_gate::{Caller, Gate, Isolation, UnixAcceptor, serve_connection};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::oneshot,
    time::timeout,
};

const SOON: Duration = Duration::from_secs(10);

/// A gate with its sockets in a temporary directory.
struct Fixture {
    directory: TempDir,
    requests: Arc<AtomicUsize>,
}

/// A request as the engine receives it.
struct Seen {
    head: String,
    rest: Vec<u8>,
    stream: UnixStream,
}

impl Fixture {
    fn gate(isolation: Isolation) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let gate = Arc::new(Gate::new(directory.path().join("engine"), isolation));
        let acceptor = UnixAcceptor::bind(&directory.path().join("gate")).unwrap();
        tokio::spawn(async move {
            loop {
                tokio::spawn(serve_connection(Arc::clone(&gate), acceptor.accept().await, Caller::Host));
            }
        });
        Self { directory, requests: Arc::default() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts an engine that gives each connection's first request to `answer`.
    fn engine<F: Future<Output = ()> + Send + 'static>(&self, answer: impl Fn(Seen) -> F + Send + Sync + 'static) {
        let listener = UnixListener::bind(self.path("engine")).unwrap();
        let (answer, requests) = (Arc::new(answer), Arc::clone(&self.requests));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (answer, requests) = (Arc::clone(&answer), Arc::clone(&requests));
                tokio::spawn(async move {
                    let (head, rest, stream) = read_head(stream).await;
                    requests.fetch_add(1, Ordering::SeqCst);
                    answer(Seen { head, rest, stream }).await;
                });
            }
        });
    }

    async fn client(&self) -> UnixStream {
        connect(&self.path("gate")).await
    }
}

async fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).await.unwrap()
}

/// Reads up to the blank line; returns the bytes behind it, too.
async fn read_head(mut stream: UnixStream) -> (String, Vec<u8>, UnixStream) {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            return (String::from_utf8(bytes).unwrap(), rest, stream);
        }
        let read = timeout(SOON, stream.read_buf(&mut bytes)).await.unwrap().unwrap();
        assert!(read > 0, "the connection ended within a head: {:?}", String::from_utf8_lossy(&bytes));
    }
}

async fn read_exactly(stream: &mut UnixStream, mut have: Vec<u8>, length: usize) -> Vec<u8> {
    while have.len() < length {
        assert!(timeout(SOON, stream.read_buf(&mut have)).await.unwrap().unwrap() > 0, "ended early");
    }
    have
}

async fn read_to_end(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    timeout(SOON, stream.read_to_end(&mut bytes)).await.expect("no end").unwrap();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn content_length(head: &str) -> usize {
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("content-length:"));
    line.map_or(0, |line| line.split_once(':').unwrap().1.trim().parse().unwrap())
}

async fn ok(seen: Seen) {
    let mut stream = seen.stream;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK").await.unwrap();
}

fn post(path: &str, body: &str) -> String {
    format!("POST {path} HTTP/1.1\r\nHost: docker\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

const ATTACH: &[u8] =
    b"POST /containers/x/attach?stdin=1 HTTP/1.1\r\nHost: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n";
const UPGRADED: &[u8] =
    b"HTTP/1.1 101 UPGRADED\r\nContent-Type: application/vnd.docker.raw-stream\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n";

#[tokio::test]
async fn before_the_engine_is_up_the_answer_is_503_with_a_message() {
    let fixture = Fixture::gate(Isolation::On);
    let mut client = fixture.client().await;
    client.write_all(b"GET /_ping HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n").await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
    assert!(answer.contains(r#"{"message":"The Docker engine"#) || answer.contains(r#"{"message":"the Docker engine"#));
}

#[tokio::test]
async fn an_answer_streams_before_it_is_complete() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        let first = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        seen.stream.write_all(first).await.unwrap();
        // Never ends by itself.
        let _ = seen.stream.read_to_end(&mut seen.rest).await;
    });
    let mut client = fixture.client().await;
    client.write_all(b"GET /events HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
    let (_, rest, mut client) = read_head(client).await;
    assert_eq!(read_exactly(&mut client, rest, 10).await, b"5\r\nfirst\r\n");
}

#[tokio::test]
async fn stdin_ends_on_its_own_and_output_goes_on() {
    const MANY: usize = 4 * 1024 * 1024;
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        assert!(seen.head.to_ascii_lowercase().contains("upgrade: tcp"), "{}", seen.head);
        // Output right behind the head must not be lost.
        seen.stream.write_all(&[UPGRADED, b"early"].concat()).await.unwrap();
        let mut input = seen.rest;
        timeout(SOON, seen.stream.read_to_end(&mut input)).await.expect("stdin has no end").unwrap();
        assert_eq!(input.len(), MANY);
        seen.stream.write_all(&input).await.unwrap();
    });
    let mut client = fixture.client().await;
    client.write_all(ATTACH).await.unwrap();
    let (head, rest, client) = read_head(client).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.to_ascii_lowercase().contains("application/vnd.docker.raw-stream"), "{head}");
    let sent: Vec<u8> = (0..MANY).map(|at| (at % 251) as u8).collect();
    let (mut reader, mut writer) = client.into_split();
    writer.write_all(&sent).await.unwrap();
    writer.shutdown().await.unwrap();
    let mut got = rest;
    timeout(SOON, reader.read_to_end(&mut got)).await.expect("output has no end").unwrap();
    assert_eq!(&got[..5], b"early");
    assert!(got[5..] == sent[..], "{} bytes came back", got.len());
}

#[tokio::test]
async fn output_ends_on_its_own_and_stdin_goes_on() {
    let (done, finished) = oneshot::channel();
    let done = std::sync::Mutex::new(Some(done));
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(move |mut seen| {
        let done = done.lock().unwrap().take().unwrap();
        async move {
            seen.stream.write_all(&[UPGRADED, b"bye"].concat()).await.unwrap();
            seen.stream.shutdown().await.unwrap();
            let mut input = seen.rest;
            seen.stream.read_to_end(&mut input).await.unwrap();
            done.send(input).unwrap();
        }
    });
    let mut client = fixture.client().await;
    client.write_all(ATTACH).await.unwrap();
    let (_, rest, mut client) = read_head(client).await;
    let mut output = rest;
    timeout(SOON, client.read_to_end(&mut output)).await.unwrap().unwrap();
    assert_eq!(output, b"bye");
    client.write_all(b"late input").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(timeout(SOON, finished).await.unwrap().unwrap(), b"late input");
}

#[tokio::test]
async fn an_engine_that_closed_ends_the_connection_of_a_client_that_does_not() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        seen.stream.write_all(&[UPGRADED, b"bye"].concat()).await.unwrap();
    });
    let mut client = fixture.client().await;
    client.write_all(ATTACH).await.unwrap();
    let (_, mut output, mut client) = read_head(client).await;
    timeout(SOON, client.read_to_end(&mut output)).await.unwrap().unwrap();
    assert_eq!(output, b"bye");
    let refused = async { while client.write_all(b"more").await.is_ok() {} };
    timeout(SOON, refused).await.expect("the gate still takes input");
}

#[tokio::test]
async fn output_is_whole_even_if_the_engine_closes_without_taking_the_input() {
    const MANY: usize = 2 * 1024 * 1024;
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        seen.stream.write_all(UPGRADED).await.unwrap();
        seen.stream.write_all(&vec![7; MANY]).await.unwrap();
    });
    let mut client = fixture.client().await;
    client.write_all(ATTACH).await.unwrap();
    let (_, mut output, client) = read_head(client).await;
    let (mut reader, mut writer) = client.into_split();
    tokio::spawn(async move { while writer.write_all(&[1; 4096]).await.is_ok() {} });
    while timeout(SOON, reader.read_buf(&mut output)).await.expect("no end").is_ok_and(|read| read > 0) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(output.len(), MANY);
}

#[tokio::test]
async fn input_sent_together_with_the_request_is_not_lost() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        seen.stream.write_all(UPGRADED).await.unwrap();
        let mut input = seen.rest;
        seen.stream.read_to_end(&mut input).await.unwrap();
        seen.stream.write_all(&input).await.unwrap();
    });
    let mut client = fixture.client().await;
    client.write_all(&[ATTACH, b"early input"].concat()).await.unwrap();
    client.shutdown().await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(answer.ends_with("\r\n\r\nearly input"), "{answer}");
}

#[tokio::test]
async fn input_behind_the_body_of_an_exec_is_not_lost() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        let length = content_length(&seen.head);
        let body = read_exactly(&mut seen.stream, seen.rest, length).await;
        assert_eq!(&body[..length], br#"{"Tty":true}"#);
        seen.stream.write_all(UPGRADED).await.unwrap();
        let mut input = body[length..].to_vec();
        seen.stream.read_to_end(&mut input).await.unwrap();
        seen.stream.write_all(&input).await.unwrap();
    });
    let mut client = fixture.client().await;
    let request = post("/exec/x/start", r#"{"Tty":true,"Later":1}"#)
        .replace("Host: docker\r\n", "Host: docker\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n");
    client.write_all(&[request.as_bytes(), b"early input"].concat()).await.unwrap();
    client.shutdown().await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(answer.ends_with("\r\n\r\nearly input"), "{answer}");
}

#[tokio::test]
async fn a_dead_client_ends_the_engines_side_of_a_hijacked_connection() {
    let (done, finished) = oneshot::channel();
    let done = std::sync::Mutex::new(Some(done));
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(move |mut seen| {
        let done = done.lock().unwrap().take().unwrap();
        async move {
            seen.stream.write_all(UPGRADED).await.unwrap();
            while seen.stream.write_all(&[0; 4096]).await.is_ok() {}
            done.send(()).unwrap();
        }
    });
    let mut client = fixture.client().await;
    client.write_all(ATTACH).await.unwrap();
    let (_, _, client) = read_head(client).await;
    drop(client);
    timeout(SOON, finished).await.expect("the engine writes to a client that is gone").unwrap();
}

#[tokio::test]
async fn a_raw_answer_without_upgrade_is_not_chunked() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        let raw = b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.raw-stream\r\n\r\nplain output";
        seen.stream.write_all(raw).await.unwrap();
    });
    let mut client = fixture.client().await;
    client.write_all(post("/exec/x/start", "{}").as_bytes()).await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(answer.ends_with("\r\n\r\nplain output"), "{answer}");
}

#[tokio::test]
async fn a_client_that_closed_its_sending_half_still_gets_a_slow_answer() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|seen| async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        ok(seen).await;
    });
    let mut client = fixture.client().await;
    client.write_all(b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n").await.unwrap();
    client.shutdown().await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(answer.ends_with("OK"), "{answer}");
}

#[tokio::test]
async fn a_socket_mount_is_refused_before_the_engine_and_the_connection_goes_on() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(ok);
    let mut client = fixture.client().await;
    let body = r#"{"Image":"alpine","HostConfig":{"Binds":["/var/run/docker.sock:/var/run/docker.sock"]}}"#;
    client.write_all(post("/v1.45/containers/create", body).as_bytes()).await.unwrap();
    let (head, rest, mut client) = read_head(client).await;
    assert!(head.starts_with("HTTP/1.1 403 "), "{head}");
    let answer: serde_json::Value =
        serde_json::from_slice(&read_exactly(&mut client, rest, content_length(&head)).await).unwrap();
    assert_eq!(
        answer["message"],
        "enhanced container isolation: docker socket mount denied for container with image \
         \"docker.io/library/alpine\"; image is not in the allowed list; if you wish to allow it, configure the docker \
         socket image list in the Docker Desktop settings."
    );
    assert_eq!(fixture.requests.load(Ordering::SeqCst), 0);
    client.write_all(b"GET /_ping HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\r\n").await.unwrap();
    assert!(read_to_end(&mut client).await.ends_with("OK"));
}

#[tokio::test]
async fn create_reaches_the_engine_with_the_isolating_runtime_and_its_length() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        let length = content_length(&seen.head);
        let body = read_exactly(&mut seen.stream, seen.rest, length).await;
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        seen.stream.write_all(&[answer.as_bytes(), &body].concat()).await.unwrap();
    });
    // Chunked, as clients that do not know the length send it.
    let request = "POST /containers/%63reate?name=x HTTP/1.1\r\nHost: d\r\nConnection: close\r\n\
                   Transfer-Encoding: chunked\r\n\r\n25\r\n{\"HostConfig\":{\"Runtime\":\"runc\"},\"a\":\r\n2\r\n1}\r\n0\r\n\r\n";
    let mut client = fixture.client().await;
    client.write_all(request.as_bytes()).await.unwrap();
    let answer = read_to_end(&mut client).await;
    assert!(answer.ends_with("\r\n\r\n{\"HostConfig\":{\"Runtime\":\"sysbox-runc\"}}"), "{answer}");
}

#[tokio::test]
async fn without_isolation_create_passes_unchanged() {
    let fixture = Fixture::gate(Isolation::Off);
    let body = r#"{"HostConfig":{"Runtime":"runc","Binds":["/run/docker.sock:/x"]}}"#;
    fixture.engine(move |mut seen| async move {
        assert_eq!(read_exactly(&mut seen.stream, seen.rest, body.len()).await, body.as_bytes());
        seen.stream.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n").await.unwrap();
    });
    let client = fixture.client().await;
    let mut client = client;
    client.write_all(post("/containers/create", body).as_bytes()).await.unwrap();
    assert!(read_head(client).await.0.starts_with("HTTP/1.1 201 "));
}

#[tokio::test]
async fn a_refused_upgrade_does_not_open_a_way_around_the_policy() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        assert!(seen.head.contains("/attach"), "{}", seen.head);
        seen.stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        let mut more = Vec::new();
        seen.stream.read_to_end(&mut more).await.unwrap();
        assert!(more.is_empty(), "{:?}", String::from_utf8_lossy(&more));
    });
    let mut client = fixture.client().await;
    client.write_all(ATTACH).await.unwrap();
    let (head, _, mut client) = read_head(client).await;
    assert!(head.starts_with("HTTP/1.1 404 "), "{head}");
    let body = r#"{"Image":"alpine","HostConfig":{"Binds":["/run/docker.sock:/x"]}}"#;
    // The connection may be kept or closed, but the mount must not pass.
    let _ = client.write_all(post("/containers/create", body).as_bytes()).await;
    let answer = tokio::time::timeout(Duration::from_secs(1), client.read_u8()).await;
    drop(answer);
    assert_eq!(fixture.requests.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_body_too_long_to_inspect_is_refused_while_the_client_is_still_sending() {
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(ok);
    let mut stream = fixture.client().await;
    let body = vec![b' '; 8 << 20];
    let head = format!("POST /containers/create HTTP/1.1\r\nHost: d\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all(head.as_bytes()).await.unwrap();
    timeout(SOON, stream.write_all(&body)).await.expect("it is not taken").expect("the connection was closed");
    let mut answer = [0; 12];
    timeout(SOON, stream.read_exact(&mut answer)).await.expect("no answer").unwrap();
    assert_eq!(&answer, b"HTTP/1.1 413");
    assert_eq!(fixture.requests.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn long_uploads_and_downloads_stream_byte_exact() {
    const MANY: usize = 16 * 1024 * 1024;
    let fixture = Fixture::gate(Isolation::On);
    fixture.engine(|mut seen| async move {
        let body = read_exactly(&mut seen.stream, seen.rest, MANY).await;
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {MANY}\r\nConnection: close\r\n\r\n");
        seen.stream.write_all(head.as_bytes()).await.unwrap();
        seen.stream.write_all(&body).await.unwrap();
    });
    let (mut reader, mut writer) = fixture.client().await.into_split();
    let sent: Vec<u8> = (0..MANY).map(|at| (at % 253) as u8).collect();
    let copy = sent.clone();
    tokio::spawn(async move {
        let head = format!("POST /images/load HTTP/1.1\r\nHost: d\r\nContent-Length: {MANY}\r\n\r\n");
        writer.write_all(head.as_bytes()).await.unwrap();
        writer.write_all(&copy).await.unwrap();
        // Held open, so that only the framing of the response ends it.
        tokio::time::sleep(SOON).await;
    });
    let mut got = Vec::new();
    timeout(SOON, reader.read_to_end(&mut got)).await.unwrap().unwrap();
    assert!(got.ends_with(&sent), "{} bytes came back", got.len());
}

/// Numbers that are the same in each run.
struct Numbers(u32);

impl Numbers {
    fn below(&mut self, end: u32) -> u32 {
        self.0 = self.0.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (self.0 >> 8) % end
    }

    /// Waits for a moment, sometimes.
    async fn pause(&mut self) {
        match self.below(4) {
            0 => tokio::time::sleep(Duration::from_micros(self.below(3000).into())).await,
            1 => tokio::task::yield_now().await,
            _ => {}
        }
    }
}

const CONTAINER: &[u8] =
    br#"{"Id":"abababababababababababababababababababababababababababababababab","Mounts":[],"HostConfig":{}}"#;

/// The engine's side of `docker run`: the responses come in pieces, and the connection ends early or late.
async fn play_engine(mut seen: Seen, mut numbers: Numbers) {
    let chunked = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    let pieces: &[&[u8]] = match seen.head.split(' ').nth(1).unwrap() {
        "/containers/x/attach?stdin=1" => &[&UPGRADED[..20], &UPGRADED[20..], b"out", b"put"],
        "/containers/x/wait" => &[chunked, b"11\r\n{\"StatusCode\"", b": 0}\r\n0\r\n\r\n"],
        // The gate asks for the mounts before a start.
        "/containers/x/json" => &[b"HTTP/1.1 200 OK\r\nContent-Length: 101\r\n\r\n", CONTAINER],
        _ => &[b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n", b"OK"],
    };
    for piece in pieces {
        numbers.pause().await;
        seen.stream.write_all(piece).await.unwrap();
    }
    numbers.pause().await;
    if numbers.below(2) == 0 {
        let mut rest = Vec::new();
        let _ = seen.stream.read_to_end(&mut rest).await;
    }
}

/// The requests of `docker run`: one connection for several requests, one for the output, one for the exit code.
async fn play_client(path: PathBuf, mut numbers: Numbers) {
    let mut first = connect(&path).await;
    for request in ["/containers/x/pause", "/containers/x/start", "/containers/x/start"] {
        numbers.pause().await;
        first.write_all(post(request, "").as_bytes()).await.unwrap();
        let (head, rest, stream) = read_head(first).await;
        first = stream;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert_eq!(read_exactly(&mut first, rest, 2).await, b"OK");
    }
    let mut waiting = connect(&path).await;
    waiting.write_all(post("/containers/x/wait", "").as_bytes()).await.unwrap();
    let mut attached = connect(&path).await;
    attached.write_all(ATTACH).await.unwrap();
    // Without stdin docker closes the sending half, usually after the response.
    let early = numbers.below(4) == 0;
    if early {
        attached.shutdown().await.unwrap();
    }
    let (head, rest, mut attached) = read_head(attached).await;
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    numbers.pause().await;
    if !early {
        attached.shutdown().await.unwrap();
    }
    let output = String::from_utf8(rest).unwrap() + &read_to_end(&mut attached).await;
    assert_eq!(output, "output");
    let (_, mut rest, mut waiting) = read_head(waiting).await;
    while !rest.ends_with(b"0\r\n\r\n") {
        assert!(timeout(SOON, waiting.read_buf(&mut rest)).await.expect("no end").unwrap() > 0);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn no_request_of_many_runs_at_once_stands_still() {
    let fixture = Fixture::gate(Isolation::On);
    let seeds = AtomicUsize::new(0);
    fixture.engine(move |seen| play_engine(seen, Numbers(seeds.fetch_add(1, Ordering::Relaxed) as u32)));
    for round in 0..40 {
        let runs: Vec<_> =
            (0..16).map(|run| tokio::spawn(play_client(fixture.path("gate"), Numbers(round * 100 + run)))).collect();
        for run in runs {
            run.await.unwrap();
        }
    }
}
