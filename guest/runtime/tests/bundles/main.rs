//! The isolating runtime with crun on this kernel, without a VM or an engine: many bundles at once, many one after the
//! other, and the cost of isolation.
//!
//! `scripts/test bundles` runs it as root, with `BULKHEAD_TEST_USERLAND` naming the tar of the guest's user land,
//! `BULKHEAD_TEST_IMAGES` the directory of `tests/images/build`, `BULKHEAD_TEST_PROCFS` and `BULKHEAD_TEST_INIT` the
//! programs of the procfs service and of init, and `BULKHEAD_TEST_PROBE` the one that makes the attempts.

// A helper that cannot go on panics, as the test itself does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod binds;
mod engine_files;
mod engine_jail;
mod engine_source;
mod guest_root;
mod owners;
mod procfs;
mod settings;

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use guest_root::{CRUN, GuestRoot, Kernel, RUNTIME};

/// Containers that run at once.
const AT_ONCE: usize = 64;

/// Starts and stops, one after the other.
const CYCLES: usize = 500;

/// Pairs of runs to compare.
const ROUNDS: usize = 41;

/// Files to unpack and stat.
const FILES: usize = 20_000;

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn containers_have_their_own_ranges_and_500_cycles_leave_nothing() {
    GuestRoot::with(|root| many(&root));
}

