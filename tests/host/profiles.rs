//! The list of profiles, and deleting one.

use std::{fs, io::Write, os::unix::fs::symlink, path::Path, process::Stdio};

use serde_json::{Value, json};
use support::program;

use crate::home::{Home, refused};

fn json(home: &Home, arguments: &[&str]) -> Value {
    let output = home.bulkhead(arguments);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Gives a profile a sparse data disk, and returns its directory.
fn put_disk(home: &Home, profile: &str) -> std::path::PathBuf {
    let directory = home.path("data/bulkhead").join(profile);
    fs::create_dir_all(&directory).unwrap();
    fs::File::create(directory.join("data.img")).unwrap().set_len(9 << 30).unwrap();
    directory
}

#[test]
fn the_list_has_each_profile_with_state_sizes_and_isolation() {
    let home = Home::new();
    assert_eq!(json(&home, &["list", "--format", "json"]), json!({ "profiles": [] }));
    let _backend = home.backend();
    for arguments in [["cpus", "3"], ["enhancedContainerIsolation", "false"]] {
        let verb = [&["--profile", "ci", "settings", "set"][..], &arguments].concat();
        assert!(home.bulkhead(&verb).status.success());
    }
    put_disk(&home, "ci");
    fs::create_dir_all(home.path("data/bulkhead/image")).unwrap();
    let list = json(&home, &["list", "--format", "json"]);
    let profiles = list["profiles"].as_array().unwrap();
    let names: Vec<_> = profiles.iter().map(|profile| profile["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["ci", "default"]);
    let ci = &profiles[0];
    assert_eq!((&ci["state"], &ci["cpus"], &ci["diskBytes"]), (&"stopped".into(), &3.into(), &(9_u64 << 30).into()));
    assert_eq!(ci["enhancedContainerIsolation"], false);
    assert!(ci["diskUsedBytes"].as_u64().unwrap() < 1 << 20);
    assert_eq!((&profiles[1]["enhancedContainerIsolation"], profiles[1].get("diskBytes")), (&true.into(), None));
    let text = String::from_utf8(home.bulkhead(&["list"]).stdout).unwrap();
    let rows: Vec<Vec<_>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[1], ["ci", "stopped", "3", "auto", "9.0", "GiB", "0", "bytes", "off"]);
    assert_eq!(rows[2], ["default", "stopped", "auto", "auto", "-", "-", "on"]);
}

#[test]
fn a_profile_whose_settings_cannot_be_read_is_listed_with_the_problem() {
    let home = Home::new();
    let directory = home.path("config/bulkhead/ci");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("settings.json"), "{").unwrap();
    let list = json(&home, &["list", "--format", "json"]);
    assert_eq!(list["profiles"][0]["name"], "ci");
    assert!(list["profiles"][0]["problem"].as_str().unwrap().contains("is not a JSON object"), "{list}");
}

#[test]
fn deleting_a_profile_stops_its_engine_and_leaves_nothing_of_it_and_all_of_others() {
    let home = Home::new();
    let other = put_disk(&home, "other");
    put_disk(&home, "default");
    assert!(home.bulkhead(&["settings", "set", "cpus", "2"]).status.success());
    let mut backend = home.backend();
    let deleted = json(&home, &["delete", "--force", "--format", "json"]);
    assert!(backend.wait().success());
    assert_eq!((&deleted["profile"], &deleted["stopped"]), (&"default".into(), &true.into()));
    let contents = deleted["removed"].as_array().unwrap().iter().map(|one| one["contents"].as_str().unwrap());
    // The backend removes its sockets itself.
    assert_eq!(contents.collect::<Vec<_>>(), ["settings", "logs", "data"]);
    assert_eq!(deleted["kept"], json!([]));
    for directory in ["config", "data", "state", "run"] {
        assert!(!home.path(directory).join("bulkhead/default").exists(), "{directory}");
    }
    assert!(fs::read_dir(home.path("docker/contexts/meta")).unwrap().next().is_none());
    assert!(other.join("data.img").exists());
    let again = home.bulkhead(&["delete", "--force"]);
    assert!(again.status.success());
    assert_eq!(String::from_utf8(again.stdout).unwrap(), "profile `default` has no files\n");
    assert!(
        refused(&home.bulkhead(&["--profile", "nowhere", "delete", "--force"]), 1).contains("no profile `nowhere`")
    );
}

#[test]
fn the_files_of_a_killed_backend_are_deleted_with_its_context() {
    let home = Home::new();
    home.backend().kill();
    let deleted = json(&home, &["delete", "--force", "--format", "json"]);
    assert_eq!((&deleted["stopped"], &deleted["context"]), (&false.into(), &"bulkhead".into()));
    assert!(!home.runtime("").exists());
    assert!(fs::read_dir(home.path("docker/contexts/meta")).unwrap().next().is_none());
}

#[test]
fn without_a_terminal_nothing_is_deleted_unless_forced() {
    let home = Home::new();
    let directory = put_disk(&home, "default");
    let mut backend = home.backend();
    assert!(refused(&home.bulkhead(&["delete"]), 1).contains("add --force"));
    assert!(directory.join("data.img").exists());
    assert_eq!(backend.child.try_wait().unwrap(), None);
}

#[test]
fn on_a_terminal_only_a_yes_deletes() {
    let home = Home::new();
    let directory = put_disk(&home, "default");
    // script(1) runs the command on a terminal of its own and types for it.
    let answer = |text: &str| {
        let mut command = home.command("script");
        command.args(["--quiet", "--return", "--command", &format!("{} delete", program()), "/dev/null"]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    for text in ["\n", "n\n", "yesterday\n", ""] {
        let (code, question) = answer(text);
        assert_eq!(code, Some(1), "{question}");
        assert!(
            question.contains("Delete profile `default`") && question.contains("nothing was deleted"),
            "{question}"
        );
        assert!(directory.join("data.img").exists(), "{text:?}");
    }
    assert_eq!(answer("y\n").0, Some(0));
    assert!(!directory.exists());
}

#[test]
fn a_profile_in_use_by_another_session_is_not_deleted() {
    let home = Home::new();
    let directory = put_disk(&home, "default");
    let other = home.path("other");
    fs::create_dir(&other).unwrap();
    let _backend = Home::listening(home.command(program()).arg("backend").env("XDG_RUNTIME_DIR", &other));
    let message = refused(&home.bulkhead(&["delete", "--force"]), 1);
    assert!(message.contains("different XDG_RUNTIME_DIR"), "{message}");
    assert!(directory.join("data.img").exists());
}

#[test]
fn what_links_lead_to_is_kept_and_named() {
    let home = Home::new();
    let precious = |name: &str| {
        let directory = home.path(name);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join("precious"), "x").unwrap();
        directory
    };
    let (inside, whole) = (precious("inside"), precious("whole"));
    let data = put_disk(&home, "default");
    fs::rename(data.join("data.img"), inside.join("data.img")).unwrap();
    symlink(inside.join("data.img"), data.join("data.img")).unwrap();
    symlink(&inside, data.join("link")).unwrap();
    fs::create_dir_all(home.path("state/bulkhead")).unwrap();
    symlink(&whole, home.path("state/bulkhead/default")).unwrap();
    let deleted = json(&home, &["delete", "--force", "--format", "json"]);
    let kept = deleted["kept"].as_array().unwrap().iter().map(|one| Path::new(one["name"].as_str().unwrap()));
    assert_eq!(kept.collect::<Vec<_>>(), [whole.as_path(), &inside.join("data.img")]);
    assert!(!data.exists() && fs::symlink_metadata(home.path("state/bulkhead/default")).is_err());
    for file in [inside.join("precious"), inside.join("data.img"), whole.join("precious")] {
        assert!(file.exists(), "{}", file.display());
    }
}

#[test]
fn the_current_docker_context_stays_and_is_named() {
    let home = Home::new();
    home.backend().kill();
    fs::write(home.path("docker/config.json"), r#"{"currentContext": "bulkhead"}"#).unwrap();
    let output = home.bulkhead(&["delete", "--force"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("kept bulkhead: the docker context is the current one"), "{text}");
    assert!(fs::read_dir(home.path("docker/contexts/meta")).unwrap().next().is_some());
}

#[test]
fn the_guest_images_are_no_profile_that_can_be_deleted() {
    let home = Home::new();
    let image = home.path("data/bulkhead/image");
    fs::create_dir_all(&image).unwrap();
    assert_eq!(home.bulkhead(&["--profile", "image", "delete", "--force"]).status.code(), Some(2));
    assert!(image.exists());
}
