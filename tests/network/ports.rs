//! Published ports, from the host's side.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::*;

pub(crate) const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const HERE6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

/// Time for a port to close after the engine reported the end of its container: a few messages.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// A container, removed at the end.
pub(crate) struct Container(String);

impl Drop for Container {
    fn drop(&mut self) {
        docker(&["rm", "-f", &self.0]);
    }
}

impl Container {
    /// `docker run --detach`, which succeeds.
    pub(crate) fn run(arguments: &[&str]) -> Self {
        Self(done(&[&["run", "--detach"], arguments].concat()).trim().to_owned())
    }

    /// A web server that answers with `name`.
    pub(crate) fn web(name: &str, arguments: &[&str]) -> Self {
        let server = ["alpine", "httpd", "-f", "-p", "80", "-h", "/etc"];
        Self::run(&[&["--hostname", name], arguments, &server].concat())
    }

    /// Its output so far.
    pub(crate) fn output(&self) -> String {
        done(&["logs", &self.0])
    }

    fn address(&self) -> String {
        done(&["inspect", "--format", "{{.NetworkSettings.IPAddress}}", &self.0]).trim().to_owned()
    }

    pub(crate) fn tell(&self, verb: &[&str]) {
        done(&[verb, &[&self.0]].concat());
    }
}

/// Standard error of a command that must fail.
fn refused(arguments: &[&str]) -> String {
    let ran = docker(arguments);
    assert!(!ran.status.success(), "{arguments:?} succeeded");
    ran.stderr
}

pub(crate) fn connect(ip: IpAddr, port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::new(ip, port), Duration::from_secs(10))
}

/// The web server's name.
pub(crate) fn fetch(ip: IpAddr, port: u16) -> String {
    get(ip, port, "/hostname")
}

