//! Environments without a session: cron, containers, CI runners.

use std::{fs, process::Command};

use serde_json::Value;
use support::program;

use crate::home::{Home, refused};

/// A command as by `env -i`.
fn bare(arguments: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.env_clear().args(arguments).stdin(std::process::Stdio::null());
    command
}

#[test]
fn without_any_variable_one_line_names_those_to_set() {
    for verb in ["backend", "start", "status", "list"] {
        let message = refused(&bare(&[verb]).output().unwrap(), 1);
        assert!(message.contains("neither $HOME nor $XDG_CONFIG_HOME is set to an absolute path"), "{verb}: {message}");
    }
}

#[test]
fn with_a_home_only_the_sockets_are_in_a_directory_of_the_user_in_tmp() {
    let home = Home::new();
    // The directory in /tmp is that of all tests, and of the user.
    let profile = format!("test-{}", std::process::id());
    let command = |arguments: &[&str]| {
        let mut command = bare(&["--profile", &profile]);
        command.args(arguments).env("HOME", home.path(""));
        command
    };
    let mut backend = Home::listening(&mut command(&["backend"]));
    let status = command(&["status", "--format", "json"]).output().unwrap();
    let status: Value = serde_json::from_slice(&status.stdout).unwrap();
    let uid = nix::unistd::geteuid();
    assert_eq!(status["dockerHost"], format!("unix:///tmp/bulkhead-{uid}/{profile}/docker.sock"));
    assert_eq!(status["backendPid"], backend.child.id());
    assert_eq!(status["context"], format!("bulkhead-{profile}"));
    for directory in [".local/share/bulkhead", ".local/state/bulkhead"] {
        assert!(home.path(directory).join(&profile).is_dir(), "{directory}");
    }
    let output = command(&["delete", "--force"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(backend.wait().success());
    assert!(!fs::exists(format!("/tmp/bulkhead-{uid}/{profile}")).unwrap());
}

#[test]
fn with_the_xdg_variables_no_home_is_needed_and_the_missing_context_is_a_warning() {
    let home = Home::new();
    let mut command = bare(&["backend"]);
    for (variable, directory) in [
        ("XDG_CONFIG_HOME", "config"),
        ("XDG_DATA_HOME", "data"),
        ("XDG_STATE_HOME", "state"),
        ("XDG_CACHE_HOME", "cache"),
        ("XDG_RUNTIME_DIR", "run"),
    ] {
        command.env(variable, home.path(directory));
    }
    let _backend = Home::listening(&mut command);
    let status = home.status();
    assert_eq!(status["state"], "stopped");
    let warning = status["warning"].as_str().unwrap();
    assert!(warning.contains("neither DOCKER_CONFIG nor HOME is set"), "{warning}");
}
