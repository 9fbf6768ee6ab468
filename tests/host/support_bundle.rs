//! The bundle of `support`: what is in it, and what is not.

use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    path::Path,
    process::Command,
};

use serde_json::Value;
use support::program;

use crate::home::{Home, refused};

/// Unpacks a bundle with tar(1) and returns all of it as one text.
fn unpack(bundle: &Path, place: &Path) -> String {
    fs::create_dir(place).unwrap();
    let output = Command::new("tar").arg("-xzf").arg(bundle).arg("-C").arg(place).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let files = fs::read_dir(place.join("bulkhead-support")).unwrap().flatten();
    files.map(|file| fs::read_to_string(file.path()).unwrap()).collect()
}

#[test]
fn a_bundle_has_facts_and_logs_and_no_secret() {
    let home = Home::new();
    for (key, value) in [
        ("overrideProxyHttp", "http://me:s3cret@proxy.corp.example:3128"),
        ("overrideProxyExclude", ".s3cret.example"),
        ("dockerDaemonOptions", r#"{"registry-mirrors": ["https://s3cret.example"]}"#),
        ("dockerSocketMount", r#"{"imageList": {"images": ["s3cret/image"]}}"#),
        ("cpus", "3"),
    ] {
        let output = home.bulkhead(&["settings", "set", key, value]);
        assert!(output.status.success(), "{output:?}");
    }
    let state = home.path("state/bulkhead/default");
    fs::create_dir_all(&state).unwrap();
    let console = "[    0.1] kernel line\ndockerd: pulling s3cret/image\nbulkhead-init: \u{1b}[31mready\n";
    fs::write(state.join("console.log"), console).unwrap();
    fs::write(state.join("backend.log"), "cannot connect to http://me:s3cret@proxy:1\n").unwrap();
    let bundle = home.path("bundle.tar.gz");
    let mut command = home.command(program());
    command.env("SOME_TOKEN", "s3cret").args(["support", "--format", "json", "--output"]).arg(&bundle);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(fs::metadata(&bundle).unwrap().mode() & 0o777, 0o600);
    let text = unpack(&bundle, &home.path("unpacked"));
    assert!(!text.contains("s3cret"), "{text}");
    for expected in ["kernel line\nbulkhead-init: ready\n", "http://***@proxy:1", "\"cpus\": 3", "(set)"] {
        assert!(text.contains(expected), "{expected}: {text}");
    }
    let listed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let names = listed["entries"].as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap());
    let expected = [
        "version.json",
        "host.json",
        "doctor.json",
        "status.json",
        "settings.json",
        "policy.json",
        "backend.log",
        "console.log",
    ];
    assert_eq!(names.collect::<Vec<_>>(), expected);
    for entry in listed["entries"].as_array().unwrap() {
        let file = home.path("unpacked/bulkhead-support").join(entry["name"].as_str().unwrap());
        assert_eq!(fs::metadata(file).unwrap().len(), entry["bytes"], "{entry}");
    }
}

#[test]
fn the_engines_lines_are_included_on_request() {
    let home = Home::new();
    let state = home.path("state/bulkhead/default");
    fs::create_dir_all(&state).unwrap();
    fs::write(state.join("console.log"), "dockerd: a line of the engine\n").unwrap();
    let bundle = home.path("bundle.tar.gz");
    let output = home.bulkhead(&["support", "--engine-log", "--output", bundle.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("console.log    30 bytes"), "{output:?}");
    assert!(unpack(&bundle, &home.path("unpacked")).contains("a line of the engine"));
}

#[test]
fn a_bundle_replaces_no_file_and_follows_no_link() {
    let home = Home::new();
    let (file, link) = (home.path("file"), home.path("link"));
    fs::write(&file, "precious").unwrap();
    symlink(home.path("target"), &link).unwrap();
    for path in [&file, &link] {
        let message = refused(&home.bulkhead(&["support", "--output", path.to_str().unwrap()]), 1);
        assert!(message.contains("choose another with --output"), "{message}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
    assert!(!home.path("target").exists());
}
