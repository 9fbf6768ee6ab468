//! Sockets of the host in containers, such as the ssh-agent's, with a program of the test in the place of the others.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use support::engine::home;

use super::Shares;

/// The path of the socket in the VM, by Docker Desktop's convention.
const SOCKET: &str = "/run/host-services/ssh-auth.sock";

/// Time for the rest of a connection to arrive.
const PATIENCE: Duration = Duration::from_secs(60);

/// The path of the socket on the host.
pub fn path() -> PathBuf {
    home().path("ssh-agent.sock")
}

/// The path of another socket, in the shared directory.
pub fn other(place: &Path) -> PathBuf {
    place.join("app.sock")
}

/// Answers each connection, once it has said everything, with what it said.
fn answer(mut connection: UnixStream) {
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut text = String::new();
    if connection.read_to_string(&mut text).is_ok() {
        let _ = connection.write_all(format!("agent: {text}").as_bytes());
    }
}

/// Listens on a socket until the next call.
fn listen(path: PathBuf) {
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            let connection = connection.unwrap();
            thread::spawn(move || answer(connection));
        }
    });
}

pub fn the_hosts_ssh_agent_answers_in_containers(shares: &Shares) {
    let engine = &shares.engine;
    engine.need_image("debian:latest", "debian.tar");
    let mount = format!("{SOCKET}:/agent");
    let run = |options: &[&str], line: &str| {
        let arguments =
            [&["run", "--rm", "-v", &mount, "-e", "SSH_AUTH_SOCK=/agent"][..], options, &["debian", "sh", "-c", line]];
        engine.docker(&arguments.concat())
    };
    let ask = "printf keys | socat -t 60 - UNIX-CONNECT:$SSH_AUTH_SOCK";
    // The agent is not there yet, and later it is.
    let _ = std::fs::remove_file(path());
    assert_eq!(run(&[], ask).stdout, "");
    listen(path());
    assert_eq!(run(&[], ask).ok(), "agent: keys");
    for options in [&["--user", "1000:1000"][..], &["--privileged"], &["--read-only", "--cap-drop", "ALL"]] {
        assert_eq!(run(options, ask).ok(), "agent: keys", "{options:?}");
    }
    assert_eq!(run(&[], "stat -c %F:%u:%g:%a /agent").ok(), "socket:0:0:666\n");
    // Root of a container cannot take it from others.
    let line = "! chmod 0 /agent && ! chown 5 /agent && ! mount -o remount,rw /agent && stat -c %u:%a /agent";
    for options in [&[][..], &["--privileged"]] {
        assert_eq!(run(options, line).ok(), "0:666\n", "{options:?}");
    }
    // Many at once, and an answer that is long.
    let many = "for i in $(seq 40); do printf $i | socat -t 60 - UNIX-CONNECT:/agent >/tmp/$i & done; wait; \
                cat $(seq -f /tmp/%g 40)";
    let expected = (1..=40).map(|at| format!("agent: {at}")).collect::<Vec<_>>().concat();
    assert_eq!(run(&[], many).ok(), expected);
    let long = "head -c 3000000 /dev/zero | tr '\\0' x | socat -t 60 - UNIX-CONNECT:/agent | wc -c";
    assert_eq!(run(&[], long).ok().trim(), "3000007");
    let shown = engine.docker(&["create", "--name", "with-agent", "-v", &mount, "alpine"]);
    shown.ok();
    let listed = engine.docker(&["inspect", "--format", "{{(index .Mounts 0).Source}}", "with-agent"]).ok();
    assert_eq!(listed.trim(), SOCKET);
    engine.docker(&["rm", "with-agent"]).ok();
    sockets_have_their_own_names(shares);
}

/// A socket is mounted by its path on the host. In a directory that is shared it leads to nothing.
fn sockets_have_their_own_names(shares: &Shares) {
    let other = other(&shares.place);
    listen(other.clone());
    let run = |source: &Path, line: &str| {
        let mount = format!("type=bind,src={},dst=/s", source.display());
        shares.engine.docker(&["run", "--rm", "--mount", &mount, "debian", "sh", "-c", line])
    };
    let ask = |socket: &str| format!("printf hello | socat -t 60 - UNIX-CONNECT:{socket}");
    for path in [path(), other] {
        assert_eq!(run(&path, &ask("/s")).ok(), "agent: hello", "{}", path.display());
    }
    let refused = run(&shares.place, &ask("/s/app.sock"));
    assert!(refused.stderr.contains("Connection refused"), "{refused:?}");
}

pub fn nothing_else_is_beside_the_agents_socket(shares: &Shares) {
    for source in ["/run/host-services", "/run/host-services/x.sock", "/run/host-services/../docker.sock", "/run"] {
        let mount = format!("type=bind,src={source},dst=/d");
        let said = shares.engine.docker(&["run", "--rm", "--mount", &mount, "alpine", "true"]).fails(125);
        assert!(said.contains("restricted host mount") || said.contains("docker socket mount denied"), "{said}");
    }
}
