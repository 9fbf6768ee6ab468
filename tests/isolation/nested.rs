//! Whole systems in a container: an engine, a service manager, compose; and many containers.

use std::{collections::BTreeSet, thread, time::Duration};

use support::{
    engine::{Engine, Isolation, engine},
    process::{poll, run},
};

use crate::{
    FIRST, shell,
    table::{
        Expect::{Holds, Says},
        check,
    },
};

/// Time for an inner system; the emulated machine is slow.
const UP: Duration = Duration::from_secs(240);

/// Containers at once in the VM; `guest/runtime/tests/bundles` makes 64 of them without one.
const AT_ONCE: usize = 4;

/// Starts and stops in the VM; there are 500 of them in `guest/runtime/tests/bundles`.
const CYCLES: usize = 4;

/// Starts an inner engine that has the image `alpine`; it goes with `remove_containers`.
fn inner_engine(engine: &Engine) -> Result<(), String> {
    engine.need_image("docker:dind", "dind.tar");
    if shell(engine, "docker exec inner docker image inspect alpine").status.success() {
        return Ok(());
    }
    engine.docker(&["rm", "--force", "--volumes", "inner"]);
    // A containerd that dockerd starts by itself has 15 s, which the emulated machine can exceed as long as the programs
    // are on the disk only.
    let line = "containerd >/dev/null 2>&1 & until [ -S /run/containerd/containerd.sock ]; do sleep 0.1; done; \
                exec dockerd --containerd=/run/containerd/containerd.sock";
    engine.docker(&["run", "--detach", "--privileged", "--name=inner", "docker:dind", "sh", "-c", line]).ok();
    let mut waited = Vec::new();
    let up = poll("the inner engine answers or ends", UP, || {
        let ran = shell(engine, "docker exec inner docker version --format '{{.Server.Version}}'");
        let ended = shell(engine, "docker inspect --format '{{.State.Running}}' inner").stdout.trim() != "true";
        waited.push(ran.stdout);
        thread::sleep(Duration::from_secs(2));
        (ran.status.success() || ended).then_some(!ended)
    });
    if !up {
        return Err(shell(engine, "docker logs --tail 20 inner").stdout);
    }
    check(
        engine,
        "docker exec -i inner docker load --quiet <\"$IMAGES/alpine.tar\"",
        Says("Loaded image: alpine:latest\n"),
    )
}

pub fn an_inner_engine_works(engine: &Engine) -> Result<(), String> {
    inner_engine(engine)?;
    // An inner container has the IDs of the container around it.
    let line = "docker exec inner docker run --rm alpine sh -c 'echo inner; cat /proc/self/uid_map'";
    let expected = "inner\n         0     100000      65536\n";
    check(engine, line, Says(expected))?;
    check(
        engine,
        "docker exec inner sh -c 'printf \"FROM alpine\\nRUN echo built >/built\\n\" | DOCKER_BUILDKIT=0 docker build -t made - >/dev/null 2>&1; \
         docker run --rm made cat /built'",
        Says("built\n"),
    )
}

pub fn an_inner_container_has_the_outer_ones_files(engine: &Engine) -> Result<(), String> {
    inner_engine(engine)?;
    // As long as the outer container runs, so more than a moment; both numbers are the same in the container's own file
    // only.
    let line = "docker exec inner cat /proc/uptime; docker exec inner docker run --rm alpine cat /proc/uptime
                docker exec inner docker run --rm --privileged alpine sh -c 'mount -t proc proc /mnt; cat /mnt/uptime'";
    check(engine, line, Holds(|said| crate::nodes::are_of_a_container(said, 3, 1800.0)))
}

pub fn compose_works_inside(engine: &Engine) -> Result<(), String> {
    const PROJECT: &str = "services:\n  store:\n    image: alpine\n    command: httpd -f -p 80 -h /etc\n    hostname: the-store\n  \
                           client:\n    image: alpine\n    depends_on: [store]\n    \
                           command: sh -c 'until wget -qO- http://store/hostname; do sleep 1; done'\n";
    inner_engine(engine)?;
    let write = ["exec", "-i", "inner", "sh", "-c", "mkdir -p /project && cat >/project/compose.yaml"];
    engine.docker_with(&write, PROJECT.as_bytes()).ok();
    let line = "docker exec -w /project inner docker compose up --detach 2>&1 | tail -n 3 >up || cat up
                for i in $(seq 60); do
                    docker exec -w /project inner docker compose logs --no-log-prefix client >log
                    grep -q the-store log && break; sleep 1
                done; cat log; grep -q the-store log || cat up";
    check(engine, line, Holds(|said| said.trim_end().ends_with("the-store")))
}

