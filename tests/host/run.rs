//! `run` and `env` as far as they go without an engine: exit statuses and files of variables.

use std::{fs, os::unix::fs::PermissionsExt};

use support::program;

use crate::home::{Home, refused};

fn profiles(home: &Home) -> usize {
    let directories = ["data", "state", "run", "config"].map(|name| home.path(name).join("bulkhead"));
    directories.into_iter().filter_map(|directory| fs::read_dir(directory).ok()).flatten().count()
}

#[test]
fn a_command_that_cannot_be_run_has_the_status_of_shells_and_starts_no_engine() {
    let home = Home::new();
    let (plain, directory) = (home.path("plain"), home.path("bin"));
    fs::create_dir(&directory).unwrap();
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    fs::copy(&plain, directory.join("closed")).unwrap();
    let status = |command: &str| {
        let mut run = home.command(program());
        run.env("PATH", &directory).args(["run", "--", command]);
        run.output().unwrap()
    };
    for missing in ["no-such-program", "/nonexistent/program"] {
        let message = refused(&status(missing), 127);
        assert!(message.contains(&format!("cannot run {missing}: there is no such program")), "{message}");
    }
    assert!(refused(&status(plain.to_str().unwrap()), 126).contains("Permission denied"));
    assert!(refused(&status("closed"), 126).contains("Permission denied"));
    refused(&status("/"), 126);
    assert_eq!(profiles(&home), 0);
}

#[test]
fn the_command_is_looked_for_in_the_path_of_the_file_of_variables() {
    let home = Home::new();
    let file = home.path("variables");
    fs::write(&file, "PATH=/nonexistent\n").unwrap();
    refused(&home.bulkhead(&["run", "--env-file", file.to_str().unwrap(), "--", "true"]), 127);
}

#[test]
fn a_file_of_variables_that_cannot_be_used_is_status_125_with_the_line() {
    let home = Home::new();
    let file = home.path("variables");
    let run = || home.bulkhead(&["run", "--env-file", file.to_str().unwrap(), "--", "true"]);
    assert!(refused(&run(), 125).contains("No such file"));
    fs::write(&file, "A=1\nB C=s3cret\n").unwrap();
    let message = refused(&run(), 125);
    assert!(message.contains("variables: line 2 has a name with white space") && !message.contains("s3cret"));
    assert_eq!(profiles(&home), 0);
}

#[test]
fn env_adds_the_variables_to_the_file_of_a_ci_system() {
    let home = Home::new();
    let file = home.path("github-env");
    fs::write(&file, "BEFORE=1\n").unwrap();
    let output = home.bulkhead(&["--profile", "ci", "env", "--publish-env", file.to_str().unwrap()]);
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    let socket = home.path("run/bulkhead/ci/docker.sock");
    let expected = format!("BEFORE=1\nDOCKER_HOST=unix://{}\nBULKHEAD_PROFILE=ci\n", socket.display());
    assert_eq!(fs::read_to_string(&file).unwrap(), expected);
    let refused = refused(&home.bulkhead(&["env", "--publish-env", "/nonexistent/file"]), 1);
    assert!(refused.contains("cannot use the file of variables /nonexistent/file"), "{refused}");
}
