//! The step of the GitHub Action.

use std::{fs, path::Path};

use support::{
    engine::{Isolation, engine},
    process::{COMMAND, run},
    program,
};

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn the_github_action_leads_the_steps_that_follow_to_the_engine() {
    let engine = engine(Isolation::Either);
    let (outputs, variables) = (engine.home.path("outputs"), engine.home.path("variables"));
    let mut step = engine.home.command(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/github-action"));
    step.env("INPUT_PROGRAM", program()).env("INPUT_SET_HOST", "true").env("INPUT_CONTEXT", "job");
    step.env("GITHUB_OUTPUT", &outputs).env("GITHUB_ENV", &variables).env("GITHUB_ACTIONS", "true");
    run(step, COMMAND).ok();
    let host = format!("unix://{}", engine.home.docker_socket().display());
    assert_eq!(fs::read_to_string(outputs).unwrap(), format!("sock={host}\ncontext=job\n"));
    assert_eq!(fs::read_to_string(variables).unwrap(), format!("DOCKER_HOST={host}\nBULKHEAD_PROFILE=default\n"));
    // Without a context in its command, docker takes the current one.
    let mut docker = engine.home.command("docker");
    docker.args(["version", "--format", "{{.Server.Os}}"]);
    assert_eq!(run(docker, COMMAND).ok(), "linux\n");
    for arguments in [["use", "default"], ["rm", "job"]] {
        let mut docker = engine.home.command("docker");
        docker.arg("context").args(arguments);
        run(docker, COMMAND).ok();
    }
}