pub fn systemd_is_process_1(engine: &Engine) -> Result<(), String> {
    engine.need_image("systemd:latest", "systemd.tar");
    engine.docker(&["run", "--detach", "--privileged", "--name=services", "systemd"]).ok();
    let said = poll("systemd is up or has ended", UP, || {
        let ran = run(engine.home.docker_command(&["exec", "services", "systemctl", "is-system-running"]), UP);
        let state = format!("{}{}", ran.stdout, ran.stderr);
        thread::sleep(Duration::from_secs(2));
        let done = ["running", "degraded", "maintenance", "is not running"];
        done.iter().any(|word| state.contains(word)).then_some(state)
    });
    let failed = shell(engine, "docker exec services systemctl list-units --failed --plain --no-legend").stdout;
    if !matches!(said.trim(), "running" | "degraded") {
        return Err(format!("{said}{failed}{}", shell(engine, "docker logs --tail 20 services").stdout));
    }
    // Units that Sysbox's documentation names as ones that do not work, and one that loads modules, which this kernel
    // cannot do.
    let known = [
        "systemd-journald-audit.socket",
        "systemd-udev-trigger.service",
        "systemd-networkd-wait-online.service",
        "systemd-modules-load.service",
    ];
    let others: Vec<_> =
        failed.lines().filter(|line| !known.iter().any(|known| line.contains(known)) && !line.is_empty()).collect();
    if !others.is_empty() {
        return Err(format!("{} units failed: {others:?}", others.len()));
    }
    check(
        engine,
        "docker exec services sh -c 'cat /proc/1/comm /proc/1/uid_map'",
        Says("systemd\n         0     100000      65536\n"),
    )?;
    check(
        engine,
        "docker stop --time 60 services && docker inspect --format '{{.State.ExitCode}}' services",
        Holds(|said| {
            // systemd ends a halt by a signal to itself or returns 0.
            said == "services\n0\n" || said == "services\n130\n"
        }),
    )
}

pub fn no_range_is_lost(engine: &Engine) -> Result<(), String> {
    let runs: Vec<_> = (0..AT_ONCE)
        .map(|number| {
            let name = format!("--name=many-{number}");
            let line = "cat /proc/self/uid_map; exec sleep 3600";
            let command = engine.home.docker_command(&["run", "--detach", "--init", &name, "alpine", "sh", "-c", line]);
            thread::spawn(move || run(command, UP))
        })
        .collect();
    for run in runs {
        run.join().unwrap().ok();
    }
    let said = shell(engine, &format!("for i in $(seq 0 {}); do docker logs many-$i; done", AT_ONCE - 1)).stdout;
    let first = |line: &str| line.split_whitespace().nth(1).and_then(|id| id.parse::<usize>().ok());
    let given: BTreeSet<usize> = said.lines().filter_map(first).collect();
    let expected: BTreeSet<usize> = (0..AT_ONCE).map(|number| 100_000 + number * 65_536).collect();
    if given != expected {
        return Err(format!("{given:?}"));
    }
    engine.remove_containers();
    let line = format!("for i in $(seq {CYCLES}); do docker run --rm alpine cat /proc/self/uid_map; done");
    let said = shell(engine, &line).stdout;
    if said == FIRST.repeat(CYCLES) { Ok(()) } else { Err(said) }
}

/// kind's own commands, with a node of Debian's packages: all that kind does before Kubernetes' own programs are needed.
#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_node_of_kind_is_isolated() {
    let engine = engine(Isolation::On);
    engine.remove_containers();
    run_a_node_of_kind(&engine).unwrap();
}

fn run_a_node_of_kind(engine: &Engine) -> Result<(), String> {
    if !shell(engine, "kind version").status.success() {
        return Err("this machine has no kind".into());
    }
    engine.need_image("node:latest", "node.tar");
    let line = "kind create cluster --name=try --image=node:latest --retain --wait=0 >log 2>&1; cat log";
    check(engine, line, Holds(|said| said.contains("Starting control-plane") && said.contains("kubeadm")))?;
    check(
        engine,
        "docker exec try-control-plane cat /proc/1/comm /proc/1/uid_map",
        Says("systemd\n         0     100000      65536\n"),
    )?;
    // What Kubernetes would ask of the node: a container of its containerd.
    let run = "docker exec -i try-control-plane ctr images import - <\"$IMAGES/alpine.tar\" >log 2>&1 || cat log
               docker exec try-control-plane ctr run --rm docker.io/library/alpine:latest pod cat /proc/self/uid_map";
    let ran = check(engine, run, Says(FIRST));
    let removed = check(
        engine,
        "kind delete cluster --name=try >log 2>&1 || cat log; docker ps --all --quiet; docker network rm kind",
        Says("kind\n"),
    );
    ran.and(removed)
}
