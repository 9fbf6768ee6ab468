//! A row for each line of the tables in docs/isolation.md.

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use support::{
    engine::{Engine, ISOLATION, engine_with, home},
    home::pid,
};

use crate::{
    builds, directory, nested, nodes, policy,
    situation::{Situation, Situations},
    sockets,
    table::{
        Expect::{Fails, Holds, Says},
        Proof::{Code, In, Lines, Other},
        Row, Table,
    },
    wanted,
};

const SOCKET: &str = "e2e isolation::mounts_of_the_engines_socket_are_refused";
const ESCAPES: &str = "escapes no_attempt_gets_out_of_an_isolated_container";
const WITHOUT: &str = "e2e isolation::without_isolation_containers_run_under_runc_and_share_all_ids";
const HOST_NAMESPACES: &str = "e2e isolation::the_hosts_namespaces_are_refused_with_the_documented_texts";
const OTHER_RUNTIME: &str = "e2e isolation::another_runtime_and_the_hosts_user_namespace_are_ignored";
const TWO: &str = "e2e isolation::each_of_two_containers_has_a_range_of_ids_of_its_own";

/// The gate's port in the VM.
const GATE: u16 = 1023;

/// Ports of the VM that are tried.
const PORTS: u16 = 1200;

/// The numbered rows: behaviours of containers.
const CONTAINERS: &[Row] = &[
    Row("containers 1", "the first container has 65536 ids from 100000 on", In(TWO)),
    Row("containers 2", "containers that run at once have different ranges", In(TWO)),
    Row("containers 3", "with isolation off there is no user namespace", In(WITHOUT)),
    Row("containers 4", "the runtime is visible in inspect", In(TWO)),
    Row("containers 5", "--runtime is ignored, not refused", In(OTHER_RUNTIME)),
    Row("containers 6", "the VM's pid namespace cannot be shared", In(HOST_NAMESPACES)),
    Row("containers 7", "nor its network", In(HOST_NAMESPACES)),
    Row("containers 8", "--userns=host is ignored", In(OTHER_RUNTIME)),
    Row(
        "containers 9",
        "--privileged works and is contained",
        Lines(
            "docker run --rm --privileged alpine sh -c 'cat /proc/self/uid_map; echo 1 >/proc/sys/vm/panic_on_oom'",
            Fails(1, "Permission denied"),
        ),
    ),
    Row("containers 10", "paths of the VM cannot be mounted", In("e2e isolation::mounts_of_the_vms_own_files_are_refused")),
    Row(
        "containers 11",
        "directories of the host can be mounted, with right owners",
        Lines(
            "mkdir -p share && echo host >share/file
             docker run --rm -v \"$PWD/share:/mnt\" alpine sh -c 'cat /mnt/file; stat -c %u:%g /mnt/file; echo container >/mnt/made' |
                 sed \"s/^$(id -u):$(id -g)\\$/owner/\"
             cat share/made; stat -c %u:%g share/made | sed \"s/^$(id -u):$(id -g)\\$/owner/\"",
            Says("host\nowner\ncontainer\nowner\n"),
        ),
    ),
    Row("containers 12", "the engine's socket cannot be mounted", In(SOCKET)),
    Row(
        "containers 13",
        "initial mounts cannot be changed",
        Lines(
            "docker run --rm --cap-add SYS_ADMIN -v ro:/mnt:ro alpine mount -o remount,rw /mnt /mnt",
            Fails(1, "mount: permission denied (are you root?)\n"),
        ),
    ),
    Row(
        "containers 14",
        "a container's own mounts are its own",
        Lines(
            "docker run --rm --cap-add SYS_ADMIN debian sh -ec '
             mkdir /root/tmpfs; mount -t tmpfs tmpfs /root/tmpfs; mount -o remount,ro /root/tmpfs /root/tmpfs
             findmnt -rno OPTIONS /root/tmpfs; mount -o remount,rw /root/tmpfs /root/tmpfs; touch /root/tmpfs/file'",
            Holds(|said| said.starts_with("ro,relatime,uid=100000,gid=100000")),
        ),
    ),
    Row(
        "containers 15",
        "/proc/uptime is the container's",
        Lines("docker run --rm alpine cat /proc/uptime", Holds(|said| nodes::are_young(said, 1))),
    ),
    Row("containers 16", "other nodes of /proc/sys are per container", Code(nodes::sysctls_are_per_container)),
    Row("containers 17", "builds get no host network and no insecure steps", Code(builds::entitlements_are_refused)),
    Row("containers 18", "build steps are isolated (both builders)", Code(builds::steps_are_isolated)),
    Row("containers 19", "docker-container builders are isolated", In("ecosystem buildx_container_driver")),
    Row("containers 19", "kind's nodes are isolated", In("ecosystem kind")),
    Row("containers 20", "containers from before isolation are isolated, too", In("isolation as_with_runc::isolation_is_turned_on")),
    Row("containers 21", "no console into the VM, no other way in from the host", Code(nothing_but_the_gate_lets_in)),
    Row("containers 22", "Docker in Docker works with --privileged", Code(nested::an_inner_engine_works)),
    Row(
        "containers 23",
        "works beside capabilities and seccomp",
        Lines(
            "docker run --rm --cap-drop=CHOWN alpine chown 1 /tmp
             echo '{\"defaultAction\":\"SCMP_ACT_ALLOW\",\"syscalls\":[{\"names\":[\"mkdir\",\"mkdirat\"],\"action\":\"SCMP_ACT_ERRNO\"}]}' >no-mkdir
             docker run --rm --security-opt seccomp=no-mkdir alpine sh -c 'mkdir /x 2>&1 || cat /proc/self/uid_map'",
            Says(
                "chown: /tmp: Operation not permitted\nmkdir: can't create directory '/x': Operation not permitted\n         0     100000      65536\n",
            ),
        ),
    ),
    Row("containers 24", "userns-remap and rootless mode", Other("dockerDaemonOptions takes them, init drops them (unit test)")),
    Row("containers 25", "only much mounting is slower", In("isolation cost; the runtime's bundles")),
];

