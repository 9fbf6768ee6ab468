//! The VM's network from inside of containers. `scripts/test` runs this suite where there is a KVM that runs Linux
//! guests; `BULKHEAD_TEST_IMAGES` names the directory that `tests/images/build` prints.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod bulk;
mod compose;
mod ports;
mod with_settings;
mod with_two_machines;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    path::Path,
    process::Command,
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use support::{
    engine::{Engine, ISOLATION, home, turn},
    ports::free,
    process::{COMMAND, Ran, poll, run},
    registry::Registry,
};

/// The emulated machine has it. Only there do tests change files of the whole machine.
const THROW_AWAY_MACHINE: &str = "/etc/kvm-host";

/// Returns whether this machine may be given network devices; says so where it may not.
fn takes_network_devices() -> bool {
    let takes = Path::new(THROW_AWAY_MACHINE).is_dir() && nix::unistd::geteuid().is_root();
    if !takes {
        println!("left out: this machine is not to be given network devices");
    }
    takes
}

/// Runs ip(8) with these arguments.
#[track_caller]
fn ip(arguments: &str) -> Ran {
    let mut command = Command::new("ip");
    command.args(arguments.split_whitespace());
    run(command, COMMAND)
}

/// Time for a command that moves much data or waits for another.
const LONG: Duration = Duration::from_secs(300);

/// Standard output of a verb that must succeed.
#[track_caller]
fn bulkhead(arguments: &[&str]) -> String {
    home().bulkhead(arguments, LONG).ok()
}

fn status() -> serde_json::Value {
    home().status()
}

fn docker(arguments: &[&str]) -> Ran {
    run(home().docker_command(arguments), LONG)
}

/// Standard output of a docker command that must succeed.
#[track_caller]
fn done(arguments: &[&str]) -> String {
    docker(arguments).ok()
}

/// The output of a shell in a new container.
fn shell(script: &str) -> String {
    let ran = docker(&["run", "--rm", "alpine", "sh", "-c", script]);
    ran.stdout + &ran.stderr
}

/// Sends MiB of zeros from a new container and returns the answer that comes after their end.
///
/// busybox's nc sends 1 KiB at a time, which takes minutes in the emulated machine.
#[track_caller]
fn send_zeros(host: &str, port: u16, mib: usize) -> String {
    let script = format!(
        "$s = IO::Socket::INET->new('{host}:{port}') or die; $b = qq(\\0) x (1 << 20);
         for (1..{mib}) {{ print $s $b or die }} $s->shutdown(1); print <$s>"
    );
    done(&["run", "--rm", "debian", "perl", "-MIO::Socket::INET", "-e", &script])
}

/// The shared engine with its usual settings and the images of this suite.
#[track_caller]
fn engine() -> Engine {
    engine_with(&[])
}

/// The shared engine with other settings.
#[track_caller]
fn engine_with(settings: &[(&str, &str)]) -> Engine {
    let engine = support::engine::engine_with(settings);
    engine.need_image("debian:latest", "debian.tar");
    engine
}

/// Serves each connection on the loopback with `serve`; the port.
fn serve(serve: impl Fn(TcpStream) + Send + 'static) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || listener.incoming().flatten().for_each(serve));
    port
}

/// An HTTP server with one file.
fn http(body: Vec<u8>) -> u16 {
    serve(move |mut stream| {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        while reader.read_line(&mut line).is_ok_and(|len| len > 2) {
            line.clear();
        }
        let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
        let _ = stream.write_all(&body);
    })
}

