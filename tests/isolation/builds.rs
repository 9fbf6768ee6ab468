//! Both builders.

use std::fs;

use support::engine::{Engine, Isolation, engine};

use crate::{
    FIRST, directory, shell,
    table::{Expect, check},
};

/// Returns whether a build's step printed a range of 65536 IDs that does not overlap the VM's own.
fn is_a_range(said: &str) -> bool {
    said.lines().any(|line| {
        // BuildKit puts its own words before a step's.
        let ids: Vec<u32> = line.split_whitespace().rev().map_while(|word| word.parse().ok()).collect();
        matches!(ids[..], [65536, first, 0, ..] if first >= 100_000)
            || matches!(ids[..], [65536, first] if first >= 100_000)
    })
}

pub fn steps_are_isolated(engine: &Engine) -> Result<(), String> {
    let context = directory(engine.home).join("steps");
    fs::create_dir_all(&context).unwrap();
    fs::write(context.join("Dockerfile"), "FROM alpine\nRUN cat /proc/self/uid_map\n").unwrap();
    check(engine, "DOCKER_BUILDKIT=0 docker build --no-cache --rm steps", Expect::Holds(is_a_range))?;
    if !has_buildx(engine) {
        return Err("this machine has no docker-buildx".into());
    }
    check(engine, "DOCKER_BUILDKIT=1 docker build --no-cache --progress=plain steps", Expect::Holds(is_a_range))
}

pub fn has_buildx(engine: &Engine) -> bool {
    shell(engine, "docker buildx version").status.success()
}

pub fn entitlements_are_refused(engine: &Engine) -> Result<(), String> {
    let context = directory(engine.home).join("entitled");
    fs::create_dir_all(&context).unwrap();
    fs::write(context.join("Dockerfile"), "FROM alpine\nRUN ip address\n").unwrap();
    let insecure = "# syntax=docker/dockerfile:1-labs\nFROM alpine\nRUN --security=insecure id\n";
    fs::write(context.join("Insecure"), insecure.split_once('\n').unwrap().1).unwrap();
    let refused = "sysbox containers can't share a network namespace with the host";
    check(engine, "DOCKER_BUILDKIT=0 docker build --rm --no-cache --network=host entitled", Expect::Fails(1, refused))?;
    if !has_buildx(engine) {
        return Err("this machine has no docker-buildx".into());
    }
    let refused = "granting entitlement network.host is not allowed by build daemon configuration";
    for options in ["--network=host", "--network=host --allow=network.host"] {
        let line = format!("docker buildx build --no-cache {options} entitled");
        check(engine, &line, Expect::Fails(1, refused))?;
    }
    let refused = "granting entitlement security.insecure is not allowed by build daemon configuration";
    check(
        engine,
        "docker buildx build --no-cache --allow=security.insecure -f entitled/Insecure entitled",
        Expect::Fails(1, refused),
    )
}

/// A builder that runs in a container of its own, which buildx makes with `--privileged`. Its image is on the engine.
#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_builder_in_a_container_is_isolated() {
    let engine = engine(Isolation::On);
    engine.remove_containers();
    build_in_a_container(&engine).unwrap();
}

fn build_in_a_container(engine: &Engine) -> Result<(), String> {
    if !has_buildx(engine) {
        return Err("this machine has no docker-buildx".into());
    }
    engine.need_image("moby/buildkit:buildx-stable-1", "builder.tar");
    check(
        engine,
        "docker buildx create --driver=docker-container --name=apart --bootstrap >log && docker buildx inspect apart >>log || cat log
         docker exec buildx_buildkit_apart0 cat /proc/self/uid_map",
        Expect::Says(FIRST),
    )?;
    // The builder does not see the engine's images, so the build gets alpine's files from the client. Its steps have the
    // ids of the container around them.
    let built = check(
        engine,
        "mkdir -p apart; docker create --name=files alpine; docker export files >apart/files.tar; docker rm files
         printf 'FROM scratch\\nADD files.tar /\\nRUN cat /proc/self/uid_map >/map\\n' >apart/Dockerfile
         docker buildx build --builder=apart --load --tag=apart apart >log 2>&1 || cat log
         docker run --rm apart cat /map",
        Expect::Holds(|said| said.ends_with(FIRST)),
    );
    let removed =
        check(engine, "docker buildx rm apart 2>&1; docker ps --all --quiet", Expect::Says("apart removed\n"));
    built.and(removed)
}
