//! Settings of the network, proxies, certificates and other backends of the network device.
//!
//! Each test needs a start of its own. The module's name sorts them behind the tests with the usual settings, which
//! share one.

use std::{ffi::OsStr, io::Read, net::Ipv4Addr, path::PathBuf, sync::Arc};

use support::engine::{Isolation, START, STOP};

use super::{
    ports::{Container, HERE, connect, fetch, get, published},
    *,
};

/// Stops an engine that was started with options, which the next test's must not have.
struct Started(Engine);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.home.bulkhead(&["stop"], STOP);
    }
}

/// Starts the engine with settings, variables and options; returns with it what `start` wrote to standard error.
fn start(settings: &[(&str, &str)], environment: &[(&str, &OsStr)], options: &[&str]) -> (Started, String) {
    let engine = turn();
    engine.home.bulkhead(&["stop"], STOP).ok();
    engine.write_settings(settings);
    let mut command = engine.home.command(support::program());
    command.envs(environment.iter().copied()).args(["start", "--timeout", "220"]).args(options);
    let ran = run(command, START);
    assert!(ran.status.success(), "{}", ran.stderr);
    for (name, file) in [("alpine:latest", "alpine.tar"), ("debian:latest", "debian.tar")] {
        engine.need_image(name, file);
    }
    let started = Started(engine);
    (started, ran.stderr)
}

