//! Requests that go to dockerd itself, past the gate: what the engine's jail stops by itself.
//!
//! The same engine is asked twice, outside of the jail and in it, so that each attempt is seen to be one.

use std::{
    fs,
    io::{ErrorKind, IoSlice, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixDatagram, UnixListener, UnixStream},
    },
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
        socketpair,
    },
    process::{Pid, Signal, WaitOptions, kill_process, waitpid},
};
use serde_json::{Value, json};

use crate::guest_root::{ALPINE, GuestRoot, INIT};

/// Time for the engine to start, and for one answer: it looks for a plugin for 15 seconds.
const TIMEOUT: Duration = Duration::from_secs(40);

/// The address space of dockerd, which reserves more than it uses.
const ADDRESS_SPACE: &str = "--as=4294967296";

const DOCKERD_SOCKET: &str = "/run/bulkhead/engine/dockerd.sock";
const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// A file of the VM that no client may read, and its contents.
const SECRET: (&str, &str) = ("/run/bulkhead/secret", "a secret of the VM");

/// A directory of the VM that no client may see or remove.
const VICTIM: &str = "/run/bulkhead/victim";

/// The same, where the jail shows it.
const VISIBLE_VICTIM: &str = "/etc/victim";

/// The file that no client may make.
const ESCAPED: &str = "/etc/escaped";

/// A socket of the VM that no client may have dockerd connect to.
const PLUGIN: &str = "/run/bulkhead/plugin.sock";

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn what_a_client_asks_of_the_engine_past_the_gate_finds_nothing_of_the_vm() {
    GuestRoot::with(|_| {
        GuestRoot::leave_network();
        imitate_vm(&json!({}));
        let engine = Engine::start(None);
        let outside = attempts();
        drop(engine);
        for (name, is_open) in &outside {
            assert!(is_open, "{name}: has no effect outside of the jail either");
        }
        imitate_vm(&json!({}));
        let engine = Engine::start(Some(Jailer::start()));
        let inside = attempts();
        drop(engine);
        let open: Vec<_> = inside.iter().filter(|(_, is_open)| *is_open).map(|(name, _)| name).collect();
        assert!(open.is_empty(), "open in the jail: {open:?}");
    });
}

/// Makes the directories, sockets and file systems that init makes, empty, and the engine's configuration, to which
/// `options` of dockerd are added.
pub fn imitate_vm(options: &Value) {
    for path in ["/run", "/var/lib/docker", "/var/lib/containerd"] {
        // Over the one before, on which the other engine's mounts are.
        fs::create_dir_all(path).unwrap();
        mount("vm", path, "tmpfs", MountFlags::empty(), c"mode=0755").unwrap();
        mount_change(path, MountPropagationFlags::SHARED).unwrap();
    }
    for path in [
        "/run/docker",
        "/run/containerd",
        "/run/crun",
        "/run/sysbox-runc",
        "/run/bulkhead/engine",
        "/run/bulkhead/configuration",
        bulkhead_policy::sources::HOST_SERVICES,
        VICTIM,
        VISIBLE_VICTIM,
    ] {
        fs::create_dir_all(path).unwrap();
    }
    for path in ["/run/bulkhead/notify", bulkhead_protocol::PORTS_SOCKET, "/run/bulkhead/handover.sock"] {
        drop(UnixDatagram::bind(path).unwrap());
    }
    fs::write(SECRET.0, SECRET.1).unwrap();
    let _ = fs::remove_file(ESCAPED);
    let mut daemon = json!({
        // The routes of checkpoints need `experimental`.
        "storage-driver": "overlay2", "iptables": false, "bridge": "none", "userland-proxy": false, "experimental": true,
        "exec-opts": ["native.cgroupdriver=cgroupfs"], "features": { "containerd-snapshotter": false, "cdi": false }
    });
    daemon.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
    fs::write("/run/bulkhead/configuration/daemon.json", daemon.to_string()).unwrap();
    let containerd = format!(
        "version = 2\nroot = \"/var/lib/containerd\"\nstate = \"/run/containerd\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{CONTAINERD_SOCKET}\"\n"
    );
    fs::write("/run/bulkhead/configuration/containerd.toml", containerd).unwrap();
}

