//! Attempts to get out of a container: none may succeed with Enhanced Container Isolation on, and with it off the same
//! attempts show that they are real.
//!
//! Most of them are made by `probe`, a static program that runs in containers of different kinds and prints a line for
//! each; the others are options of `docker run` and races between containers. One table is printed at the end.
//!
//! `scripts/test escapes` runs this suite where KVM runs Linux guests, or inside the emulated AMD-V machine, with
//! `BULKHEAD_TEST_IMAGES` naming the directory of `tests/images/build` and `BULKHEAD_TEST_PROBE` the built program.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod api;
mod options;
mod races;
mod real;
mod shares;
mod table;

use std::{fs, path::PathBuf};

use real::Real;
use shares::engine;
use support::{
    engine::{Engine, Isolation},
    process::{self, COMMAND, run},
};
use table::{Column, Outcome, Shared, Table};

/// The image that has the probe in it, as its entry point.
const IMAGE: &str = "probe";

/// A volume for those who need one.
const VOLUME: &str = "escapes";

/// Read-only mounts and their names in the table. The last one is not for runc, which mounts nothing below procfs.
const MOUNTS: [(&str, &str); 7] = [
    ("/", "read-only root"),
    ("/ro", "read-only volume"),
    ("/dev/ro", "read-only volume below /dev"),
    ("/tmpfs/ro", "read-only volume below a tmpfs"),
    ("/odd/ro", "read-only volume below another tmpfs"),
    ("/sys/bus", "read-only volume below /sys"),
    ("/proc/tty", "read-only volume below /proc"),
];

