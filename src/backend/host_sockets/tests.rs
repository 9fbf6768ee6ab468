//! Connections to real sockets, with the test in the place of the vmm.

use std::{
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream as StdStream},
    },
    time::{Duration, Instant},
};

use tempfile::TempDir;

use super::*;
use crate::{
    backend::vmm,
    settings::{Policy, PolicySource, ProfileName},
};

const SOON: Duration = Duration::from_secs(20);

/// One socket of the host at `agent` in a directory, and the vmm's end of its channel.
struct Fixture {
    directory: TempDir,
    sockets: HostSockets,
    vmm: VmmChannel,
    theirs: OwnedFd,
}

fn base(directory: &TempDir) -> Base {
    let place = directory.path().join("base");
    Base::from_variables(|_| Some(place.clone()), 0).unwrap()
}

fn fixture() -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let socket = HostSocket { name: SSH_AGENT.to_owned(), path: directory.path().join("agent"), allowed: None };
    let sockets = HostSockets::new(vec![socket], &base(&directory));
    let (vmm, theirs) = vmm::channel().unwrap();
    Fixture { directory, sockets, vmm, theirs }
}

impl Fixture {
    fn listen(&self) -> UnixListener {
        let path = self.directory.path().join("agent");
        let _ = std::fs::remove_file(&path);
        UnixListener::bind(path).unwrap()
    }

    async fn try_connect(&self) -> Result<StdStream, ConnectError> {
        self.sockets.connect(0, &self.vmm, &[]).await?;
        let mut buffer = vec![0; bulkhead_vmm::api::MAX_PACKET];
        let (command, stream) = bulkhead_ipc::channel::receive::<Command>(&self.theirs, &mut buffer).unwrap().unwrap();
        assert_eq!(command, Command::VsockConnect { port: FIRST_HOST_SOCKET_PORT });
        let stream = StdStream::from(stream.unwrap());
        stream.set_nonblocking(false).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Ok(stream)
    }

    async fn connect(&self) -> StdStream {
        self.try_connect().await.unwrap()
    }

