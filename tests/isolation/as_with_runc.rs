//! The same commands have the same output with isolation on and off.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use support::engine::{Engine, ISOLATION, Isolation, engine, engine_with};

use crate::{
    FIRST,
    cases::{CASES, Case, DOCKER_PY, LATER, MORE_CASES},
    shell,
    table::{Expect, State, Table, check, guarded},
    wanted,
};

/// Cases that run at once.
const AT_ONCE: usize = 3;

/// Exceptions are rules of isolation and have no effect without it.
const EXCEPTIONS: &str = r#"{"imageList": {"images": ["docker:cli"]}, "commandList": {"commands": ["push"]}}"#;

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn commands_without_isolation() {
    let mut table = Table::default();
    let engine = engine_with(&[(ISOLATION, "false"), ("dockerSocketMount", EXCEPTIONS)]);
    try_all(&engine, &mut table, "ECI off", CASES);
    try_all(&engine, &mut table, "ECI off", MORE_CASES);
    table.finish("Docker without isolation");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolation_is_turned_on() {
    let mut table = Table::default();
    let engine = engine_with(&[(ISOLATION, "false"), ("dockerSocketMount", EXCEPTIONS)]);
    engine.remove_containers();
    table.add("socket", "isolation off: all may mount it, without rules", all_may_mount_the_socket(&engine).into());
    engine.write_settings(&[(ISOLATION, "false")]);
    turn_on(&engine, &mut table);
    table.finish("Isolation turned on");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn more_of_the_commands_with_isolation() {
    let mut table = Table::default();
    try_all(&engine(Isolation::On), &mut table, "ECI on", MORE_CASES);
    table.finish("More of docker with isolation");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_same_commands_with_isolation() {
    let mut table = Table::default();
    try_all(&engine(Isolation::On), &mut table, "ECI on", CASES);
    table.finish("Docker with isolation");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_usual_calls_of_docker_py() {
    let mut table = Table::default();
    let engine = engine(Isolation::On);
    table.add("ECI on", DOCKER_PY.0, attempt(&engine, &DOCKER_PY).into());
    table.finish("docker-py with isolation");
}

fn all_may_mount_the_socket(engine: &Engine) -> Result<(), String> {
    engine.need_image("docker:cli", "docker.tar");
    check(engine, "docker run --rm $S alpine test -S /var/run/docker.sock", Expect::Says(""))?;
    let line = "docker run --rm $S docker:cli sh -c 'docker ps --format \"{{.Image}}\"; docker push no/such:image'";
    check(
        engine,
        line,
        Expect::Fails(
            1,
            "docker:cli\nThe push refers to repository [docker.io/no/such]\n\
                                          An image does not exist locally with the tag: no/such",
        ),
    )
}

/// Row 20: containers from before isolation are named when it is turned on, and isolated from then on.
fn turn_on(engine: &Engine, table: &mut Table) {
    // Newest first.
    const BEFORE: &str =
        "created before Enhanced Container Isolation was turned on: before, on-nothing, on-card; they ";
    run_on_networks(engine);
    engine.docker(&["create", "--name=before", "alpine", "cat", "/proc/self/uid_map"]).ok();
    let mut says = |line: &str, rest: &str| {
        let said = shell(engine, line).stdout;
        let result = if said.contains(&format!("{BEFORE}{rest}")) { Ok(()) } else { Err(said) };
        table.add("containers 20", &format!("{line}: names containers from before"), result.into());
    };
    says("bulkhead settings set enhancedContainerIsolation true", "run without it until the next restart");
    says("bulkhead restart --timeout 220", "are isolated like all others");
    engine.write_settings(&[(ISOLATION, "true")]);
    engine.note_start();
    says("bulkhead status", "are isolated like all others");
    // First, since the one of them that runs again has the first range of ids.
    networks_from_before(engine, table);
    let result = check(engine, "docker start --attach before && docker rm before >removed", Expect::Says(FIRST));
    table.add("containers 20", "a container from before isolation is isolated", result.into());
}

/// Runs two containers that the engine starts again by itself: one on the VM's card, and one on a network of the same
/// driver that leads nowhere.
fn run_on_networks(engine: &Engine) {
    for (name, parent) in [("on-card", &["--opt=parent=eth0"][..]), ("on-nothing", &[])] {
        let network = ["network", "create", "--driver=macvlan", name];
        engine.docker(&[&network[..], parent].concat()).ok();
        let network = format!("--network={name}");
        engine.docker(&["run", "-d", "--restart=always", &network, "--name", name, "alpine", "sleep", "1000"]).ok();
    }
}

/// No request names the network when the engine starts a container again; the runtime sees the device.
fn networks_from_before(engine: &Engine, table: &mut Table) {
    let inspect = |name| format!("docker inspect --format '{{{{.State.Running}}}} {{{{.State.Error}}}}' {name}");
    let is_refused = |said: &str| said.starts_with("false ") && said.contains("parent device \"eth0\" is not allowed");
    let result = check(engine, &inspect("on-card"), Expect::Holds(is_refused));
    table.add("networks", "a container on the VM's card is not started again by the engine", result.into());
    let result = check(engine, &inspect("on-nothing"), Expect::Holds(|said| said.starts_with("true ")));
    table.add("networks", "a container on a network that leads nowhere is", result.into());
    let line = "docker rm -f on-card on-nothing && docker network rm on-card on-nothing";
    let removed = check(engine, line, Expect::Holds(|said| said.lines().count() == 4));
    table.add("networks", "both and their networks can be removed", removed.into());
}

fn try_all(engine: &Engine, table: &mut Table, column: &str, cases: &[Case]) {
    engine.remove_containers();
    engine.need_image("debian:latest", "debian.tar");
    let cases: Vec<&Case> = cases.iter().filter(|case| wanted(case.0)).collect();
    if cases.iter().any(|case| case.1.contains(" servers >")) {
        engine.need_image("servers:latest", "servers.tar");
    }
    let next = AtomicUsize::new(0);
    let work = || {
        let mut ended = Vec::new();
        while let Some(case) = cases.get(next.fetch_add(1, Ordering::Relaxed)) {
            ended.push((case.0, guarded(|| attempt(engine, case)).into()));
        }
        ended
    };
    let ended: Vec<(&str, State)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
    });
    for (name, state) in ended {
        let later = LATER.iter().find(|(later, _)| *later == name && column == "ECI on");
        let state = match (state, later) {
            (State::Failed(said), Some((_, why))) => State::NotBuilt(format!("{why}; {said}")),
            (state, _) => state,
        };
        table.add(column, name, state);
    }
    engine.remove_containers();
    shell(engine, "docker volume prune --all --force");
}

fn attempt(engine: &Engine, Case(_, lines, expected): &Case) -> Result<(), String> {
    let said = shell(engine, lines).stdout;
    if said == *expected { Ok(()) } else { Err(format!("said {said:?}, not {expected:?}")) }
}