fn digest(data: &[u8]) -> String {
    Sha256::digest(data).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state
    };
    std::iter::repeat_with(|| next().to_le_bytes()).take(len / 4).flatten().collect()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn sixty_four_mib_arrive_byte_exact_from_a_service_on_the_hosts_loopback() {
    let _engine = engine();
    let body = pattern(64 << 20);
    let expected = digest(&body);
    let port = http(body);
    let begun = Instant::now();
    let printed = shell(&format!("wget -qO- http://host.docker.internal:{port}/ | sha256sum"));
    println!("64 MiB to a container in {:.1?}", begun.elapsed());
    assert_eq!(printed, format!("{expected}  -\n"));
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn sixty_four_mib_leave_byte_exact_and_the_answer_comes_after_their_end() {
    let _engine = engine();
    let port = serve(|mut stream| {
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 16]);
        loop {
            match stream.read(&mut buffer) {
                Ok(len) if len > 0 => hash.update(&buffer[..len]),
                _ => break,
            }
        }
        let text = hash.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        let _ = stream.write_all(text.as_bytes());
    });
    let begun = Instant::now();
    let printed = send_zeros("host.docker.internal", port, 64);
    println!("64 MiB from a container in {:.1?}", begun.elapsed());
    assert_eq!(printed, digest(&vec![0; 64 << 20]));
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_hosts_loopback_has_no_other_address() {
    let _engine = engine();
    let port = http(b"secret".to_vec());
    // The host's own address on the way out, if it has one.
    let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
    let own = outside.connect("192.0.2.1:9").and_then(|()| outside.local_addr()).map(|address| address.ip());
    let mut addresses: Vec<IpAddr> =
        ["127.0.0.1", "127.1.2.3", "0.0.0.0", "192.168.65.3", "192.168.65.77", "172.17.0.1"]
            .iter()
            .map(|address| address.parse().unwrap())
            .collect();
    addresses.extend(own.into_iter().filter(|address| !address.is_loopback()));
    assert_eq!(shell(&format!("wget -T 10 -qO- http://host.docker.internal:{port}/")), "secret");
    assert_eq!(shell(&format!("wget -T 10 -qO- http://gateway.docker.internal:{port}/")), "secret");
    for address in addresses {
        let printed = shell(&format!("wget -T 5 -qO- http://{address}:{port}/"));
        assert!(printed.starts_with("wget: "), "{address}: {printed}");
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_refused_connection_is_refused_at_once() {
    let _engine = engine();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let printed = shell(&format!("wget -T 60 -qO- http://host.docker.internal:{free}/"));
    assert!(printed.contains("Connection refused"), "{printed}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn datagrams_and_pings_come_back() {
    let _engine = engine();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = socket.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut buffer = [0; 2000];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            buffer[..len].make_ascii_uppercase();
            let _ = socket.send_to(&buffer[..len], from);
        }
    });
    let script = format!("exec 3<>/dev/udp/host.docker.internal/{port}; echo datagram >&3; head -n 1 <&3");
    let ran = docker(&["run", "--rm", "debian", "timeout", "20", "bash", "-c", &script]);
    assert_eq!(ran.stdout, "DATAGRAM\n", "{}", ran.stderr);
    let printed = shell("ping -c 2 host.docker.internal");
    assert!(printed.contains("2 packets received"), "{printed}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn names_are_those_that_the_host_resolves_at_that_moment() {
    let _engine = engine();
    if !Path::new(THROW_AWAY_MACHINE).is_dir() {
        println!("left out: this machine's /etc/resolv.conf is not to be changed");
        return;
    }
    // A server for every name, on an address that only the host reaches.
    let socket = UdpSocket::bind("127.0.0.153:53").unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 512];
        while let Ok((len, from)) = socket.recv_from(&mut buffer) {
            let mut answer = buffer[..len].to_vec();
            let end = 12 + answer[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
            answer.truncate(end);
            answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
            if answer[end - 3] == 1 {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 9, 0, 4, 10, 11, 12, 13]);
            } else {
                answer[7] = 0;
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    let before = fs::read("/etc/resolv.conf").unwrap();
    // As network managers do it: another file under the same name.
    fs::write("/etc/resolv.conf.new", "nameserver 127.0.0.153\n").unwrap();
    fs::rename("/etc/resolv.conf.new", "/etc/resolv.conf").unwrap();
    let printed = shell("nslookup intranet.example.org");
    fs::write("/etc/resolv.conf", before).unwrap();
    assert!(printed.contains("Address: 10.11.12.13"), "{printed}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn an_image_is_pushed_to_and_pulled_from_a_registry_on_the_hosts_loopback() {
    let _engine = engine();
    let directory = tempfile::tempdir().unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let _registry = Registry::serve(directory.path(), SocketAddr::from((Ipv4Addr::LOCALHOST, port)), "");
    let name = format!("host.docker.internal:{port}/alpine");
    let image = done(&["image", "inspect", "--format", "{{.Id}}", "alpine"]);
    done(&["tag", "alpine", &name]);
    done(&["push", &name]);
    done(&["rmi", &name]);
    done(&["rmi", "--force", "alpine"]);
    done(&["pull", &name]);
    assert_eq!(done(&["image", "inspect", "--format", "{{.Id}}", &name]), image);
    assert_eq!(done(&["run", "--rm", &name, "echo", "pulled"]), "pulled\n");
    done(&["tag", &name, "alpine"]);
}

/// The network process of the backend.
fn network_process() -> Option<i32> {
    let backend = status()["backendPid"].as_u64().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).find(|pid: &i32| {
        let parent = format!("\nPPid:\t{backend}\n");
        fs::read_to_string(format!("/proc/{pid}/status")).is_ok_and(|status| status.contains(&parent))
            && fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.split(|byte| *byte == 0).nth(1) == Some(b"net"))
    })
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_killed_network_process_is_replaced_and_the_next_connection_works() {
    let _engine = engine();
    let port = http(b"here".to_vec());
    let fetch = format!("wget -T 20 -qO- http://host.docker.internal:{port}/");
    let killed = network_process().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), nix::sys::signal::Signal::SIGKILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while network_process().is_none_or(|pid| pid == killed) {
        assert!(Instant::now() < deadline, "no new network process");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(shell(&fetch), "here");
    assert_eq!(status()["state"], "running");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn connections_in_sequence_leave_no_descriptors_behind() {
    let _engine = engine();
    let port = serve(|mut stream| {
        let _ = stream.write_all(b"x");
    });
    let open = || fs::read_dir(format!("/proc/{}/fd", network_process().unwrap())).unwrap().count();
    let before = open();
    let printed = shell(&format!("for i in $(seq 200); do nc host.docker.internal {port} </dev/null; done | wc -c"));
    assert_eq!(printed.trim(), "200");
    let deadline = Instant::now() + Duration::from_secs(150);
    // The name server's and UDP's sockets have their time.
    while open() > before + 2 {
        assert!(Instant::now() < deadline, "{} descriptors, {before} before", open());
        thread::sleep(Duration::from_secs(1));
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn without_a_network_the_engine_works_and_nothing_is_reachable() {
    let port = http(b"secret".to_vec());
    let _engine = engine_with(&[("network", "none")]);
    assert!(network_process().is_none(), "there is a network process");
    assert_eq!(shell("echo works"), "works\n");
    let fetched = shell(&format!("wget -T 5 -qO- http://192.168.65.254:{port}/"));
    assert!(fetched.starts_with("wget: "), "{fetched}");
    let published = docker(&["run", "--rm", "--publish", "8080:80", "alpine", "true"]).stderr;
    assert!(published.contains("no port can be published; `bulkhead settings set network user`"), "{published}");
}