/// This machine's address on the way out, if it has one.
fn own_address() -> Option<Ipv4Addr> {
    let outside = UdpSocket::bind("0.0.0.0:0").unwrap();
    match outside.connect("192.0.2.1:9").and_then(|()| outside.local_addr()).ok()?.ip() {
        IpAddr::V4(address) if !address.is_loopback() => Some(address),
        _ => None,
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_port_is_back_after_the_engine_crashed() {
    // Only without isolation does a container see the processes of the VM.
    let _engine = engine_with(&[(ISOLATION, "false")]);
    let port = free(1);
    let _web = Container::web("again.example", &["--restart", "always", "--publish", &format!("{port}:80")]);
    assert_eq!(fetch(HERE, port), "again.example");
    let crash = ["run", "--rm", "--privileged", "--pid=host", "alpine", "sh", "-c", "kill -9 $(pidof dockerd)"];
    docker(&crash);
    let deadline = Instant::now() + Duration::from_secs(300);
    while status()["state"] != "running" || published(port).len() != 2 {
        assert!(Instant::now() < deadline, "{}", status());
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(fetch(HERE, port), "again.example");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_port_of_the_vm_is_published_without_isolation_and_again_after_a_restart() {
    let engine = engine_with(&[(ISOLATION, "false")]);
    let port = free(3);
    let server = ["--network=host", "--restart=always", "alpine", "httpd", "-f", "-p", "8099", "-h", "/etc"];
    let _web = Container::run(&server);
    assert!(connect(HERE, port).is_err());
    let wanted = format!("{port}:8099");
    bulkhead(&["ports", "publish", &wanted]);
    let name = get(HERE, port, "/hostname");
    let rows = published(port);
    assert!(rows.len() == 2 && rows.iter().all(|row| row["ofVm"] == true && row["containerPort"] == 8099), "{rows:?}");
    assert!(bulkhead(&["ports"]).contains("(the VM)"));
    // One that another program has is refused, and the list stays as it was.
    let taken = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port + 1)).unwrap();
    let refused = engine.home.bulkhead(&["ports", "publish", &format!("{}:8099", port + 1)], START);
    assert!(refused.stderr.contains("bind: address already in use"), "{refused:?}");
    assert_eq!(bulkhead(&["settings", "get", "vmPorts"]).trim(), format!("{wanted}/tcp"));
    // One that is on the list all the same keeps no other from being published.
    let another = format!("{}:8099", port + 2);
    bulkhead(&["settings", "set", "vmPorts", &format!("{wanted},{}:8099", port + 1)]);
    let published_beside = engine.home.bulkhead(&["ports", "publish", &another], START);
    assert!(published_beside.stderr.contains("warning: "), "{published_beside:?}");
    published_beside.ok();
    assert_eq!(get(HERE, port + 2, "/hostname"), name);
    bulkhead(&["ports", "unpublish", &another, &format!("{}:8099", port + 1)]);
    drop(taken);
    engine.restart();
    assert_eq!(get(HERE, port, "/hostname"), name);
    bulkhead(&["ports", "unpublish", &wanted]);
    assert!(connect(HERE, port).is_err() && published(port).is_empty());
}

/// Settings of two tests, so that they share a start.
const TWO_TESTS: [(&str, &str); 2] =
    [("vpnkitCIDR", "10.77.0.0/20"), ("portBindingBehavior", "local-only-port-binding")];

/// Fetches from a service on the host's loopback and returns the digest and the messages.
fn fetch_digest(name: &str, port: u16) -> String {
    shell(&format!("wget -T 5 -qO- http://{name}:{port}/ | sha256sum"))
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn other_addresses_of_the_guests_network_are_in_force() {
    let body = pattern(1 << 20);
    let (expected, port) = (digest(&body), http(body));
    let _engine = engine_with(&TWO_TESTS);
    assert!(fetch_digest("host.docker.internal", port).contains(&expected));
    assert!(fetch_digest("10.77.15.254", port).contains(&expected));
    assert!(fetch_digest("192.168.65.254", port).contains(&digest(b"")));
    let printed = shell("ping -c 1 10.77.0.3");
    assert!(printed.contains("1 packets received"), "{printed}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_hosts_loopback_closes_with_its_setting() {
    let port = http(pattern(1 << 20));
    let _engine = engine_with(&[("vpnkitCIDR", "10.78.0.0/24"), ("hostLoopback", "false")]);
    for name in ["host.docker.internal", "gateway.docker.internal", "10.78.0.254", "10.78.0.1"] {
        let printed = fetch_digest(name, port);
        assert!(printed.contains(&digest(b"")) && printed.contains("wget: "), "{name}: {printed}");
    }
    // The name server is not a service of the loopback.
    let printed = shell("nslookup -type=a localhost 10.78.0.1 || true");
    assert!(printed.contains("10.78.0.1"), "{printed}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn ports_are_published_on_the_hosts_loopback_only_when_the_settings_say_so() {
    let _engine = engine_with(&TWO_TESTS);
    done(&["network", "create", "loopback-only"]);
    let port = free(4);
    let publish = [format!("{port}:80"), format!("0.0.0.0:{}:80", port + 1), format!("[::]:{}:80", port + 2)];
    let mut run = vec!["run", "-d", "--name=loopback-default"];
    run.extend(publish.iter().flat_map(|publish| ["--publish", publish]));
    run.extend(["alpine", "sleep", "600"]);
    done(&run);
    let own = format!("{}:80", port + 3);
    let run = ["run", "-d", "--name=loopback-own", "--network=loopback-only", "--publish", &own];
    done(&[&run[..], &["alpine", "sleep", "600"]].concat());
    let listens = bulkhead(&["ports"]);
    for (at, address) in ["127.0.0.1", "127.0.0.1", "[::1]", "127.0.0.1"].iter().enumerate() {
        let line = format!("{address}:{} ", usize::from(port) + at);
        assert!(listens.lines().any(|row| row.starts_with(&line)), "{line}: {listens}");
    }
    assert_eq!(listens.lines().filter(|row| row.contains("loopback-")).count(), 4, "{listens}");
    // Without an address the engine knows where it is; one that is named is what the engine shows.
    for (name, shown) in [("loopback-default", port), ("loopback-own", port + 3)] {
        assert!(done(&["port", name]).lines().any(|line| line.ends_with(&format!(" 127.0.0.1:{shown}"))), "{name}");
    }
    done(&["rm", "--force", "loopback-default", "loopback-own"]);
    done(&["network", "rm", "loopback-only"]);
}

/// An HTTP proxy that demands a name and a password and notes the requests.
fn proxy(credentials: &'static str) -> (u16, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&asked);
    let port = serve(move |mut client| {
        let noted = Arc::clone(&noted);
        thread::spawn(move || {
            let mut reader = BufReader::new(client.try_clone().unwrap());
            let (mut request, mut line, mut allowed) = (String::new(), String::new(), false);
            reader.read_line(&mut request).unwrap();
            while reader.read_line(&mut line).is_ok_and(|len| len > 2) {
                allowed |= line.trim_end().eq_ignore_ascii_case(&format!("proxy-authorization: basic {credentials}"));
                line.clear();
            }
            noted.lock().unwrap().push(request.trim_end().to_owned());
            let target = request.split(' ').nth(1).unwrap_or_default().to_owned();
            if !allowed || !request.starts_with("CONNECT ") {
                let _ = write!(client, "HTTP/1.1 407 no\r\nProxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n");
                return;
            }
            let Ok(mut server) = TcpStream::connect(target) else { return };
            write!(client, "HTTP/1.1 200 connected\r\n\r\n").unwrap();
            let (mut from, mut to) = (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(std::net::Shutdown::Write);
            });
            let _ = std::io::copy(&mut reader, &mut server);
            let _ = server.shutdown(std::net::Shutdown::Write);
        });
    });
    (port, asked)
}

/// A registry with a certificate of a private authority, on this machine's own address.
struct PrivateRegistry {
    _registry: Registry,
    directory: tempfile::TempDir,
    place: String,
}

impl PrivateRegistry {
    fn start(address: Ipv4Addr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let port = TcpListener::bind((address, 0)).unwrap().local_addr().unwrap().port();
        let make = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).current_dir(directory.path()).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let root = ["req", "-x509", "-subj", "/CN=Private Root", "-days", "2", "-keyout", "ca.key", "-out", "ca.crt"];
        make(&[&root[..], &curve].concat());
        let san = format!("subjectAltName=IP:{address}");
        let server = [
            "req",
            "-x509",
            "-subj",
            "/CN=registry",
            "-days",
            "2",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-addext",
            &san,
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-keyout",
            "server.key",
            "-out",
            "server.crt",
        ];
        make(&[&server[..], &curve].concat());
        let path = |name: &str| directory.path().join(name).display().to_string();
        let tls = format!("  tls:\n    certificate: {}\n    key: {}\n", path("server.crt"), path("server.key"));
        let registry = Registry::serve(directory.path(), SocketAddr::from((address, port)), &tls);
        Self { _registry: registry, directory, place: format!("{address}:{port}") }
    }

    /// Writes the certificates that this machine trusts, and this registry's authority, into one file.
    fn bundle(&self) -> PathBuf {
        let mut all = fs::read("/etc/ssl/certs/ca-certificates.crt").unwrap_or_default();
        all.extend(fs::read(self.directory.path().join("ca.crt")).unwrap());
        let path = self.directory.path().join("bundle.crt");
        fs::write(&path, all).unwrap();
        path
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_engine_trusts_what_the_host_trusts_and_goes_through_its_proxy_at_each_start() {
    let Some(address) = own_address() else {
        println!("left out: this machine has no address but its loopback's");
        return;
    };
    let registry = PrivateRegistry::start(address);
    let name = format!("{}/alpine", registry.place);
    {
        // Any engine without the proxy and the bundle does, so the last test's is not restarted.
        let _engine = support::engine::engine(Isolation::Either);
        done(&["tag", "alpine", &name]);
        let message = docker(&["push", &name]).fails(1);
        assert!(message.contains("x509") || message.contains("unknown authority"), "{message}");
    }
    // "me:s3cret"
    let (port, asked) = proxy("bWU6czNjcmV0");
    let url = format!("http://me:s3cret@127.0.0.1:{port}");
    let bundle = registry.bundle();
    let environment =
        [("SSL_CERT_FILE", bundle.as_os_str()), ("HTTPS_PROXY", url.as_ref()), ("no_proxy", "example.org".as_ref())];
    let (_started, said) = start(&[("containersProxy", "true")], &environment, &[]);
    assert!(!said.contains("warning"), "{said}");
    done(&["push", &name]);
    done(&["rmi", &name]);
    done(&["pull", &name]);
    let asked = asked.lock().unwrap().clone();
    assert!(asked.iter().any(|line| *line == format!("CONNECT {} HTTP/1.1", registry.place)), "{asked:?}");
    let info = done(&["info", "--format", "{{.HTTPSProxy}} {{.NoProxy}}"]);
    assert!(info.contains(&format!("host.docker.internal:{port}")) && !info.contains("s3cret"), "{info}");
    assert!(info.contains("localhost") && info.contains("example.org"), "{info}");
    let printed = shell("env | sort | grep -i proxy");
    let line = format!("HTTPS_PROXY=http://me:s3cret@host.docker.internal:{port}\n");
    assert!(printed.contains(&line) && printed.contains("\nno_proxy=localhost,"), "{printed}");
    let printed = done(&["run", "--rm", "-e", "https_proxy=own", "alpine", "sh", "-c", "env | grep -i https_proxy"]);
    assert_eq!(printed, "https_proxy=own\n");
    let log = bulkhead(&["logs"]);
    assert!(!log.contains("s3cret"), "the log has the proxy's password");
}

/// A tap device of this test.
struct Device(&'static str);

impl Device {
    fn make(name: &'static str, address: &str) -> Self {
        let device = Self(name);
        for arguments in [
            format!("tuntap add {name} mode tap"),
            format!("addr add {address} dev {name}"),
            format!("link set {name} up"),
        ] {
            ip(&arguments).ok();
        }
        device
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        ip(&format!("tuntap del {} mode tap", self.0));
    }
}

/// A server on one address with one file, for one kind of network.
fn serve_file(address: Ipv4Addr, body: Vec<u8>) -> u16 {
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let _ = stream.read(&mut [0; 4096]);
            let _ = write!(stream, "HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = stream.write_all(&body);
        }
    });
    port
}

/// Moves data both ways between a container and this machine; publishing a port is refused.
fn data_moves(name: &str, address: Ipv4Addr) {
    let body = pattern(16 << 20);
    let (expected, port) = (digest(&body), serve_file(address, body));
    let begun = Instant::now();
    assert_eq!(shell(&format!("wget -qO- http://{name}:{port}/ | sha256sum")), format!("{expected}  -\n"));
    println!("16 MiB to a container in {:.1?}", begun.elapsed());
    let listener = TcpListener::bind((address, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiver = thread::spawn(move || {
        let mut data = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut data).unwrap();
        data
    });
    let begun = Instant::now();
    send_zeros(name, port, 16);
    assert!(receiver.join().unwrap() == vec![0; 16 << 20]);
    println!("16 MiB from a container in {:.1?}", begun.elapsed());
    let refused = docker(&["run", "--rm", "-p", "8080:80", "alpine", "true"]);
    assert!(!refused.status.success() && refused.stderr.contains("no port can be published"), "{refused:?}");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_tap_device_carries_frames_both_ways_and_survives_its_process() {
    if !takes_network_devices() {
        return;
    }
    let router = Ipv4Addr::new(10, 79, 0, 1);
    let _device = Device::make("bulkhead-test", "10.79.0.1/24");
    let (_started, _) = start(&[("vpnkitCIDR", "10.79.0.0/24")], &[], &["--net", "tap=bulkhead-test"]);
    let pinged = Command::new("busybox").args(["ping", "-c", "2", "10.79.0.3"]).output().unwrap();
    assert!(String::from_utf8_lossy(&pinged.stdout).contains("2 packets received"));
    data_moves("10.79.0.1", router);
    let killed = network_process().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(killed), nix::sys::signal::Signal::SIGKILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while network_process().is_none_or(|pid| pid == killed) {
        assert!(Instant::now() < deadline, "no new network process");
        thread::sleep(Duration::from_millis(50));
    }
    let port = serve_file(router, b"again".to_vec());
    assert_eq!(shell(&format!("wget -T 20 -qO- http://10.79.0.1:{port}/")), "again");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn with_passt_the_device_has_the_same_addresses() {
    if Command::new("passt").arg("--version").output().is_err() {
        println!("left out: there is no passt");
        return;
    }
    let (_started, _) = start(&[], &[], &["--net", "passt"]);
    assert!(network_process().is_none());
    data_moves("192.168.65.254", Ipv4Addr::LOCALHOST);
}
