//! The cost of a request in the gate's own threads: calls of the allocator.
//!
//! Client and engine are threads of their own, which are not counted. The bounds are above what was measured by half, for
//! other versions of the HTTP library; a copy of a body for each of its parts, say, is far beyond them.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests, which may panic")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bulkhead_gate::{Caller, Gate, Isolation, UnixAcceptor, serve_connection};

/// Requests of a kind that are counted together, after a first one.
const REQUESTS: u64 = 100;

const PING: &str = "GET /_ping HTTP/1.1\r\nHost: docker\r\nUser-Agent: Docker-Client/26.1.5 (linux)\r\n\r\n";

/// A body as `docker run -d -p 80:80 -v data:/data --restart always nginx` sends it, less its defaults.
const CREATE: &str = r#"{"Hostname":"","Domainname":"","User":"","AttachStdin":false,"AttachStdout":false,"AttachStderr":false,
"ExposedPorts":{"80/tcp":{}},"Tty":false,"OpenStdin":false,"StdinOnce":false,"Env":["A=1","B=2"],"Cmd":null,"Image":"nginx",
"Volumes":{},"WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":{"a":"b"},"HostConfig":{"Binds":["data:/data"],
"ContainerIDFile":"","LogConfig":{"Type":"","Config":{}},"NetworkMode":"default","PortBindings":{"80/tcp":[{"HostIp":"",
"HostPort":"80"}]},"RestartPolicy":{"Name":"always","MaximumRetryCount":0},"AutoRemove":false,"VolumeDriver":"","VolumesFrom":null,
"ConsoleSize":[24,80],"CapAdd":null,"CapDrop":null,"CgroupnsMode":"","Dns":[],"DnsOptions":[],"DnsSearch":[],"ExtraHosts":null,
"GroupAdd":null,"IpcMode":"","Cgroup":"","Links":null,"OomScoreAdj":0,"PidMode":"","Privileged":false,"PublishAllPorts":false,
"ReadonlyRootfs":false,"SecurityOpt":null,"UTSMode":"","UsernsMode":"","ShmSize":0,"Isolation":"","CpuShares":0,"Memory":0,
"NanoCpus":0,"CgroupParent":"","BlkioWeight":0,"Devices":[],"DeviceCgroupRules":null,"DeviceRequests":null,"MemorySwap":0,
"MemorySwappiness":-1,"OomKillDisable":false,"PidsLimit":0,"Ulimits":[],"MaskedPaths":null,"ReadonlyPaths":null},
"NetworkingConfig":{"EndpointsConfig":{"default":{"IPAMConfig":null,"Links":null,"Aliases":null}}}}"#;

thread_local! {
    /// The thread is one of the gate's.
    static COUNTED: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);

struct Counting;

fn count(size: usize) {
    // A thread that ends has no variables of its own any more.
    if COUNTED.try_with(Cell::get).unwrap_or_default() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(size as u64, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator with its arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as in `alloc`.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Reads a message with a length, and returns false at the end of the connection.
fn read_message(stream: &mut UnixStream) -> bool {
    let mut bytes = Vec::new();
    let mut buffer = [0; 8192];
    loop {
        if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let head = std::str::from_utf8(&bytes[..end]).unwrap().to_ascii_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok()).unwrap_or(0);
            if bytes.len() >= end + 4 + length {
                return true;
            }
        }
        match stream.read(&mut buffer).unwrap() {
            0 => return false,
            read => bytes.extend_from_slice(&buffer[..read]),
        }
    }
}

/// Answers every request of every connection.
fn engine(listener: &UnixListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        while read_message(&mut stream) {
            let answer =
                b"HTTP/1.1 200 OK\r\nApi-Version: 1.45\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nOK";
            stream.write_all(answer).unwrap();
        }
    }
}

/// Runs a gate in a thread of its own.
fn gate(directory: &Path) {
    let gate = Arc::new(Gate::new(directory.join("engine"), Isolation::On));
    let socket = directory.join("gate");
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        COUNTED.set(true);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let acceptor = UnixAcceptor::bind(&socket).unwrap();
            ready.send(()).unwrap();
            loop {
                tokio::spawn(serve_connection(Arc::clone(&gate), acceptor.accept().await, Caller::Host));
            }
        });
    });
    is_ready.recv().unwrap();
}

/// Returns the allocations and bytes of one request, on a connection that has served one before.
fn cost(socket: &Path, request: &str) -> (u64, u64) {
    let mut client = UnixStream::connect(socket).unwrap();
    let mut ask = || {
        client.write_all(request.as_bytes()).unwrap();
        assert!(read_message(&mut client));
    };
    ask();
    let counts = || (ALLOCATIONS.load(Ordering::Relaxed), BYTES.load(Ordering::Relaxed));
    let before = counts();
    for _ in 0..REQUESTS {
        ask();
    }
    let after = counts();
    ((after.0 - before.0) / REQUESTS, (after.1 - before.1) / REQUESTS)
}

#[test]
fn a_request_costs_the_gate_few_allocations() {
    let directory = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(directory.path().join("engine")).unwrap();
    std::thread::spawn(move || engine(&listener));
    gate(directory.path());
    let create = format!(
        "POST /v1.45/containers/create?name=x HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{CREATE}",
        CREATE.len()
    );
    for (name, request, most, most_bytes) in [("ping", PING, 100, 64_000), ("create", create.as_str(), 1000, 200_000)] {
        let (allocations, bytes) = cost(&directory.path().join("gate"), request);
        println!("{name}: {allocations} allocations, {bytes} bytes");
        assert!(allocations > 0 && allocations <= most, "{name}: {allocations} allocations");
        assert!(bytes <= most_bytes, "{name}: {bytes} bytes");
    }
}