/// Makes every attempt, and returns which of them reached the VM.
fn attempts() -> Vec<(&'static str, bool)> {
    let plugin = UnixListener::bind(PLUGIN).unwrap();
    plugin.set_nonblocking(true).unwrap();
    // The answer does not matter: nothing speaks behind the socket.
    let driver = std::thread::spawn(|| {
        let volume = json!({ "Name": "plugged", "Driver": "../../bulkhead/plugin" });
        ask("POST", "/volumes/create", volume.to_string().as_bytes(), Duration::from_secs(20))
    });
    // Only this thread has the VM's root.
    let own = rustix::thread::gettid();
    Engine::load_image();
    let reads = |name: &str, bind: &str, path: &str| {
        create(name, bind);
        let (status, body) = must_answer("GET", &format!("/containers/{name}/archive?path={path}"), b"");
        status == 200 && String::from_utf8_lossy(&body).contains(SECRET.1)
    };
    let volume = |name: &str, options: Value| {
        let body = json!({ "Name": name, "Driver": "local", "DriverOpts": options });
        assert_eq!(must_answer("POST", "/volumes/create", body.to_string().as_bytes()).0, 201);
    };
    let layers = json!({ "type": "overlay", "device": "overlay", "o": "lowerdir=/run/bulkhead:/usr/share" });
    volume("layers", layers);
    volume("processes", json!({ "type": "proc", "device": "proc" }));
    let bound = json!({ "type": "none", "device": "/run/bulkhead", "o": "bind" });
    volume("bound", bound);
    let secret_of_process = format!("/m/{own}/root{}", SECRET.0);
    let mut results = vec![
        ("docker cp out of a bind", reads("bind", "/run/bulkhead:/m", "/m/secret")),
        ("docker cp through a process's root", reads("process", "/proc:/m", &secret_of_process)),
        ("docker cp out of a volume of type overlay", reads("overlay", "layers:/m", "/m/secret")),
        ("docker cp out of a volume of type proc", reads("proc", "processes:/m", &secret_of_process)),
        ("docker cp out of a volume that is a bind", reads("volume", "bound:/m", "/m/secret")),
    ];
    create("writer", "/etc:/m");
    must_answer("PUT", "/containers/writer/archive?path=/m", &tar_of(name_of(ESCAPED), ""));
    results.push(("docker cp into a bind", Path::new(ESCAPED).exists()));
    let (_, listed) = must_answer("GET", "/containers/writer/checkpoints?dir=/run/bulkhead", b"");
    results.push(("a list of checkpoints", String::from_utf8_lossy(&listed).contains("victim")));
    for (name, victim) in [("the removal of a checkpoint", VICTIM), ("the same in a visible directory", VISIBLE_VICTIM)]
    {
        let directory = Path::new(victim).parent().unwrap().display();
        must_answer("DELETE", &format!("/containers/writer/checkpoints/victim?dir={directory}"), b"");
        results.push((name, !Path::new(victim).exists()));
    }
    // Repeated attempts of dockerd end with an error if there is no such plugin.
    let is_reached = loop {
        match (plugin.accept(), driver.is_finished()) {
            (Ok(_), _) => break true,
            (Err(_), true) => break false,
            _ => std::thread::sleep(Duration::from_millis(50)),
        }
    };
    results.push(("a volume driver at a socket of the VM", is_reached));
    fs::remove_file(PLUGIN).unwrap();
    results
}

fn name_of(path: &str) -> &str {
    Path::new(path).file_name().unwrap().to_str().unwrap()
}

/// A tar with a file of this name.
pub fn tar_of(name: &str, contents: &str) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join(name), contents).unwrap();
    let output = Command::new("tar").arg("-cC").arg(directory.path()).arg(name).output().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// dockerd and containerd, which end with their owner.
pub struct Engine {
    processes: Vec<Pid>,
    /// The process that made the jail of both.
    jailer: Option<Jailer>,
}

