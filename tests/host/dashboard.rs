//! The server of the dashboard's page: who may use it, and what for. `tests/dashboard` has the page itself.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, TcpStream},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use support::program;

use crate::{
    home::{Home, exit_of, is_root},
    policy::under,
};

/// A running `bulkhead dashboard`; killed when it is dropped.
struct Dashboard {
    child: Child,
    port: u16,
    token: String,
    /// The session's cookie, once the token is used.
    cookie: String,
}

/// An answer: its status code, its head and its body.
struct Answer {
    code: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

impl Dashboard {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let (port, token) = line
            .trim()
            .strip_prefix("http://127.0.0.1:")
            .and_then(|rest| rest.split_once("/open?token="))
            .unwrap_or_else(|| panic!("{line}"));
        Self { child, port: port.parse().unwrap(), token: token.into(), cookie: String::new() }
    }

    /// One with a session.
    fn opened(home: &Home) -> Self {
        let mut dashboard = Self::start(command(home, &[]));
        dashboard.open();
        dashboard
    }

    fn open(&mut self) {
        let answer = self.ask("GET", &format!("/open?token={}", self.token), &[], "");
        assert_eq!(answer.code, 303, "{}", answer.head);
        let cookie = answer.head.lines().find_map(|line| line.strip_prefix("set-cookie: ")).unwrap();
        assert!(cookie.contains("HttpOnly") && cookie.contains("SameSite=Strict"), "{cookie}");
        self.cookie = cookie.split(';').next().unwrap().into();
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends a request with exactly these headers, and those that say how long it is.
    fn raw(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Answer {
        let mut text = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        for &(name, value) in headers {
            text += &[name, ": ", value, "\r\n"].concat();
        }
        let mut stream = self.connect();
        let _ = stream.write_all(format!("{text}\r\n{body}").as_bytes());
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let code = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_default();
        // An answer that is passed on comes in chunks.
        let body = match (body.find(['{', '[']), body.rfind(['}', ']'])) {
            (Some(start), Some(end)) if head.contains("chunked") => &body[start..=end],
            _ => body,
        };
        Answer { code, head: head.into(), body: body.into() }
    }

    /// Sends a request as the page does, with more headers.
    fn ask(&self, method: &str, path: &str, more: &[(&str, &str)], body: &str) -> Answer {
        let (host, origin) = (self.host(), format!("http://{}", self.host()));
        let mut headers = vec![("Host", host.as_str()), ("Sec-Fetch-Site", "same-origin")];
        if method != "GET" {
            headers.push(("Origin", &origin));
        }
        if !self.cookie.is_empty() {
            headers.push(("Cookie", &self.cookie));
        }
        headers.extend(more);
        self.raw(method, path, &headers, body)
    }

    #[track_caller]
    fn wait(&mut self) -> std::process::ExitStatus {
        exit_of(&mut self.child, "the dashboard")
    }
}

impl Drop for Dashboard {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(home: &Home, arguments: &[&str]) -> Command {
    let mut command = home.command(program());
    command.args(["dashboard", "--no-browser"]).args(arguments);
    command
}

#[test]
fn the_address_works_once_and_without_it_there_is_only_the_empty_page() {
    let home = Home::new();
    let mut dashboard = Dashboard::start(command(&home, &[]));
    for token in ["", "0", &"0".repeat(64), &dashboard.token[1..]] {
        let answer = dashboard.ask("GET", &format!("/open?token={token}"), &[], "");
        assert!(answer.code == 403 && !answer.head.contains("set-cookie"), "{}", answer.head);
    }
    for path in ["/v1/status", "/v1/settings", "/v1/events", "/docker/containers", "/anything"] {
        assert_eq!(dashboard.ask("GET", path, &[], "").code, 401, "{path}");
    }
    assert_eq!(dashboard.ask("POST", "/v1/stop", &[], "").code, 401);
    assert_eq!(dashboard.ask("GET", "/", &[], "").code, 200);
    dashboard.open();
    assert_eq!(dashboard.ask("GET", "/v1/status", &[], "").json()["state"], "stopped");
    // The browser that has the session may come back to the address; another one may not.
    let path = format!("/open?token={}", dashboard.token);
    assert_eq!(dashboard.ask("GET", &path, &[], "").code, 303);
    dashboard.cookie = String::new();
    let again = dashboard.ask("GET", &path, &[], "");
    assert!(again.code == 403 && again.body.contains("has been used"), "{}", again.body);
}

#[test]
fn a_session_of_an_earlier_dashboard_is_refused() {
    let home = Home::new();
    let first = Dashboard::opened(&home);
    let cookie = first.cookie.clone();
    let port = first.port.to_string();
    drop(first);
    let second = Dashboard::start(command(&home, &["--port", &port]));
    let answer = second.ask("GET", "/v1/status", &[("Cookie", &cookie)], "");
    assert!(answer.code == 401 && answer.body.contains("run `bulkhead dashboard`"), "{}", answer.body);
}

#[test]
fn another_host_or_another_origin_is_refused_even_with_the_session() {
    let home = Home::new();
    let dashboard = Dashboard::opened(&home);
    let (host, origin) = (dashboard.host(), format!("http://{}", dashboard.host()));
    let cookie = ("Cookie", dashboard.cookie.as_str());
    let get = |headers: &[(&str, &str)]| dashboard.raw("GET", "/v1/status", &[headers, &[cookie]].concat(), "").code;
    let post = |headers: &[(&str, &str)]| dashboard.raw("POST", "/v1/stop", &[headers, &[cookie]].concat(), "").code;
    assert_eq!(get(&[("Host", &host)]), 200);
    assert_eq!(post(&[("Host", &host), ("Origin", &origin)]), 200);
    let rebound = format!("attacker.example:{}", dashboard.port);
    let local = format!("localhost:{}", dashboard.port);
    for name in [rebound.as_str(), &local, "127.0.0.1", ""] {
        assert_eq!(get(&[("Host", name)]), 403, "{name}");
        // The page's own files as well: a name of the attacker's must show nothing.
        assert_eq!(dashboard.raw("GET", "/", &[("Host", name)], "").code, 403);
    }
    for other in ["http://attacker.example", "null", "http://127.0.0.1:1", &format!("https://{host}")] {
        assert_eq!(get(&[("Host", &host), ("Origin", other)]), 403, "{other}");
        assert_eq!(post(&[("Host", &host), ("Origin", other)]), 403, "{other}");
    }
    assert_eq!(post(&[("Host", &host)]), 403, "a request that changes something names its origin");
    for site in ["cross-site", "same-site"] {
        assert_eq!(get(&[("Host", &host), ("Sec-Fetch-Site", site)]), 403, "{site}");
    }
}

#[test]
fn another_user_of_the_machine_gets_no_answer() {
    if !is_root() {
        return;
    }
    let home = Home::new();
    let dashboard = Dashboard::opened(&home);
    let script = format!(
        "exec 3<>/dev/tcp/127.0.0.1/{0}; printf 'GET /v1/status HTTP/1.1\\r\\nHost: 127.0.0.1:{0}\\r\\nCookie: {1}\\r\\n\
         Connection: close\\r\\n\\r\\n' >&3; cat <&3",
        dashboard.port, dashboard.cookie
    );
    let ask = |user: u32| Command::new("bash").args(["-c", &script]).uid(user).output().unwrap().stdout;
    assert_eq!(ask(65_534), b"");
    assert!(ask(0).starts_with(b"HTTP/1.1 200"));
}

#[test]
fn only_the_routes_of_the_page_are_passed_on() {
    let home = Home::new();
    let _backend = home.backend();
    let dashboard = Dashboard::opened(&home);
    for path in ["/v1/status", "/v1/ports", "/v1/usage", "/v1/logs", "/v1/settings", "/openapi.json"] {
        assert_eq!(dashboard.ask("GET", path, &[], "").code, 200, "{path}");
    }
    // The engine does not run, which is the engine's own answer and not one of this server.
    let refused = dashboard.ask("GET", "/docker/containers", &[], "");
    assert!(refused.code == 503 && refused.body.contains("Bulkhead's engine is not running"), "{}", refused.body);
    for (method, path) in [
        ("GET", "/v1/examination"),
        ("POST", "/v1/shares"),
        ("GET", "/containers/json"),
        ("GET", "/docker/images"),
        ("GET", "/docker/containers/../images"),
        ("POST", "/docker/containers"),
        ("DELETE", "/docker/containers"),
        ("GET", "/docker/_ping"),
        ("GET", "/v1/settings/../../docker/containers"),
        ("GET", "//v1/status"),
        ("GET", "/v1/%73tatus"),
        ("GET", "/../../etc/passwd"),
    ] {
        assert_eq!(dashboard.ask(method, path, &[], "").code, 404, "{method} {path}");
    }
    assert_eq!(dashboard.ask("POST", "/v1/status", &[], "").code, 405);
    assert_eq!(dashboard.ask("GET", "http://169.254.169.254/v1/status", &[], "").code, 200, "the path alone counts");
}

#[test]
fn requests_that_are_too_long_or_never_end_are_dropped() {
    let home = Home::new();
    let dashboard = Dashboard::opened(&home);
    let answer = dashboard.ask("POST", "/v1/policy/validate", &[], &"x".repeat(100_000));
    assert!(answer.code == 413 && answer.body.contains("65536 bytes"), "{}", answer.head);
    let long = "x".repeat(100_000);
    assert_eq!(dashboard.ask("GET", "/v1/status", &[("X-Long", &long)], "").code, 431);
    // More of them than connections at once: each gives way after a time.
    let half: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = dashboard.connect();
            stream.write_all(b"GET /v1/st").unwrap();
            stream
        })
        .collect();
    assert_eq!(dashboard.ask("GET", "/v1/status", &[], "").code, 200);
    drop(half);
}

#[test]
fn every_answer_forbids_foreign_content_and_frames() {
    let home = Home::new();
    let dashboard = Dashboard::opened(&home);
    for (path, code) in [("/", 200), ("/main.js", 200), ("/v1/status", 200), ("/nothing", 404), ("/open?token=", 303)] {
        let answer = dashboard.ask("GET", path, &[], "");
        assert_eq!(answer.code, code, "{path}");
        for header in [
            "content-security-policy: default-src 'none'; script-src 'self';",
            "frame-ancestors 'none'",
            "x-content-type-options: nosniff",
            "x-frame-options: DENY",
            "referrer-policy: no-referrer",
            "cache-control: no-store",
            "cross-origin-resource-policy: same-origin",
        ] {
            assert!(answer.head.contains(header), "{path}: {header}: {}", answer.head);
        }
        assert!(!answer.head.contains("access-control-"), "{}", answer.head);
    }
}

#[test]
fn every_file_of_the_page_is_served_and_names_no_other_machine() {
    let home = Home::new();
    let dashboard = Dashboard::start(command(&home, &[]));
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/dashboard/page");
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = if name == "index.html" { "/".into() } else { format!("/{name}") };
        let answer = dashboard.ask("GET", &path, &[], "");
        assert!(answer.code == 200 && answer.body == fs::read_to_string(entry.path()).unwrap(), "{path}");
        for address in
            answer.body.split("http").skip(1).filter(|rest| rest.starts_with("://") || rest.starts_with("s://"))
        {
            // The name space of SVG, and a name that is reserved for examples.
            let known = ["://www.w3.org/2000/svg", "://proxy.example.org"].iter().any(|one| address.starts_with(one));
            assert!(known, "{path}: {address:.40}");
        }
    }
}

