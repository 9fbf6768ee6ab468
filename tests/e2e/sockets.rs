//! Containers that may have the engine's socket.

use std::time::Duration;

use support::{
    engine::{Engine, ISOLATION, Isolation, engine},
    process::{Ran, poll},
};

const SOCKET: &str = "/var/run/docker.sock:/var/run/docker.sock";

/// The documented refusal of a container of an image from Docker Hub.
fn denied(image: &str) -> String {
    format!(
        "enhanced container isolation: docker socket mount denied for container with image \
         \"docker.io/library/{image}\"; image is not in the allowed list; if you wish to allow it, configure the docker \
         socket image list in the Docker Desktop settings."
    )
}

/// Loads the image of the docker command line and returns its ID.
fn load_cli(engine: &Engine) -> String {
    engine.need_image("docker:cli", "docker.tar");
    engine.docker(&["image", "inspect", "--format", "{{.Id}}", "docker:cli"]).ok().trim().to_owned()
}

/// Allows the images; a command is blocked for all of them.
fn allow(engine: &Engine, images: &[&str]) {
    let exceptions = serde_json::json!({"imageList": {"images": images}, "commandList": {"commands": ["push"]}});
    engine.run_with(&[(ISOLATION, "true"), ("dockerSocketMount", &exceptions.to_string())]);
}

fn run_with_socket(engine: &Engine, script: &str) -> Ran {
    engine.docker(&["run", "--rm", "-v", SOCKET, "docker:cli", "sh", "-c", script])
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn an_image_that_is_allowed_by_its_id_has_a_socket_with_rules_and_nobody_else_has() {
    let engine = engine(Isolation::Either);
    let id = load_cli(&engine);
    // A name alone is not enough: `docker load` and `docker tag` give any name to any image.
    engine.docker(&["tag", "alpine", "named"]).ok();
    allow(&engine, &["named", &id]);
    let named = engine.docker(&["run", "--rm", "-v", SOCKET, "named", "true"]).fails(125);
    assert!(named.contains(&denied("named")), "{named}");
    assert!(run_with_socket(&engine, "docker ps --format '{{.Image}}'").ok().contains("docker:cli"));
    // Clients such as testcontainers take the path from DOCKER_HOST.
    let on_host = format!("{}:/s", engine.home.docker_socket().display());
    let listed = engine.docker(&["run", "--rm", "-v", &on_host, "docker:cli", "docker", "-H", "unix:///s", "ps"]).ok();
    assert!(listed.contains("docker:cli"), "{listed}");

    let url = "http://localhost/v1.43/images/myimage/push?tag=latest";
    let said = run_with_socket(&engine, &format!("curl -s --unix-socket /var/run/docker.sock -XPOST '{url}'")).ok();
    let text = "enhanced container isolation: docker command \\\"/v1.43/images/myimage/push?tag=latest\\\" is blocked; if \
                you wish to allow it, configure the docker socket command list in the Docker Desktop settings.";
    assert!(said.contains(text), "{said}");

    // Containers that it makes are isolated, too; attached input ends on its own.
    let map = run_with_socket(&engine, "docker run --rm alpine cat /proc/self/uid_map").ok();
    assert!(map.trim_start().starts_with("0 ") && map.trim_end().ends_with(" 65536"), "{map}");
    assert_eq!(run_with_socket(&engine, "echo in | docker run --rm -i alpine cat").ok(), "in\n");
    let alpine = denied("alpine");
    for nested in ["-v /var/run/docker.sock:/s", "--volumes-from $(hostname)"] {
        let said = run_with_socket(&engine, &format!("docker run --rm {nested} alpine true 2>&1; true")).ok();
        assert!(said.contains(&alpine), "{said}");
    }
    assert!(engine.docker(&["run", "--rm", "-v", SOCKET, "alpine", "true"]).fails(125).contains(&alpine));
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_socket_of_a_container_outlives_a_boot_and_ends_with_the_permission() {
    let engine = engine(Isolation::Either);
    let id = load_cli(&engine);
    allow(&engine, &["named", &id]);
    let name = "keeper";
    engine.docker(&["run", "-d", "--name", name, "--restart=always", "-v", SOCKET, "docker:cli", "sleep", "1d"]).ok();
    engine.restart();
    let names = poll("the container asks the engine", Duration::from_secs(60), || {
        let ran = engine.docker(&["exec", name, "docker", "ps", "--format", "{{.Names}}"]);
        ran.status.success().then_some(ran.stdout)
    });
    assert!(names.contains(name), "{names}");
    engine.run_with(&[(ISOLATION, "true")]);
    assert!(engine.docker(&["start", name]).fails(1).contains(&denied("docker")));
    engine.docker(&["rm", "--force", name]).ok();
}