impl Engine {
    pub fn start(jailer: Option<Jailer>) -> Self {
        let containerd = ["/usr/bin/containerd", "--config=/run/bulkhead/configuration/containerd.toml"];
        let host = format!("--host=unix://{DOCKERD_SOCKET}");
        let backend = format!("--containerd={CONTAINERD_SOCKET}");
        let dockerd = [
            // With a fault that takes memory without end it ends, and not this machine.
            "/usr/bin/prlimit",
            ADDRESS_SPACE,
            "/usr/sbin/dockerd",
            "--config-file=/run/bulkhead/configuration/daemon.json",
            &host,
            &backend,
            "--group=root",
            "--pidfile=",
        ];
        let mut engine = Self { processes: Vec::new(), jailer };
        for words in [&containerd[..], &dockerd] {
            let process = if let Some(jailer) = &engine.jailer {
                jailer.spawn(words)
            } else {
                let log = fs::File::create("/run/engine.log").unwrap();
                let mut command = Command::new(words[0]);
                command.args(&words[1..]).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
                Pid::from_child(&command.spawn().unwrap())
            };
            engine.processes.push(process);
        }
        let deadline = Instant::now() + TIMEOUT;
        while ask("GET", "/_ping", b"", TIMEOUT).is_none_or(|(status, _)| status != 200) {
            assert!(Instant::now() < deadline, "dockerd: {}", fs::read_to_string("/run/engine.log").unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
        engine
    }

    /// Has dockerd load the test image.
    pub fn load_image() {
        let (status, answer) = must_answer("POST", "/images/load", &fs::read(ALPINE).unwrap());
        assert_eq!(status, 200, "{}", String::from_utf8_lossy(&answer));
    }

    /// dockerd's process.
    pub fn dockerd(&self) -> Pid {
        self.processes[1]
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for process in self.processes.iter().rev() {
            let _ = kill_process(*process, Signal::KILL);
            let _ = waitpid(Some(*process), WaitOptions::empty());
        }
        drop(self.jailer.take());
    }
}

/// Sends a request to dockerd, which has to answer, and returns the status and the body.
pub fn must_answer(method: &str, path: &str, body: &[u8]) -> (u16, Vec<u8>) {
    ask(method, path, body, TIMEOUT).unwrap_or_else(|| panic!("{method} {path}: no answer"))
}

fn create(name: &str, bind: &str) {
    let body = json!({ "Image": "alpine", "HostConfig": { "Binds": [bind] } });
    let (status, answer) = must_answer("POST", &format!("/containers/create?name={name}"), body.to_string().as_bytes());
    assert_eq!(status, 201, "{name}: {}", String::from_utf8_lossy(&answer));
}

/// Sends a request to dockerd, and returns the status and the body; `None` without an answer within `limit`.
fn ask(method: &str, path: &str, body: &[u8], limit: Duration) -> Option<(u16, Vec<u8>)> {
    let mut stream = UnixStream::connect(DOCKERD_SOCKET).ok()?;
    stream.set_read_timeout(Some(limit)).unwrap();
    // With HTTP/1.0 the answer ends with the connection.
    let head = format!(
        "{method} {path} HTTP/1.0\r\nHost: d\r\nContent-Type: application/{}\r\nContent-Length: {}\r\n\r\n",
        if body.first() == Some(&b'{') { "json" } else { "x-tar" },
        body.len()
    );
    stream.write_all(head.as_bytes()).ok()?;
    // An answer that comes before the body's end is an answer as well.
    let _ = stream.write_all(body);
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => return None,
        _ => {}
    }
    let end = answer.windows(4).position(|window| window == b"\r\n\r\n")?;
    let status = std::str::from_utf8(&answer[..end]).ok()?.split(' ').nth(1)?.parse().ok()?;
    Some((status, answer.split_off(end + 4)))
}

/// init's own program as the jailer, and the socket over which init has services started.
pub struct Jailer {
    process: Child,
    socket: OwnedFd,
}

impl Jailer {
    fn start() -> Self {
        let flags = SocketFlags::CLOEXEC;
        let (socket, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let mut command = Command::new(INIT);
        let process = command.arg("jail").env_clear().stdin(Stdio::from(theirs)).spawn().unwrap();
        drop(command);
        let jailer = Self { process, socket };
        assert_eq!(jailer.receive(), json!("Ready"));
        jailer
    }

    fn receive(&self) -> Value {
        let mut packet = [0; 4096];
        let length = rustix::io::read(&self.socket, &mut packet).unwrap();
        assert_ne!(length, 0, "the jailer has ended");
        serde_json::from_slice(&packet[..length]).unwrap()
    }

    fn spawn(&self, words: &[&str]) -> Pid {
        let request = json!({
            "words": words, "environment": [["PATH", "/usr/sbin:/usr/bin"], ["HOME", "/root"]], "all_capabilities": true
        });
        let log = fs::File::create("/run/engine.log").unwrap();
        // In the place of a cgroup's list of processes.
        let null = fs::File::options().write(true).open("/dev/null").unwrap();
        let descriptors = [log.as_fd(), null.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut rights = SendAncillaryBuffer::new(&mut space);
        assert!(rights.push(SendAncillaryMessage::ScmRights(&descriptors)));
        let text = request.to_string();
        sendmsg(&self.socket, &[IoSlice::new(text.as_bytes())], &mut rights, SendFlags::empty()).unwrap();
        let answer = self.receive();
        let pid = answer["Started"].as_i64().unwrap_or_else(|| panic!("{answer}"));
        Pid::from_raw(pid.try_into().unwrap()).unwrap()
    }
}

impl Drop for Jailer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
