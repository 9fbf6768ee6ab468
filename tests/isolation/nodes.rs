//! Files of /proc and /sys that a container has of its own.

use support::engine::Engine;

use crate::{
    shell,
    table::{
        Expect::{Holds, Says},
        check,
    },
};

/// Longer than a container of these tests runs in the emulated machine, in seconds; the VM is older by then.
const YOUNG: f64 = 20.0;

/// Returns whether there are so many lines of `/proc/uptime` and all are of containers that have just started.
pub fn are_young(said: &str, lines: usize) -> bool {
    are_of_a_container(said, lines, YOUNG)
}

/// Returns whether there are so many lines of `/proc/uptime` as containers see them: twice the same number, below
/// `most`.
pub fn are_of_a_container(said: &str, lines: usize, most: f64) -> bool {
    let is_own = |line: &str| {
        let fields: Vec<f64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        fields.len() == 2 && (fields[0] - fields[1]).abs() < 0.001 && fields[0] < most
    };
    said.lines().count() == lines && said.lines().all(is_own)
}

/// The sysctls with one number that can be 0 or 1.
const SYSCTLS: &str = "kernel/dmesg_restrict kernel/kptr_restrict kernel/panic kernel/panic_on_oops \
                       fs/protected_hardlinks fs/protected_symlinks vm/mmap_min_addr vm/overcommit_memory";

/// Writes each sysctl of the list; no other container and no later one sees it.
pub fn sysctls_are_per_container(engine: &Engine) -> Result<(), String> {
    let list =
        format!("cd /proc/sys; for file in {SYSCTLS} kernel/printk kernel/pid_max fs/nr_open; do cat $file; done");
    let before = shell(engine, &format!("docker run --rm --privileged alpine sh -c '{list}'")).stdout;
    let write = format!(
        "docker run --rm --privileged alpine sh -ec 'cd /proc/sys; for file in {SYSCTLS}; do
             new=$(( $(cat $file) == 0 )); echo $new >$file; [ \"$(cat $file)\" = $new ]; done
         echo 1 2 3 4 >kernel/printk; cat kernel/printk; echo 30000 >kernel/pid_max; cat kernel/pid_max
         echo 1000 >fs/nr_open; cat fs/nr_open'"
    );
    check(engine, &write, Says("1\t2\t3\t4\n30000\n1000\n"))?;
    let after = shell(engine, &format!("docker run --rm --privileged alpine sh -c '{list}'")).stdout;
    if before.lines().count() == 11 && before == after { Ok(()) } else { Err(format!("{before}{after}")) }
}

/// A procfs that the container mounts has its files, and is unmounted like any.
pub fn fresh_procfs(engine: &Engine, options: &str) -> Result<(), String> {
    let line = format!(
        "docker run --rm {options} alpine sh -ec 'mkdir /p; mount -t proc proc /p
         cat /p/uptime /proc/uptime; umount /p; [ -z \"$(ls /p)\" ]
         mount --bind /proc /p; cat /p/uptime; umount /p'"
    );
    check(engine, &line, Holds(|said| are_young(said, 3)))?;
    // By mount(8) of util-linux, which uses the new calls where there are such, and through a descriptor.
    let line = format!(
        "docker run --rm {options} debian sh -ec 'mkdir /p; mount -t proc proc /p; cat /p/uptime; umount /p
         exec 7</p; mount --no-canonicalize -t proc proc /proc/self/fd/7; cat /p/uptime; umount /p'"
    );
    check(engine, &line, Holds(|said| are_young(said, 2)))
}

/// A process that `docker exec` starts has a filter of its own.
pub fn exec_mounts_too(engine: &Engine) -> Result<(), String> {
    let line = "docker run -d --name=execs --privileged --init alpine sleep 3600 >started
                docker exec execs sh -ec 'mount -t proc proc /mnt; cat /mnt/uptime'
                docker exec execs cat /mnt/uptime; docker exec execs umount /mnt; docker rm -f execs >removed";
    check(engine, line, Holds(|said| are_of_a_container(said, 2, 120.0)))
}