#[test]
fn settings_can_be_read_and_changed_while_nothing_runs() {
    let home = Home::new();
    let dashboard = Dashboard::opened(&home);
    let body = r#"{"value": 2}"#;
    let answer = dashboard.ask("PUT", "/v1/settings/cpus", &[], body);
    assert_eq!((answer.code, &answer.json()["value"]), (200, &json!(2)));
    assert_eq!(home.bulkhead(&["settings", "get", "cpus"]).stdout, b"2\n");
    assert_eq!(dashboard.ask("GET", "/v1/settings/cpus", &[], "").json()["origin"], "user");
    assert_eq!(dashboard.ask("GET", "/v1/ports", &[], "").json(), json!({"ports": []}));
    assert_eq!(dashboard.ask("POST", "/v1/stop", &[], "").json()["outcome"], "already");
    assert_eq!(dashboard.ask("GET", "/docker/containers", &[], "").code, 503);
    // Reading starts no backend.
    assert!(!home.runtime("control.sock").exists());
}

#[test]
fn a_locked_setting_cannot_be_changed_by_the_page() {
    let home = Home::new();
    let policy = r#"{"enhancedContainerIsolation": {"value": true, "locked": true}}"#;
    let Some(mut command) = under(&home, policy) else { return };
    command.args(["dashboard", "--no-browser"]);
    let mut dashboard = Dashboard::start(command);
    dashboard.open();
    let path = "/v1/settings/enhancedContainerIsolation";
    let answer = dashboard.ask("PUT", path, &[], r#"{"value": false}"#);
    let message = "enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json; only the administrator of \
                   this machine can change it";
    assert_eq!((answer.code, answer.json()), (403, json!({ "message": message })));
    assert_eq!(dashboard.ask("GET", path, &[], "").json()["lockedBy"], "/etc/bulkhead/admin-settings.json");
}

#[test]
fn a_start_that_is_refused_gives_the_reason() {
    let home = Home::new();
    let mut command = command(&home, &[]);
    command.env("BULKHEAD_KERNEL", "/nowhere/vmlinux").env("BULKHEAD_ROOTFS", "/nowhere/rootfs");
    let mut dashboard = Dashboard::start(command);
    dashboard.open();
    for path in ["/v1/start", "/v1/restart"] {
        let answer = dashboard.ask("POST", path, &[], "");
        let message = answer.json()["message"].as_str().unwrap().to_owned();
        assert!(answer.code == 502 && !message.is_empty(), "{message}");
        assert_eq!(home.bulkhead(&["start"]).status.code(), Some(1));
    }
    assert_eq!(dashboard.ask("GET", "/v1/status", &[], "").json()["state"], "stopped");
}

#[test]
fn events_go_on_from_no_backend_to_one_and_back() {
    let home = Home::new();
    let dashboard = Dashboard::opened(&home);
    let events = || {
        let mut stream = dashboard.connect();
        let (host, cookie) = (dashboard.host(), &dashboard.cookie);
        let head = format!("GET /v1/events HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        BufReader::new(stream)
    };
    let first = |reader: &mut BufReader<TcpStream>| loop {
        let mut line = String::new();
        assert!(reader.read_line(&mut line).unwrap() > 0, "no event");
        if line.starts_with('{') {
            return serde_json::from_str::<Value>(&line).unwrap();
        }
    };
    let mut reader = events();
    assert_eq!(first(&mut reader)["backendPid"], Value::Null);
    let backend = home.backend();
    // The stream of the time without a backend ends, and the next one is the backend's.
    reader.read_to_string(&mut String::new()).unwrap();
    let mut reader = events();
    assert_eq!(first(&mut reader)["backendPid"], backend.child.id());
    assert!(home.bulkhead(&["stop"]).status.success());
    let _ = reader.read_to_string(&mut String::new());
    assert_eq!(first(&mut events())["backendPid"], Value::Null);
}

#[test]
fn the_command_ends_with_a_signal_or_when_nothing_is_open() {
    let home = Home::new();
    let mut dashboard = Dashboard::start(command(&home, &[]));
    let pid = nix::unistd::Pid::from_raw(dashboard.child.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(dashboard.wait().success());
    let mut idle = Dashboard::start(command(&home, &["--idle-timeout", "1"]));
    // An open connection keeps it.
    let stream = idle.connect();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(idle.child.try_wait().unwrap().is_none());
    drop(stream);
    assert!(idle.wait().success());
}

#[test]
fn the_browser_is_started_with_the_address_where_there_is_a_display() {
    let home = Home::new();
    let tools = home.path("tools");
    fs::create_dir(&tools).unwrap();
    let note = home.path("opened");
    fs::write(tools.join("xdg-open"), format!("#!/bin/sh\nprintf %s \"$1\" >{}\n", note.display())).unwrap();
    fs::set_permissions(tools.join("xdg-open"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let mut command = home.command(program());
    command.arg("dashboard").env("PATH", path).env("DISPLAY", ":9");
    let dashboard = Dashboard::start(command);
    let expected = format!("http://{}/open?token={}", dashboard.host(), dashboard.token);
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::read_to_string(&note).ok().as_ref() != Some(&expected) {
        assert!(Instant::now() < deadline, "the browser was not started");
        std::thread::sleep(Duration::from_millis(20));
    }
}
