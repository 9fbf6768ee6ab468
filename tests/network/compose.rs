//! Compose: services on a network of their own, found by name.

use super::{
    ports::{HERE, get},
    *,
};

/// Three services: one stores, one fetches from it and is published, one fetches from that by name.
const PROJECT: &str = r#"
services:
  store:
    image: alpine
    hostname: the-store
    command: httpd -f -p 80 -h /etc
  relay:
    image: alpine
    depends_on: [store]
    command: >-
      sh -c "mkdir /tmp/www; until wget -qO /tmp/www/got http://store/hostname; do sleep 1; done;
      exec httpd -f -p 8080 -h /tmp/www"
    ports: ["127.0.0.1:${PORT}:8080"]
  client:
    image: alpine
    depends_on: [relay]
    command: sh -c "until wget -qO- http://relay:8080/got; do sleep 1; done"
networks:
  default:
    driver: bridge
"#;

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn three_services_find_each_other_by_name_and_a_port_of_theirs_is_published() {
    let _engine = engine();
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("compose.yaml"), PROJECT).unwrap();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let host = status()["dockerHost"].as_str().unwrap().to_owned();
    let compose = |arguments: &[&str]| {
        let mut command = Command::new("docker");
        command.env("DOCKER_HOST", &host).env("PORT", port.to_string()).current_dir(directory.path());
        let output = command.args(["compose", "--project-name", "three"]).args(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    compose(&["up", "--detach"]);
    let deadline = Instant::now() + Duration::from_secs(180);
    while !compose(&["logs", "--no-log-prefix", "client"]).contains("the-store") {
        assert!(Instant::now() < deadline, "{}", compose(&["logs"]));
        thread::sleep(Duration::from_secs(1));
    }
    assert_eq!(get(HERE, port, "/got"), "the-store");
    compose(&["down", "--timeout", "1"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(("127.0.0.1", port)).is_ok() {
        assert!(Instant::now() < deadline, "the port still listens");
        thread::sleep(Duration::from_millis(100));
    }
}