/// The Docker socket in containers, without exceptions; those are in `sockets`.
const SOCKETS: &[Row] = &[
    Row("socket", "imageList empty: no container may mount it", In(SOCKET)),
    Row("socket", "commands that cannot be listed", Other("made of other commands' requests")),
    Row("socket", "true Docker in Docker is not concerned", In("containers 22")),
    Row("socket", "Kubernetes' images", Other("there is no cluster")),
    Row(
        "socket",
        "isolation off: all may mount it, without rules",
        In("isolation as_with_runc::isolation_is_turned_on"),
    ),
];

/// The checklist of attempts.
const ATTEMPTS: &[Row] = &[
    Row("attempts", "uid_map of two containers", In(TWO)),
    Row("attempts", "runtime in inspect, --runtime=runc, --userns=host", In(OTHER_RUNTIME)),
    Row("attempts", "--pid, --network, --ipc, --uts =host", In(HOST_NAMESPACES)),
    Row("attempts", "--privileged: bpf, modules, sysctls", In(ESCAPES)),
    Row(
        "attempts",
        "a VM's path by --mount and its parent",
        Lines(
            "for mount in '--mount=type=bind,source=/etc,target=/mnt' -v=/etc/../etc/docker:/mnt -v=/bin:/mnt; do
                 docker run --rm $mount alpine true 2>&1 | grep -o \"can't mount .* because it's configured as a restricted host mount\"
             done | wc -l",
            Says("3\n"),
        ),
    ),
    Row(
        "attempts",
        "a link in a shared directory that leads to the VM",
        Lines(
            "ln -sfn /etc out && docker run --rm -v \"$PWD/out:/m\" alpine true",
            Fails(125, "mounts denied: the path /etc is not shared from the host; share it with: bulkhead share add /etc"),
        ),
    ),
    Row(
        "attempts",
        "the VM's disks by --device",
        Lines(
            "docker run --rm --device=/dev/vdb alpine true",
            Fails(
                125,
                "sysbox containers can't have the host device /dev/vdb (because they use the linux user-namespace for isolation)",
            ),
        ),
    ),
    Row(
        "attempts",
        "a volume whose driver options name a VM path",
        Lines(
            "docker volume create -o type=none -o o=bind -o device=/etc/docker leads",
            Fails(1, "can't mount /etc/docker because it's configured as a restricted host mount"),
        ),
    ),
    Row(
        "attempts",
        "a volume that leads to the engine's socket",
        Lines(
            "docker volume create -o type=none -o o=bind -o device=/run socket",
            Fails(
                1,
                "enhanced container isolation: docker socket mount denied for volume \"socket\"; a volume can't lead to an engine socket",
            ),
        ),
    ),
    Row("attempts", "the socket by parent, link, odd spelling", In(SOCKET)),
    Row("attempts", "the engine's own socket or TCP from a container", In(ESCAPES)),
    Row(
        "attempts",
        "the engine's socket by another user of the host",
        Code(another_user_cannot_reach_the_engine),
    ),
    Row("attempts", "another image under an allowed name", In("socket, by docker tag, load and build")),
    Row("attempts", "a derived image, allowed and denied", In("socket, allowDerivedImages")),
    Row("attempts", "wildcard, digest, `*`", In("socket, imageList")),
    Row("attempts", "commandList, un-versioned paths, /session and /grpc", In("socket, commandList")),
    Row(
        "attempts",
        "a container made by hand with curl, without a version",
        Lines(
            "post() { curl -sS --unix-socket \"$SOCKET\" -H 'Content-Type: application/json' -X POST \"http://localhost$1\" -d \"$2\"; }
             post '/containers/create?name=curl' '{\"Image\":\"alpine\",\"Cmd\":[\"cat\",\"/proc/self/uid_map\"],\"hostConfig\":{\"runtime\":\"runc\",\"UsernsMode\":\"host\"}}' >created
             post /containers/curl/start ''; docker wait curl; docker logs curl
             docker inspect --format '{{.HostConfig.Runtime}}' curl; docker rm curl",
            Says("0\n         0     100000      65536\nsysbox-runc\ncurl\n"),
        ),
    ),
    Row("attempts", "a container made from inside, with binds", In("socket, made from inside")),
    Row("attempts", "remount,rw by mount(2), the new calls, unshare -m, chroot", In(ESCAPES)),
    Row("attempts", "tmpfs mounted inside works", In("containers 14")),
    Row("attempts", "/proc/uptime", In("containers 15")),
    Row("attempts", "--init, --read-only", In("isolation as_with_runc::the_same_commands_with_isolation")),
    Row(
        "attempts",
        "working directory /proc/self/fd/N (CVE-2024-21626)",
        Lines(
            "seq 6 9 | xargs -P 2 -I N docker run --rm --workdir=/proc/self/fd/N alpine true 2>&1 |
                 grep -ciE 'chdir to `/proc/self/fd/[0-9]+.: (no such file or directory|not a directory)'",
            Says("4\n"),
        ),
    ),
    Row(
        "attempts",
        "--net=container:C shares C's range",
        Lines(
            "docker run -d --name=net --init alpine sleep 3600 >started && \
             docker run --rm --net=container:net alpine cat /proc/self/uid_map; docker run --rm alpine cat /proc/self/uid_map; docker rm -f net",
            Says("         0     100000      65536\n         0     165536      65536\nnet\n"),
        ),
    ),
    Row("attempts", "an inner engine with --privileged", In("containers 22")),
    Row("attempts", "a build's RUN cat /proc/self/uid_map", In("containers 18")),
    Row("attempts", "build --network=host", In("containers 17")),
    Row("attempts", "admin-settings.json: invalid, absent, unknown keys", In("policy")),
];