fn many(root: &GuestRoot) {
    let script = "cat /proc/self/uid_map; cat /proc/uptime >/dev/null; exec sleep 1000";
    // Their mount calls are reported to the procfs service, which must keep nothing either.
    root.privileged_bundle("b", &["sh", "-c", script], false);
    // The first run makes some things for good: the table's directory and lock, the staging area.
    cycle(root, "warm-up");
    let before = Kernel::now(root);

    let start = Instant::now();
    let names: Vec<_> = (0..AT_ONCE).map(|number| format!("at-once-{number}")).collect();
    for name in &names {
        root.copy_bundle("b", name);
        root.start(RUNTIME, name);
    }
    let expected: BTreeSet<u32> = (0..AT_ONCE as u32).map(|number| 100_000 + number * 65_536).collect();
    let given: BTreeSet<u32> = names.iter().map(|name| root.range(name)).collect();
    assert_eq!(given, expected, "each has the lowest free range");
    assert_eq!(root.records(), AT_ONCE, "one record for each");
    let during = Kernel::now(root);
    assert_eq!(during.mounts, before.mounts + AT_ONCE, "only the engine's own mount of each root is in the VM");
    assert_eq!(during.processes, before.processes + AT_ONCE, "only the container's process stays");
    for name in &names {
        root.end(RUNTIME, name);
    }
    println!("{AT_ONCE} at once: {:.1} s", start.elapsed().as_secs_f64());
    // The next create removes the records of the dead.
    cycle(root, "after");
    let after = Kernel::now(root);
    println!("before {before:?}\nduring {during:?}\nafter  {after:?}");
    after.assert_no_more_than(before);

    let start = Instant::now();
    for number in 0..CYCLES {
        cycle(root, &format!("cycle-{number}"));
    }
    println!("{CYCLES} cycles: {:.1} s", start.elapsed().as_secs_f64());
    let after = Kernel::now(root);
    println!("after  {after:?}");
    after.assert_no_more_than(before);
    assert!(root.records() <= 1, "records of the dead are removed by the next create");
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_procfs_that_the_container_mounts_has_its_own_files() {
    GuestRoot::with(|root| {
        own_procfs(&root, false);
        own_procfs(&root, true);
    });
}

fn own_procfs(root: &GuestRoot, no_new_privileges: bool) {
    let script = "mount -t proc proc /mnt && cat /mnt/uptime && umount /mnt && ls /mnt | wc -l && \
                  unshare -pf --mount-proc cat /proc/uptime && cat /proc/self/status | grep Seccomp_filters";
    root.privileged_bundle("p", &["sh", "-c", script], no_new_privileges);
    let output = root.run(RUNTIME, "p");
    root.remove("p");
    let lines: Vec<_> = output.lines().collect();
    let [fresh, left, unshared, filters] = lines[..] else { panic!("{output}") };
    for line in [fresh, unshared] {
        // In the container's own file both numbers are the same.
        let fields: Vec<_> = line.split_whitespace().collect();
        assert!(fields.len() == 2 && fields[0] == fields[1], "{output}");
    }
    assert_eq!(left, "0");
    assert!(filters.ends_with('2'), "the runtime's own and the one that reports: {filters}");
    // An engine's profile refuses mounts; it stays unchanged.
    root.bundle("q", &["sh", "-c", "mount -t proc proc /mnt 2>&1; sleep 1; true"]);
    assert!(root.run(RUNTIME, "q").contains("permission denied"));
    root.remove("q");
    assert_eq!(root.procfs().listeners(), 0, "those of the containers that ended are gone");
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn a_container_can_set_its_hostname_in_any_procfs_that_it_may_write() {
    GuestRoot::with(|root| {
        let script = "cat /proc/sys/kernel/hostname && echo one >/proc/sys/kernel/hostname && hostname && hostname two && \
                      mount -t proc proc /mnt && cat /mnt/sys/kernel/hostname && echo three >/mnt/sys/kernel/hostname && \
                      cat /proc/sys/kernel/hostname && echo d >/proc/sys/kernel/domainname && cat /proc/sys/kernel/domainname";
        root.privileged_bundle("p", &["sh", "-c", script], false);
        assert_eq!(root.run(RUNTIME, "p"), "bundle\none\ntwo\nthree\nd\n");
        root.remove("p");
        // Without permission to write sysctls, the kernel's own files do as well.
        let script = "exec 2>&1; cat /proc/sys/kernel/hostname; grep -c kernel/hostname /proc/self/mountinfo; \
                      (echo one >/proc/sys/kernel/hostname); true";
        root.bundle("q", &["sh", "-c", script]);
        let output = root.run(RUNTIME, "q");
        assert!(output.starts_with("bundle\n0\n") && output.ends_with("Read-only file system\n"), "{output}");
        root.remove("q");
    });
}

/// Creates, starts and removes a container. It gets the first range, because all others are gone.
fn cycle(root: &GuestRoot, name: &str) {
    root.copy_bundle("b", name);
    root.start(RUNTIME, name);
    assert_eq!(root.range(name), 100_000, "{name}: a range leaked");
    root.end(RUNTIME, name);
}

#[test]
#[ignore = "needs root and the guest's user land; scripts/test bundles"]
fn what_isolation_costs_beside_plain_crun() {
    GuestRoot::with(|root| cost(&root));
}

fn cost(root: &GuestRoot) {
    root.bundle("b", &["true"]);
    root.privileged_bundle("p", &["true"], false);
    for (bundle, what) in [("b", "run of `true`"), ("p", "run of `true` with privilege")] {
        let mut times = Times::default();
        for round in 0..ROUNDS {
            for program in [CRUN, RUNTIME] {
                let name = format!("{bundle}{round}-{program}");
                root.copy_bundle(bundle, &name);
                times.add(program, time(|| drop(root.run(program, &name))));
                root.remove(&name);
            }
        }
        times.print(what);
    }

    let script = format!(
        "mkdir /s /d && cd /s && i=0; while [ $i -lt {FILES} ]; do echo $i >f$i; i=$((i+1)); done; \
         tar cf /s.tar -C /s . && rm -rf /s"
    );
    root.bundle("maker", &["sh", "-c", &script]);
    root.run(CRUN, "maker");
    fs::copy(root.files("maker").join("s.tar"), root.lower().join("s.tar")).unwrap();
    root.remove("maker");
    root.bundle("f", &["sh", "-c", "mkdir /d && tar xf /s.tar -C /d && find /d -type f -exec stat -t {} + | wc -l"]);
    let mut times = Times::default();
    for round in 0..15 {
        for program in [CRUN, RUNTIME] {
            let name = format!("f{round}-{program}");
            root.copy_bundle("f", &name);
            let mut output = String::new();
            times.add(program, time(|| output = root.run(program, &name)));
            assert_eq!(output.trim(), FILES.to_string());
            root.remove(&name);
        }
    }
    times.print("unpacking and looking at 20000 files");
    let ratio = times.ratio();
    // The goal is 1.05, but a shared machine is not that quiet.
    assert!(ratio < 1.25, "{ratio:.3} times as long");
}

fn time(run: impl FnOnce()) -> Duration {
    let start = Instant::now();
    run();
    start.elapsed()
}

/// The times of both programs, in turns.
#[derive(Default)]
struct Times {
    plain: Vec<Duration>,
    isolated: Vec<Duration>,
}

impl Times {
    fn add(&mut self, program: &str, time: Duration) {
        if program == CRUN { &mut self.plain } else { &mut self.isolated }.push(time);
    }

    fn ratio(&self) -> f64 {
        median(&self.isolated).as_secs_f64() / median(&self.plain).as_secs_f64()
    }

    fn print(&self, what: &str) {
        let (plain, isolated) = (median(&self.plain), median(&self.isolated));
        let fastest =
            self.isolated.iter().min().unwrap().as_secs_f64() / self.plain.iter().min().unwrap().as_secs_f64();
        let ratio = self.ratio();
        println!(
            "{what}: crun {plain:.1?}, with isolation {isolated:.1?}, ratio {ratio:.3}, of the fastest {fastest:.3}"
        );
    }
}

fn median(times: &[Duration]) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() / 2]
}
