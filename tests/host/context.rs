//! The docker context that leads docker commands to the engine.

use std::process::Command;

use serde_json::Value;

use crate::home::Home;

#[test]
fn the_shell_command_of_env_points_to_the_socket() {
    let home = Home::new();
    let output = home.bulkhead(&["env"]);
    let script = format!("{}\nprintf %s \"$DOCKER_HOST\"", String::from_utf8(output.stdout).unwrap());
    let value = Command::new("sh").args(["-c", &script]).output().unwrap().stdout;
    assert_eq!(String::from_utf8(value).unwrap(), format!("unix://{}", home.runtime("docker.sock").display()));
}

/// The JSON of `docker context inspect`, or `None` without such a context.
fn inspect(home: &Home, name: &str) -> Option<Value> {
    let output = home.command("docker").args(["context", "inspect", name]).output().unwrap();
    output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
}

fn has_docker() -> bool {
    Command::new("docker").arg("--version").output().is_ok_and(|output| output.status.success())
}

#[test]
fn the_docker_command_finds_the_context_while_the_backend_runs() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let show = || home.command("docker").args(["context", "show"]).output().unwrap().stdout;
    let before = show();
    let mut backend = home.backend();
    let context = inspect(&home, "bulkhead").expect("no context");
    let host = format!("unix://{}", home.runtime("docker.sock").display());
    assert_eq!(context[0]["Endpoints"]["docker"]["Host"], host);
    assert_eq!(show(), before, "the current context was switched");
    let output = home.command("docker").args(["--context", "bulkhead", "ps"]).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("Bulkhead's engine is not running (state: stopped)"), "{message}");
    assert!(home.bulkhead(&["stop"]).status.success());
    backend.wait();
    assert_eq!(inspect(&home, "bulkhead"), None);
}

#[test]
fn a_context_that_a_person_made_is_left_alone() {
    if !has_docker() {
        return;
    }
    let home = Home::new();
    let create = ["context", "create", "bulkhead", "--docker", "host=tcp://192.0.2.1:2375"];
    assert!(home.command("docker").args(create).output().unwrap().status.success());
    let mut backend = home.backend();
    assert!(home.status().get("context").is_none());
    assert!(home.bulkhead(&["stop"]).status.success());
    backend.wait();
    let context = inspect(&home, "bulkhead").expect("it was removed");
    assert_eq!(context[0]["Endpoints"]["docker"]["Host"], "tcp://192.0.2.1:2375");
}
