//! Links that are put in the way while the engine and the runtime follow a path.
//!
//! A lost race leaves a file in the VM, which only a container without isolation can see.

use std::fs;

use support::engine::Engine;

use crate::{
    IMAGE,
    table::{Column, Outcome, Table},
};

/// The file that a lost race leaves in the VM's directory, and the race's name in the table.
const MARKS: [(&str, &str); 3] = [
    ("escaped-bind", "race of a bind's target"),
    ("escaped-copy", "race of docker cp"),
    ("escaped-link", "link under docker cp"),
];

/// Rounds of each race.
const ROUNDS: usize = 3;

/// Races with a container that keeps replacing a directory of a volume by a link to the VM's and back.
pub fn try_all(engine: &Engine, table: &mut Table, column: Column) {
    engine.docker(&["rm", "--force", "flip", "link"]);
    engine.docker(&["run", "--detach", "--name=flip", "--volume=race:/v", IMAGE, "flip", "/v", "60"]).ok();
    let mut seen = Outcome::Refused(format!("{ROUNDS} rounds"));
    let file = engine.home.path("copied");
    fs::write(&file, "x").unwrap();
    let file = file.to_str().unwrap();
    for round in 0..ROUNDS {
        let mark = format!("--volume=race2:/v/turn/escaped-bind-{round}");
        engine.docker(&["run", "--rm", "--volume=race:/v", &mark, "alpine", "true"]);
        let subpath = "--mount=type=volume,src=race,dst=/m,volume-subpath=turn";
        let listed = engine.docker(&["run", "--rm", subpath, "alpine", "ls", "/m"]);
        if listed.stdout.contains("overlay2") {
            seen = Outcome::Open(listed.stdout);
        }
        engine.docker(&["cp", file, &format!("flip:/v/turn/escaped-copy-{round}")]);
    }
    table.set(column, "race of a volume's directory", seen);
    engine.docker(&["rm", "--force", "flip"]).ok();

    let line = "ln -s /var/lib/docker /x; ln -s ../../../../../../var/lib/docker /y";
    engine.docker(&["run", "--name=link", "alpine", "sh", "-c", line]).ok();
    for link in ["x", "y"] {
        engine.docker(&["cp", file, &format!("link:/{link}/escaped-link-{link}")]);
    }
    engine.docker(&["rm", "--force", "link"]).ok();
}

/// Looks for what the races left; isolation has to be off for that.
pub fn look_for_marks(engine: &Engine, table: &mut Table) {
    let arguments = ["run", "--rm", "--volume=/var/lib/docker:/host", "alpine", "ls", "/host"];
    let names = engine.docker(&arguments).ok();
    assert!(names.contains("overlay2"), "that is not the engine's directory: {names}");
    for (mark, row) in MARKS {
        let found: Vec<_> = names.lines().filter(|name| name.starts_with(mark)).collect();
        let outcome = if found.is_empty() {
            Outcome::Refused("no file in the VM".into())
        } else {
            Outcome::Open(found.join(" "))
        };
        table.set(Column::On, row, outcome);
    }
}