/// A small file, over one connection that must be accepted at once. httpd itself may need a moment more.
pub(crate) fn get(ip: IpAddr, port: u16, path: &str) -> String {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let stream = connect(ip, port).unwrap_or_else(|error| panic!("{ip} {port}: {error}"));
        match request(stream, path) {
            Ok(body) => return body,
            Err(said) => assert!(Instant::now() < deadline, "{ip} {port}: {said}"),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// The body of an answer, or what came instead.
fn request(mut stream: TcpStream, path: &str) -> Result<String, String> {
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let _ = write!(stream, "GET {path} HTTP/1.0\r\n\r\n");
    let mut answer = String::new();
    let result = stream.read_to_string(&mut answer);
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.trim().to_owned());
    body.ok_or_else(|| format!("{result:?} {answer:?}"))
}

#[track_caller]
fn assert_gone(port: u16) {
    let deadline = Instant::now() + CLOSE_TIMEOUT;
    for ip in [HERE, HERE6] {
        while connect(ip, port).is_ok() {
            assert!(Instant::now() < deadline, "{ip} {port} still listens");
            thread::sleep(Duration::from_millis(10));
        }
    }
    assert!(published(port).is_empty());
}

/// The rows of `bulkhead ports` for a port.
pub(crate) fn published(port: u16) -> Vec<serde_json::Value> {
    let all: serde_json::Value = serde_json::from_str(&bulkhead(&["ports", "--format", "json"])).unwrap();
    all["ports"].as_array().unwrap().iter().filter(|row| row["hostPort"] == port).cloned().collect()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_port_listens_on_every_address_of_both_kinds_while_its_container_runs() {
    let _engine = engine();
    let port = free(1);
    let web = Container::web("first.example", &["--name", "published", "--publish", &format!("{port}:80")]);
    assert_eq!(fetch(HERE, port), "first.example");
    assert_eq!(fetch(HERE6, port), "first.example");
    let rows = published(port);
    let hosts: Vec<_> = rows.iter().map(|row| row["hostIp"].as_str().unwrap()).collect();
    assert_eq!(hosts, ["0.0.0.0", "::"]);
    let (address, row) = (web.address(), &rows[0]);
    assert_eq!(
        (&row["containerIp"], &row["containerPort"], &row["protocol"]),
        (&address.into(), &80.into(), &"tcp".into())
    );
    let text = bulkhead(&["ports"]);
    let line = text.lines().find(|line| line.starts_with(&format!("0.0.0.0:{port} "))).unwrap();
    assert!(line.ends_with("tcp       published"), "{text}");

    for end in [&["stop", "--time", "0"][..], &["kill"]] {
        web.tell(end);
        assert_gone(port);
        web.tell(&["start"]);
        // At once: no retry.
        drop(connect(HERE, port).unwrap());
        assert_eq!(fetch(HERE, port), "first.example");
    }
    web.tell(&["rm", "--force"]);
    assert_gone(port);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn an_exact_address_is_listened_on_and_no_other_and_udp_comes_back() {
    let _engine = engine();
    let port = free(2);
    let _web = Container::web("exact.example", &["--publish", &format!("127.0.0.1:{port}:80")]);
    assert_eq!(fetch(HERE, port), "exact.example");
    for other in ["127.0.0.2".parse().unwrap(), HERE6] {
        assert_eq!(connect(other, port).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
    // The same port of another address leads to another container.
    let _second = Container::web("second.example", &["--publish", &format!("127.0.0.2:{port}:80")]);
    assert_eq!(fetch("127.0.0.2".parse().unwrap(), port), "second.example");
    assert_eq!(fetch(HERE, port), "exact.example");

    let echo = "my $s = IO::Socket::INET->new(Proto => 'udp', LocalPort => 7) or die; \
                while ($s->recv(my $data, 2000)) { $s->send(uc $data) }";
    let publish = format!("{}:7/udp", port + 1);
    let _echo = Container::run(&["--publish", &publish, "debian", "perl", "-MIO::Socket::INET", "-e", echo]);
    for ip in [HERE, HERE6] {
        let socket = UdpSocket::bind((ip, 0)).unwrap();
        socket.connect((ip, port + 1)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut buffer = [0; 100];
        let answer = (0..30).find_map(|_| {
            let _ = socket.send(b"datagram");
            socket.recv(&mut buffer).ok()
        });
        assert_eq!(answer.map(|len| &buffer[..len]), Some(&b"DATAGRAM"[..]), "{ip}");
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn ranges_and_ports_of_the_engines_choice_are_published() {
    let _engine = engine();
    let first = free(3);
    let range = format!("{first}-{}:79-81", first + 2);
    let web = Container::web("range.example", &["--publish", &range, "--publish", "127.0.0.1::80"]);
    assert_eq!(fetch(HERE, first + 1), "range.example");
    for port in first..first + 3 {
        assert_eq!(published(port).len(), 2, "{port}");
    }
    let told = done(&["port", &web.0, "80/tcp"]);
    let chosen = told.lines().find_map(|line| line.strip_prefix("127.0.0.1:")).unwrap();
    assert_eq!(fetch(HERE, chosen.parse().unwrap()), "range.example");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_port_that_the_host_does_not_give_is_refused_in_the_engines_words() {
    let _engine = engine();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let run = |publish: &str| ["run", "--rm", "--publish", publish, "alpine", "true"].map(ToOwned::to_owned);
    let words = |publish: &str| refused(&run(publish).each_ref().map(String::as_str));
    let message = words(&format!("{port}:80"));
    let expected = format!("listen tcp4 0.0.0.0:{port}: bind: address already in use");
    assert!(
        message.contains(&format!("Error starting userland proxy: {expected}")) || message.contains(&expected),
        "{message}"
    );
    let message = words("192.0.2.1:8080:80");
    assert!(message.contains("listen tcp4 192.0.2.1:8080: bind: cannot assign requested address"), "{message}");
    assert!(published(port).is_empty() && published(8080).is_empty());
    // Once it is free, the next container gets it.
    drop(taken);
    done(&run(&format!("{port}:80")).each_ref().map(String::as_str));
    if nix::unistd::geteuid().is_root() {
        println!("left out: root may listen on every port");
        return;
    }
    let message = words("80:80");
    assert!(message.contains("listen tcp4 0.0.0.0:80: bind: permission denied"), "{message}");
    assert!(message.contains("net.ipv4.ip_unprivileged_port_start=80"), "{message}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_killed_network_process_costs_no_port() {
    let _engine = engine();
    let port = free(1);
    let _web = Container::web("kept.example", &["--publish", &format!("{port}:80")]);
    assert_eq!(fetch(HERE, port), "kept.example");
    let killed = network_process().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), nix::sys::signal::Signal::SIGKILL).unwrap();
    // A client that connects meanwhile waits for the next process.
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut waiting = Vec::new();
    while network_process().is_none_or(|pid| pid == killed) {
        waiting.push(connect(HERE, port).unwrap());
        assert!(Instant::now() < deadline, "no new network process");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(fetch(HERE, port), "kept.example");
    assert_eq!(published(port).len(), 2);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_port_is_reached_from_its_own_bridge_by_the_gateways_address() {
    let _engine = engine();
    let port = free(1);
    let web = Container::web("by-gateway", &["-p", &format!("{port}:80")]);
    assert_eq!(fetch(HERE, port), "by-gateway");
    let gateway = done(&["inspect", "--format", "{{.NetworkSettings.Gateway}}", &web.0]);
    let get = format!("wget -q -T 30 -O - http://{}:{port}/hostname", gateway.trim());
    assert_eq!(shell(&get).trim(), "by-gateway");
    drop(web);
    assert!(shell(&get).contains("refused"), "nothing listens when the container has gone");
}

/// A swarm of this engine alone, left at the end.
struct Swarm;

impl Swarm {
    fn init() -> Self {
        done(&["swarm", "init", "--advertise-addr=127.0.0.1"]);
        Self
    }
}

impl Drop for Swarm {
    fn drop(&mut self) {
        docker(&["swarm", "leave", "--force"]);
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_port_of_the_routing_mesh_is_published_while_its_service_exists() {
    let _engine = engine();
    let one = free(2);
    let two = one + 1;
    let _swarm = Swarm::init();
    let create = |name: &str, port: u16, mode: &str| {
        let publish = format!("--publish=published={port},target=80,mode={mode}");
        let options = ["service", "create", "--detach", "--no-resolve-image"];
        let command = ["alpine", "httpd", "-f", "-p", "80", "-h", "/etc"];
        let named = [format!("--name={name}"), format!("--hostname={name}"), publish];
        let named: Vec<&str> = named.iter().map(String::as_str).collect();
        done(&[&options, &named[..], &command].concat());
    };
    create("mesh", one, "ingress");
    create("task", two, "host");
    for (name, port) in [("mesh", one), ("task", two)] {
        until_answered(name, port);
    }
    done(&["service", "rm", "mesh"]);
    assert_gone(one);
    create("again", one, "ingress");
    // The engine does not leave a swarm in time while it starts a task.
    until_answered("again", one);
    done(&["swarm", "leave", "--force"]);
    assert_gone(one);
}

/// Waits until a service has its port, and then until its task answers there by name.
fn until_answered(name: &str, port: u16) {
    poll("the port is published", LONG, || Some(published(port)).filter(|rows| !rows.is_empty()));
    poll(name, LONG, || {
        let stream = connect(HERE, port).ok()?;
        request(stream, "/hostname").ok().filter(|answer| answer == name)
    });
}