/// Files of /proc and /sys.
const NODES: &[Row] = &[
    Row(
        "nodes",
        "/proc/meminfo shows the container's memory",
        Lines(
            "docker run --rm -m 256m alpine head -n 1 /proc/meminfo",
            Says("MemTotal:         262144 kB\n"),
        ),
    ),
    Row(
        "nodes",
        "cpuinfo, stat, online show the container's CPUs",
        Lines(
            "docker run --rm --cpus 1 alpine sh -c 'grep -c ^processor /proc/cpuinfo; grep -c ^cpu[0-9] /proc/stat; \
             cat /sys/devices/system/cpu/online'",
            Says("1\n1\n0\n"),
        ),
    ),
    Row(
        "nodes",
        "/proc/swaps is empty, /proc/loadavg is the container's",
        Lines(
            "docker run --rm alpine sh -c 'wc -l </proc/swaps; cat /proc/loadavg'",
            Holds(|said| {
                let tasks = said.split_whitespace().nth(4).and_then(|tasks| tasks.split_once('/'));
                said.starts_with("1\n") && tasks.is_some_and(|(_, all)| all.parse::<u32>().is_ok_and(|all| all < 10))
            }),
        ),
    ),
    Row(
        "nodes",
        "product_uuid ends with the container's id and begins as the VM's",
        Lines(
            "docker run --rm alpine sh -c 'cat /sys/devices/virtual/dmi/id/product_uuid; hostname'
             docker run --rm alpine cat /sys/class/dmi/id/product_uuid",
            Holds(|said| {
                let lines: Vec<_> = said.lines().collect();
                let [first, id, second] = lines[..] else { return false };
                first.ends_with(id) && first[..24] == second[..24] && first != second && !first.starts_with("00000000")
            }),
        ),
    ),
    Row(
        "nodes",
        "what is out of range is refused, and without privilege every write",
        Lines(
            "docker run --rm --privileged alpine sh -c 'echo 9 >/proc/sys/kernel/dmesg_restrict'
             docker run --rm alpine sh -c 'echo 1 >/proc/sys/kernel/dmesg_restrict'",
            Fails(1, "Invalid argument\nsh: can't create /proc/sys/kernel/dmesg_restrict: Read-only file system\n"),
        ),
    ),
    Row("nodes", "in a procfs of one's own, with --privileged", Code(|engine| nodes::fresh_procfs(engine, "--privileged"))),
    Row(
        "nodes",
        "in a procfs of one's own, with CAP_SYS_ADMIN",
        Code(|engine| nodes::fresh_procfs(engine, "--cap-add SYS_ADMIN")),
    ),
    Row(
        "nodes",
        "under unshare --mount-proc, also in a user namespace inside",
        Lines(
            "docker run --rm --privileged debian unshare -pf --mount-proc cat /proc/uptime
             docker run --rm --privileged alpine unshare -pf --mount-proc cat /proc/uptime
             docker run --rm --privileged debian unshare -Urpmf --mount-proc cat /proc/uptime",
            Holds(|said| nodes::are_young(said, 3)),
        ),
    ),
    Row(
        "nodes",
        "in a sysfs of one's own",
        Lines(
            "docker run --rm --privileged alpine sh -ec '
             hash=module/nf_conntrack/parameters/hashsize; echo 4321 >/sys/$hash
             mkdir /s; mount -t sysfs sysfs /s; cat /s/$hash; cat /s/devices/system/cpu/online /sys/devices/system/cpu/online | uniq | wc -l
             umount /s; ls /s | wc -l'",
            Says("4321\n1\n0\n"),
        ),
    ),
    Row(
        "nodes",
        "mounting stays refused without the capability, and the first /proc stays",
        Lines(
            "docker run --rm alpine mount -t proc proc /mnt; docker run --rm --privileged alpine umount /proc",
            Fails(1, "mount: permission denied (are you root?)\numount: can't unmount /proc: Device or resource busy\n"),
        ),
    ),
    Row("nodes", "docker exec mounts as well", Code(nodes::exec_mounts_too)),
    Row("nodes", "in a container of an inner engine", Code(nested::an_inner_container_has_the_outer_ones_files)),
    Row(
        "nodes",
        "a hostname that is written is the container's own, also in a procfs of one's own",
        Lines(
            "hostname=/proc/sys/kernel/hostname; docker run --rm --privileged alpine sh -ec \"
             echo one >$hostname; hostname; hostname two; cat $hostname; mount -t proc proc /mnt
             echo three >/mnt/sys/kernel/hostname; hostname; echo d >/proc/sys/kernel/domainname
             unshare -u sh -c 'echo four >$hostname; hostname'; cat /proc/sys/kernel/*name\"",
            Says("one\ntwo\nthree\nfour\nd\nthree\n"),
        ),
    ),
];

/// Behaviours that concern several rows.
const MORE: &[Row] = &[
    Row("more", "several at once and one after the other: no range is lost", Code(nested::no_range_is_lost)),
    Row("more", "systemd is process 1", Code(nested::systemd_is_process_1)),
    Row("more", "compose in an inner engine", Code(nested::compose_works_inside)),
    Row(
        "more",
        "compose outside",
        In("network compose::three_services_find_each_other_by_name_and_a_port_of_theirs_is_published"),
    ),
];

/// Rows with the situation that they need.
type Rows = &'static [(Situation, &'static [Row])];

/// Rows that need isolation and nothing else.
const USUAL: Rows = &[
    (Situation::Usual, CONTAINERS),
    (Situation::Usual, SOCKETS),
    (Situation::Usual, ATTEMPTS),
    (Situation::Usual, NODES),
    (Situation::Usual, MORE),
    (Situation::Usual, policy::ABSENT),
];

/// Rows of exceptions for the engine's socket and of a policy.
const WITH_EXCEPTIONS: Rows = &[(Situation::Denying, sockets::DENYING), (Situation::Locked, policy::LOCKED)];

/// Rows of other exceptions and policies.
const WITH_OTHERS: Rows = &[
    (Situation::Underived, sockets::UNDERIVED),
    (Situation::Allowing, sockets::ALLOWING),
    (Situation::Broken, policy::UNREADABLE),
    (Situation::Free, policy::FREE),
];

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn of_isolation() {
    attempt("Rows", USUAL);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn of_isolation_with_exceptions_and_a_policy() {
    attempt("Rows of exceptions and a policy", WITH_EXCEPTIONS);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn of_isolation_with_other_exceptions_and_policies() {
    attempt("Rows of other exceptions and policies", WITH_OTHERS);
}

/// Tries rows and prints their table.
fn attempt(title: &str, rows: Rows) {
    let mut table = Table::default();
    let engine = engine_with_a_share();
    engine.need_image("debian:latest", "debian.tar");
    let mut situations = Situations::new(&engine);
    for (situation, rows) in rows {
        for row in rows.iter().filter(|row| wanted(&format!("{} {}", row.0, row.1))) {
            let state = match row.2 {
                In(_) | Other(_) => row.attempt(&engine),
                _ => situations.need(*situation).map_or_else(
                    |state| state,
                    |()| {
                        // The others have one container, which all of their rows use.
                        if *situation == Situation::Usual {
                            engine.remove_containers();
                        }
                        row.attempt(&engine)
                    },
                ),
            };
            table.add(row.0, row.1, state);
        }
    }
    drop(situations);
    table.finish(title);
}

/// An engine with isolation that shares the directory of the commands: the user's home is none of a test's.
fn engine_with_a_share() -> Engine {
    let list = serde_json::json!([{"path": fs::canonicalize(directory(home())).unwrap()}]).to_string();
    engine_with(&[(ISOLATION, "true"), ("filesharingDirectories", &list)])
}

fn another_user_cannot_reach_the_engine(engine: &Engine) -> Result<(), String> {
    // SAFETY: the call has no arguments and no effects.
    if unsafe { libc::geteuid() } != 0 {
        return crate::table::check(engine, "stat -c %a \"$SOCKET\"", Says("600\n"));
    }
    let line = "setpriv --reuid=65534 --regid=65534 --clear-groups env HOME=/ docker -H \"unix://$SOCKET\" ps";
    crate::table::check(engine, line, Fails(1, "permission denied"))
}

/// The host's only way into the VM is the gate's vsock port, and the VM's console has no input.
fn nothing_but_the_gate_lets_in(engine: &Engine) -> Result<(), String> {
    let answers = |port: u16| {
        let mut stream = UnixStream::connect(engine.home.runtime("vsock.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut answer = [0; 3];
        stream.read(&mut answer).map_err(|error| format!("port {port}: {error}")).map(|len| answer[..len] == *b"OK ")
    };
    let mut open = Vec::new();
    for port in 1..=PORTS {
        if answers(port)? {
            open.push(port);
        }
    }
    if open != [GATE] {
        return Err(format!("ports that take connections: {open:?}"));
    }
    let status = engine.home.status();
    let input = fs::read_link(format!("/proc/{}/fd/0", pid(&status, "vmmPid").unwrap())).unwrap();
    if input != Path::new("/dev/null") {
        return Err(format!("the vmm reads from {}", input.display()));
    }
    let directory = fs::read_dir(engine.home.runtime("")).unwrap().flatten();
    let names: BTreeSet<_> = directory.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    let known = ["control.sock", "docker.sock", "lock", "vsock.sock"];
    if names.iter().all(|name| known.contains(&name.as_str())) { Ok(()) } else { Err(format!("{names:?}")) }
}
