//! The same commands with isolation on and off come to the same.

use std::thread;

use crate::{
    FIRST,
    cases::{CASES, Case, LATER},
    engine::{Engine, Isolation, engine},
    need_image, shell,
    table::{Expect, State, Table, check},
    wanted,
};

/// Cases that run at once.
const AT_ONCE: usize = 3;

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn everything_is_as_with_runc() {
    let mut table = Table::default();
    let cases: Vec<&Case> = CASES.iter().filter(|case| wanted(case.0)).collect();
    {
        let engine = engine(Isolation::Off);
        prepare(&engine);
        try_all(&engine, &mut table, "ECI off", &cases);
        // For row 20: what is made before isolation is switched on.
        engine.docker(&["create", "--name=before", "alpine", "cat", "/proc/self/uid_map"]).ok();
    }
    {
        let engine = engine(Isolation::On);
        let result = check(&engine, "docker start --attach before && docker rm before >removed", Expect::Says(FIRST));
        let state = result.map_or_else(State::Failed, |()| State::Passed);
        table.add("containers 20", "a container from before isolation is isolated", state);
        prepare(&engine);
        try_all(&engine, &mut table, "ECI on", &cases);
    }
    table.finish();
}

fn prepare(engine: &Engine) {
    engine.remove_containers();
    need_image(engine, "debian:latest", "debian.tar");
}

fn try_all(engine: &Engine, table: &mut Table, column: &str, cases: &[&Case]) {
    for some in cases.chunks(AT_ONCE) {
        let ended: Vec<State> = thread::scope(|scope| {
            let running: Vec<_> = some.iter().map(|case| scope.spawn(|| attempt(engine, case))).collect();
            running
                .into_iter()
                .map(|running| running.join().unwrap_or_else(|_| State::Failed("it panicked".into())))
                .collect()
        });
        for (Case(name, ..), state) in some.iter().zip(ended) {
            let later = LATER.iter().find(|(later, _)| later == name && column == "ECI on");
            let state = match (state, later) {
                (State::Failed(said), Some((_, why))) => State::NotBuilt(format!("{why}; {said}")),
                (state, _) => state,
            };
            table.add(column, name, state);
        }
    }
    engine.remove_containers();
    shell(engine, "docker volume prune --all --force");
}

fn attempt(engine: &Engine, Case(_, lines, expected): &Case) -> State {
    let said = shell(engine, lines).stdout;
    if said == *expected { State::Passed } else { State::Failed(format!("said {said:?}, not {expected:?}")) }
}