    /// Waits until so many connections are over.
    async fn wait_for_free(&self, free: usize) {
        let start = Instant::now();
        while self.sockets.permits.available_permits() != free {
            assert!(start.elapsed() < SOON, "{} are free", self.sockets.permits.available_permits());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn rest(mut stream: &StdStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[tokio::test]
async fn a_guest_speaks_with_the_agent_itself_and_each_direction_ends_on_its_own() {
    let fixture = fixture();
    let listener = fixture.listen();
    let guest = fixture.connect().await;
    let (agent, _) = listener.accept().unwrap();
    (&guest).write_all(b"question").unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rest(&agent), "question");
    // Half of the connection is over, and the backend keeps it.
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(fixture.sockets.permits.available_permits(), MAX_HOST_CONNECTIONS - 1);
    (&agent).write_all(b"answer").unwrap();
    drop(agent);
    assert_eq!(rest(&guest), "answer");
    fixture.wait_for_free(MAX_HOST_CONNECTIONS).await;
}

#[tokio::test]
async fn an_agent_that_ended_is_named_and_one_that_starts_again_is_reached() {
    let fixture = fixture();
    let reason = |error: ConnectError| chain(&error);
    let missing = reason(fixture.try_connect().await.unwrap_err());
    assert!(missing.ends_with("agent does not exist; start the program that listens on it"), "{missing}");
    drop(fixture.listen());
    let refused = reason(fixture.try_connect().await.unwrap_err());
    assert!(refused.starts_with("cannot connect to the socket") && refused.contains("refused"), "{refused}");
    let listener = fixture.listen();
    drop((fixture.connect().await, listener.accept().unwrap()));
    // A link to an engine's socket does not become one to offer by being put in its place.
    let path = fixture.directory.path().join("agent");
    let _engine = UnixListener::bind(fixture.directory.path().join("docker.sock")).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("docker.sock", &path).unwrap();
    assert!(matches!(fixture.try_connect().await, Err(ConnectError::Refused(Refusal::Engine(_)))));
    assert!(matches!(fixture.sockets.connect(1, &fixture.vmm, &[]).await, Err(ConnectError::Unknown(1))));
    assert!(matches!(fixture.sockets.connect(u32::MAX, &fixture.vmm, &[]).await, Err(ConnectError::Unknown(_))));
    fixture.wait_for_free(MAX_HOST_CONNECTIONS).await;
}

#[tokio::test]
async fn a_hundred_connections_carry_their_own_bytes() {
    let fixture = fixture();
    let listener = fixture.listen();
    let mut pairs = Vec::new();
    for _ in 0..100 {
        let guest = fixture.connect().await;
        pairs.push((guest, listener.accept().unwrap().0));
    }
    for (at, (guest, _)) in pairs.iter().enumerate() {
        (&*guest).write_all(at.to_string().as_bytes()).unwrap();
        guest.shutdown(Shutdown::Write).unwrap();
    }
    for (at, (_, agent)) in pairs.iter().enumerate() {
        assert_eq!(rest(agent), at.to_string());
    }
    drop(pairs);
    fixture.wait_for_free(MAX_HOST_CONNECTIONS).await;
}

#[tokio::test]
async fn connections_are_limited_and_end_when_either_side_ends_them_or_the_guest_is_gone() {
    let fixture = fixture();
    let listener = fixture.listen();
    let mut pairs = Vec::new();
    for _ in 0..MAX_HOST_CONNECTIONS {
        let guest = fixture.connect().await;
        pairs.push((guest, listener.accept().unwrap().0));
    }
    assert!(matches!(fixture.try_connect().await, Err(ConnectError::Full)));
    // As the vsock device ends a stream: the backend's copy would keep one open that was only closed.
    let (guest, agent) = pairs.pop().unwrap();
    guest.shutdown(Shutdown::Both).unwrap();
    assert_eq!(rest(&agent), "");
    fixture.wait_for_free(1).await;
    let (guest, agent) = pairs.pop().unwrap();
    drop(agent);
    assert_eq!(rest(&guest), "");
    fixture.wait_for_free(2).await;
    fixture.sockets.clear();
    fixture.wait_for_free(MAX_HOST_CONNECTIONS).await;
}

#[test]
fn the_agent_of_the_environment_is_offered_unless_a_setting_or_its_socket_says_otherwise() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let _engine = UnixListener::bind(at("docker.sock")).unwrap();
    let plan = |setting: Option<&str>, variable: Option<&str>, no_shares: bool| {
        let file = at("settings.json");
        let values = setting.map_or(serde_json::json!({}), |value| serde_json::json!({"sshAgent": value}));
        std::fs::write(&file, values.to_string()).unwrap();
        let options = StartOptions { ssh_agent: variable.map(at), no_shares, ..StartOptions::default() };
        HostSocket::plan(&Settings::load(&file).unwrap(), &options, &base(&directory), &[])
    };
    let socket = |name: &str| HostSocket { name: "ssh-auth.sock".to_owned(), path: at(name), allowed: None };
    let offered = |name: &str| (vec![socket(name)], Vec::new());
    let nothing = (Vec::new(), Vec::new());
    assert_eq!(plan(None, None, false), nothing);
    assert_eq!(plan(None, Some("agent"), false), offered("agent"));
    assert_eq!(plan(None, Some("agent"), true), nothing);
    assert_eq!(plan(Some("off"), Some("agent"), false), nothing);
    let other = at("other").into_os_string().into_string().unwrap();
    assert_eq!(plan(Some(&other), Some("agent"), false), offered("other"));
    let (sockets, problems) = plan(None, Some("docker.sock"), false);
    assert!(sockets.is_empty() && problems[0].starts_with("the VM has no ssh-agent: "), "{problems:?}");
}

#[test]
fn the_policys_directories_bound_every_socket_also_the_agents() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| fs::canonicalize(directory.path()).unwrap().join(name);
    let _sockets = ["agent", "other"].map(|name| UnixListener::bind(at(name)).unwrap());
    let plan = |allowed: &Path| {
        let text = serde_json::json!({"filesharingAllowedDirectories": [{"path": allowed}]}).to_string();
        std::fs::write(at("admin-settings.json"), text).unwrap();
        let source = PolicySource::new(vec![at("admin-settings.json")], nix::unistd::geteuid().as_raw());
        std::fs::write(at("settings.json"), serde_json::json!({"filesharingSockets": [at("other")]}).to_string())
            .unwrap();
        let settings = Settings::load(&at("settings.json")).unwrap().under(Policy::read(&source));
        let options = StartOptions { ssh_agent: Some(at("agent")), ..StartOptions::default() };
        let (sockets, problems) = HostSocket::plan(&settings, &options, &base(&directory), &[]);
        (sockets.into_iter().map(|socket| socket.path).collect::<Vec<_>>(), problems)
    };
    assert_eq!(plan(&at("")), (vec![at("agent"), at("other")], Vec::new()));
    let (sockets, problems) = plan(&at("elsewhere"));
    assert!(sockets.is_empty() && problems.len() == 2, "{sockets:?}");
    assert!(problems.iter().all(|problem| problem.contains("filesharingAllowedDirectories")), "{problems:?}");
}

#[test]
fn the_engines_socket_is_known_with_and_without_links() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| fs::canonicalize(directory.path()).unwrap().join(name);
    fs::create_dir(at("real")).unwrap();
    std::os::unix::fs::symlink(at("real"), at("link")).unwrap();
    let base = Base::from_variables(|_| Some(at("link")), 0).unwrap();
    let paths = base.profile(&ProfileName::default()).unwrap();
    let named = paths.docker_socket();
    assert_eq!(*engine_sockets(&paths), [named.to_str().unwrap()], "the directory is not there yet");
    fs::create_dir_all(named.parent().unwrap()).unwrap();
    let real = at("real").join(named.strip_prefix(at("link")).unwrap());
    assert_eq!(*engine_sockets(&paths), [named, real].map(|path| path.into_os_string().into_string().unwrap()));
}

#[test]
fn sockets_of_the_setting_have_names_that_never_mean_another_one() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("settings.json");
    let _engine = UnixListener::bind(directory.path().join("docker.sock")).unwrap();
    let plan = |paths: &[&str]| {
        std::fs::write(&file, serde_json::json!({"filesharingSockets": paths}).to_string()).unwrap();
        HostSocket::plan(&Settings::load(&file).unwrap(), &StartOptions::default(), &base(&directory), &[])
    };
    let (both, problems) = plan(&["/srv/b.sock", "/srv/a.sock", "/srv//./b.sock"]);
    assert!(problems.is_empty(), "one that is not there yet is offered: {problems:?}");
    let [first, second] = &both[..] else { panic!("one socket has one name: {both:?}") };
    assert_eq!(first.guest().path, "/srv/a.sock");
    // printf /srv/b.sock | sha256sum
    assert_eq!(second.name, "2bb046fa05041d5a.sock");
    assert_eq!(plan(&["/srv/b.sock"]).0, std::slice::from_ref(second));
    let engine = directory.path().join("docker.sock");
    let (none, problems) = plan(&[engine.to_str().unwrap()]);
    assert!(none.is_empty() && problems[0].starts_with("containers cannot have a socket: "), "{problems:?}");
}