fn probe() -> PathBuf {
    std::env::var_os("BULKHEAD_TEST_PROBE").expect("BULKHEAD_TEST_PROBE names the built probe").into()
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn no_attempt_gets_out_of_an_isolated_container() {
    let mut table = Shared::lock();
    {
        let engine = engine(Isolation::On);
        make_image(&engine);
        let victim = start_victim(&engine);
        attempts(&engine, &mut table, &victim, [Column::On, Column::OnPrivileged]);
        in_other_ways(&engine, &mut table, &victim);
        options::try_all(&engine, &mut table, &[Column::On, Column::OnPrivileged]);
        races::try_all(&engine, &mut table, Column::On);
        engine.docker(&["rm", "--force", "victim"]).ok();
    }
    races::look_for_marks(&engine(Isolation::Off), &mut table);
    table.judge_isolation();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn shares_lead_to_nothing_else_of_the_host() {
    let mut table = Table::default();
    let engine = engine(Isolation::On);
    make_image(&engine);
    shares::without_a_wall(&mut table);
    shares::in_containers(&engine, &mut table, [Column::On, Column::OnPrivileged]);
    shares::as_sources(&engine, &mut table, Column::On);
    engine.remove_containers();
    table.print();
    shares::judge(&table, &[Column::On, Column::OnPrivileged]);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_attempts_are_real_as_they_succeed_without_isolation() {
    let mut table = Shared::lock();
    let engine = engine(Isolation::Off);
    make_image(&engine);
    let victim = start_victim(&engine);
    attempts(&engine, &mut table, &victim, [Column::Off, Column::OffPrivileged]);
    options::try_all(&engine, &mut table, &[Column::OffPrivileged]);
    engine.remove_containers();
    table.judge_reality();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn requests_to_the_engine_reach_nothing_of_the_vm() {
    requests(Isolation::On, Column::On, |_| false);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_walls_of_shares_stand_without_isolation() {
    let mut table = Table::default();
    let engine = engine(Isolation::Off);
    make_image(&engine);
    shares::without_a_wall(&mut table);
    shares::in_containers(&engine, &mut table, [Column::Off, Column::OffPrivileged]);
    engine.remove_containers();
    table.print();
    shares::judge(&table, &[Column::Off, Column::OffPrivileged]);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_requests_are_real_as_they_succeed_without_isolation() {
    requests(Isolation::Off, Column::Off, |real| !matches!(real, Real::Never(_)));
}

/// Makes each request to an engine; `succeeds` says whether it has to have its effect there.
fn requests(isolation: Isolation, column: Column, succeeds: impl Fn(Real) -> bool) {
    let mut table = Table::default();
    let engine = engine(isolation);
    make_image(&engine);
    api::try_all(&engine, &mut table, column);
    engine.remove_containers();
    table.print();
    table.judge_requests(column, api::all().map(|(name, real)| (name, succeeds(real))));
}

fn make_image(engine: &Engine) {
    if engine.get(&format!("/images/{IMAGE}/json")).0 == 200 {
        return;
    }
    engine.docker(&["rm", "--force", "made", "victim"]);
    let make = ["run", "-i", "--name=made", "alpine", "sh", "-c", "cat >/probe && chmod 0755 /probe"];
    engine.docker_with(&make, &fs::read(probe()).unwrap()).ok();
    engine.docker(&["commit", "--change", r#"ENTRYPOINT ["/probe"]"#, "--change", "CMD []", "made", IMAGE]).ok();
    engine.docker(&["rm", "made"]).ok();
}

/// Starts a container that has a key; returns the variable from which the other containers know the key.
fn start_victim(engine: &Engine) -> String {
    engine.docker(&["rm", "--force", "victim"]);
    engine.docker(&["run", "--detach", "--name=victim", "--privileged", IMAGE, "victim"]).ok();
    let logs = process::poll("the victim has a key", COMMAND, || {
        Some(engine.docker(&["logs", "victim"]).ok()).filter(|logs| logs.contains('\n'))
    });
    let key = logs.trim().strip_prefix("key ").unwrap_or_else(|| panic!("{logs}"));
    format!("VICTIM_KEY={key}")
}

/// The attempts of the probe in a container of its own, as it is and privileged.
fn attempts(engine: &Engine, table: &mut Table, victim: &str, columns: [Column; 2]) {
    for (column, privileged) in columns.into_iter().zip([None, Some("--privileged")]) {
        let volume = format!("{VOLUME}:/vol");
        let mut arguments = vec!["run", "--rm", "-e", victim, "-v", &volume];
        arguments.extend(privileged);
        arguments.extend([IMAGE, "all"]);
        let lines = table::lines(&engine.docker(&arguments).ok());
        assert!(lines.len() > 40, "the probe ended early: {lines:?}");
        table.extend(column, lines);

        read_only_mounts(engine, table, column, privileged);
    }
}

/// The ways to make a read-only mount writable.
fn read_only_mounts(engine: &Engine, table: &mut Table, column: Column, privileged: Option<&str>) {
    let places = if column.isolated() { &MOUNTS[..] } else { &MOUNTS[..MOUNTS.len() - 1] };
    let volumes = places[1..].iter().map(|(path, _)| format!("--volume={VOLUME}:{path}:ro"));
    // The runtime knows all options of the first tmpfs and leaves the second to crun.
    let options = ["run", "--rm", "--read-only", "--tmpfs=/tmpfs", "--tmpfs=/odd:nodiratime"];
    let mut arguments: Vec<String> = options.map(Into::into).into();
    arguments.extend(volumes.chain(privileged.map(Into::into)));
    arguments.extend([IMAGE, "mounts", "ro"].map(Into::into));
    arguments.extend(places.iter().map(|(path, _)| (*path).to_owned()));
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let lines = table::lines(&engine.docker(&arguments).ok());
    for (path, name) in places {
        let of_path = lines.iter().filter(|(name, _)| name.split(", ").nth(1) == Some(path));
        table.set(column, name, table::any(of_path.map(|(way, outcome)| (way.as_str(), outcome))));
    }
}

/// The same attempts where a process comes into a container, or a container to be, in another way.
fn in_other_ways(engine: &Engine, table: &mut Table, victim: &str) {
    let profile = engine.home.path("profile.json");
    fs::write(&profile, r#"{"defaultAction":"SCMP_ACT_ALLOW"}"#).unwrap();
    let profile = format!("--security-opt=seccomp={}", profile.display());
    let open = ["--cap-add=ALL", "--security-opt=systempaths=unconfined", "--security-opt=apparmor=unconfined"];
    for (way, seccomp) in [("unconfined", "--security-opt=seccomp=unconfined"), ("a profile of one's own", &profile)] {
        let mut arguments = vec!["run", "--rm", "-e", victim, seccomp];
        arguments.extend(open);
        arguments.extend([IMAGE, "all"]);
        table.extra(way, table::lines(&engine.docker(&arguments).ok()));
    }
    engine.docker(&["rm", "--force", "host"]);
    engine.docker(&["run", "--detach", "--name=host", "--entrypoint=sleep", IMAGE, "3600"]).ok();
    for (way, privileged) in [("docker exec", None), ("docker exec --privileged", Some("--privileged"))] {
        let mut arguments = vec!["exec", "-e", victim];
        arguments.extend(privileged);
        arguments.extend(["host", "/probe", "all"]);
        table.extra(way, table::lines(&engine.docker(&arguments).ok()));
    }
    for fd in 3..13 {
        let directory = format!("--workdir=/proc/self/fd/{fd}");
        let ran = engine.docker(&["exec", &directory, "host", "/probe", "only", "working directory"]);
        let way = format!("docker exec, working directory {fd}");
        if ran.status.success() {
            table.extra(&way, table::lines(&ran.stdout));
        } else {
            table.extra(&way, vec![("working directory".into(), Outcome::Refused(ran.stderr))]);
        }
    }
    engine.docker(&["rm", "--force", "host"]).ok();
    table.extra("a step of a build", table::lines(&build(engine, &[]).ok()));
}

/// A build whose step is the probe.
fn build(engine: &Engine, options: &[&str]) -> process::Ran {
    let directory = engine.home.path("escape-build");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("Dockerfile"), format!("FROM {IMAGE}\nRUN [\"/probe\", \"all\"]\n")).unwrap();
    let mut arguments = vec!["build", "--no-cache", "--rm"];
    arguments.extend(options);
    let directory = directory.display().to_string();
    arguments.push(&directory);
    let mut command = engine.home.docker_command(&arguments);
    command.env("DOCKER_BUILDKIT", "0");
    run(command, COMMAND)
}
