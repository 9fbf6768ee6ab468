//! Requests to the engine that would make dockerd itself reach something of the VM, with the VM's root's rights, and
//! tables of the kernel that one container would take from all others.
//!
//! An attempt is a line of shell that succeeds if the attempt did. What it leaves behind is removed after it.

use support::{
    engine::{Engine, shell},
    process::COMMAND,
};

use crate::{
    IMAGE,
    real::Real,
    table::{Column, Outcome, Table},
};

/// Name in the table, the containers in which it succeeds with isolation off, the line that succeeds if the attempt
/// does, and the line that cleans up.
const REQUESTS: &[(&str, Real, &str, &str)] = &[
    (
        "docker cp out of a VM path",
        Real::Default,
        "docker create --name cp1 -v /etc:/m alpine true && docker cp cp1:/m/hosts - | tar -xO | grep '^127\\.0\\.1\\.1'",
        "docker rm -f cp1",
    ),
    (
        "docker cp into a VM path",
        Real::Default,
        "echo x >mark && docker create --name cp2 -v /run:/m alpine true && docker cp mark cp2:/m/escaped && \
         docker cp cp2:/m/escaped - | tar -xO | grep x",
        "docker rm -f cp2",
    ),
    (
        "docker cp through /proc/1/root",
        Real::Default,
        "docker create --name cp3 -v /proc:/m alpine true && \
         docker cp cp3:/m/1/root/usr/sbin/bulkhead-init - | tar -xO | head -c 4 | grep ELF",
        "docker rm -f cp3",
    ),
    (
        "docker cp into a container's record",
        Real::Default,
        "docker create --name cp4 alpine true && id=$(docker inspect -f '{{.Id}}' cp4) && \
         docker create --name cp5 -v /var/lib/docker/containers/$id:/m alpine true && docker cp cp5:/m/config.v2.json -",
        "docker rm -f cp4 cp5",
    ),
    (
        "a service with a VM path",
        Real::Default,
        "docker swarm init --advertise-addr 127.0.0.1 >swarm && \
         docker service create --detach --name s1 --mount type=bind,src=/etc,dst=/m alpine true",
        "docker service rm s1; docker swarm leave --force",
    ),
    (
        "a volume of type overlay",
        Real::Default,
        "docker volume create -o type=overlay -o device=overlay -o o=lowerdir=/usr/sbin:/etc v1 && \
         docker run --rm -v v1:/m alpine test -e /m/bulkhead-init",
        "docker volume rm v1",
    ),
    (
        "a volume of a relative layer",
        Real::Default,
        "docker volume create -o type=overlay -o device=overlay -o o=lowerdir=usr/share:usr/sbin v2 && \
         docker run --rm -v v2:/m alpine test -e /m/bulkhead-init",
        "docker volume rm v2",
    ),
    (
        "a volume of an escaped layer",
        Real::Default,
        "docker volume create -o type=overlay -o device=overlay -o 'o=lowerdir=/usr/share:/us\\r/sbin' v3 && \
         docker run --rm -v v3:/m alpine test -e /m/bulkhead-init",
        "docker volume rm v3",
    ),
    (
        "an anonymous volume of type overlay",
        Real::Default,
        "docker run --rm --mount type=volume,dst=/m,volume-opt=type=overlay,volume-opt=device=overlay,\
         '\"volume-opt=o=lowerdir=/usr/sbin:/etc\"' alpine test -e /m/bulkhead-init",
        "true",
    ),
    (
        "a volume of type proc",
        Real::Default,
        "docker volume create -o type=proc -o device=proc v4 && docker run --rm -v v4:/m alpine grep init /m/1/comm",
        "docker volume rm v4",
    ),
    (
        "a volume of type sysfs",
        Real::Default,
        "docker volume create -o type=sysfs -o device=sysfs v5 && docker run --rm -v v5:/m alpine test -d /m/kernel",
        "docker volume rm v5",
    ),
    (
        "a container's file as a file system",
        Real::Never("the VM's kernel takes no file as a file system"),
        "docker run --rm -v v6:/v alpine dd if=/dev/zero of=/v/img bs=64k count=16 && \
         docker volume create -o type=erofs -o device=/var/lib/docker/volumes/v6/_data/img v7 && \
         docker run --rm -v v7:/m alpine true 2>&1 | grep -E 'failed to mount local volume.*(invalid argument|wrong fs|structure needs)'",
        "docker volume rm v6 v7",
    ),
    (
        "a volume of the data disk",
        Real::Default,
        "docker volume create -o type=ext4 -o device=/dev/vdb v8 && docker run --rm -v v8:/m alpine test -d /m/docker",
        "docker volume rm v8",
    ),
    (
        "a container as volume driver",
        Real::Default,
        "docker run -d --name plug -v p1:/v probe plugin /v/p.sock && sleep 1 && \
         { docker volume create -d ../../../var/lib/docker/volumes/p1/_data/p plugged || true; \
         docker logs plug | grep 'asked Plugin.Activate'; }",
        "docker volume rm -f plugged; docker rm -f plug; docker volume rm -f p1",
    ),
    (
        "a container as network driver",
        Real::Default,
        "docker run -d --name plug2 -v p2:/v probe plugin /v/p.sock && sleep 1 && \
         { docker network create -d ../../../var/lib/docker/volumes/p2/_data/p plugnet || true; \
         docker logs plug2 | grep 'asked Plugin.Activate'; }",
        "docker network rm plugnet; docker rm -f plug2; docker volume rm -f p2",
    ),
    (
        "checkpoints list a VM directory",
        Real::Never("the gate passes no request about checkpoints"),
        "docker create --name ck1 alpine true && docker checkpoint ls --checkpoint-dir=/run ck1 | grep docker",
        "docker rm -f ck1",
    ),
    (
        "checkpoints remove a VM directory",
        Real::Never("the gate passes no request about checkpoints"),
        "docker create --name ck2 alpine true && docker run --rm -v v9:/v alpine mkdir -p /v/victim && \
         docker checkpoint rm --checkpoint-dir=/var/lib/docker/volumes/v9/_data ck2 victim; \
         docker run --rm -v v9:/v alpine test ! -d /v/victim",
        "docker rm -f ck2; docker volume rm v9",
    ),
    (
        "a device by CDI",
        Real::Never("needs a daemon option and a specification in the VM"),
        "docker run --rm --device vendor.example/class=all alpine true",
        "true",
    ),
    (
        "--cgroup-parent beside the services",
        Real::Default,
        "docker run --rm --cgroup-parent=/system/escape alpine true",
        "true",
    ),
    (
        "--cgroup-parent out of the cgroups",
        Real::Never("runc refuses such a path itself"),
        "docker run --rm --cgroup-parent=../../../tmp/escape alpine true 2>&1 | grep -F 'sys/fs/cgroup/..'",
        "true",
    ),
    (
        "--ulimit rtprio",
        Real::Default,
        "docker run --rm --ulimit rtprio=99 --cap-drop SYS_NICE alpine grep -E 'Max realtime priority +99' /proc/self/limits",
        "true",
    ),
    (
        "--oom-score-adj below the engine's",
        Real::Default,
        "test $(docker run --rm --oom-score-adj=-999 alpine cat /proc/self/oom_score_adj) -lt -499",
        "true",
    ),
    (
        "a log driver at init's socket",
        Real::Default,
        "docker run --name log1 --log-driver syslog --log-opt syslog-address=unixgram:///run/bulkhead/notify alpine echo x",
        "docker rm -f log1",
    ),
    (
        "macvlan on the VM's card",
        Real::Default,
        "docker network create -d macvlan -o parent=eth0 -o macvlan_mode=passthru n1 && \
         docker run --rm --network n1 alpine true",
        "docker network rm n1",
    ),
    (
        "ipvlan on the VM's card",
        Real::Default,
        "docker network create -d ipvlan -o parent=eth0 n2 && docker run --rm --network n2 alpine true",
        "docker network rm n2",
    ),
    (
        "a bridge over the VM's network",
        Real::Default,
        "docker network create --subnet 192.168.65.0/24 n3",
        "docker network rm n3",
    ),
    (
        "a container in another's shim",
        Real::Default,
        "docker run --rm --annotation io.containerd.runc.v2.group=escape alpine true",
        "true",
    ),
    ("message queues of all containers", Real::Default, "hog mqueue", "docker rm -f hog"),
    ("inotify of all containers", Real::Default, "hog inotify --ulimit nofile=65536:65536", "docker rm -f hog"),
    ("timers of all containers", Real::Default, "hog timer", "docker rm -f hog"),
    (
        "namespaces of all containers",
        Real::Default,
        "hog namespace --cap-add=SYS_ADMIN --ulimit nofile=262144:262144",
        "docker rm -f hog",
    ),
    ("terminals of all containers", Real::Default, "hog pty --ulimit nofile=65536:65536", "docker rm -f hog"),
];

/// `hog TABLE OPTION…`: succeeds if a container that takes all entries of a table leaves none to another one, which
/// then may not even start.
const HOG: &str = "hog() {
    local table=$1; shift
    docker run --rm \"$@\" probe take $table | grep -q taken || return 1
    docker run -d --name hog \"$@\" probe hog $table >id || return 1
    until docker logs hog | grep hog; do sleep 0.3; done
    ! docker run --rm \"$@\" probe take $table | grep taken
}
export DOCKER_CONTEXT=bulkhead; cd \"$SCRATCH\"
";

/// Tries each request.
pub fn try_all(engine: &Engine, table: &mut Table, column: Column) {
    let scratch = engine.home.path("requests");
    std::fs::create_dir_all(&scratch).unwrap();
    let line = |text: &str| {
        let text = format!("SCRATCH={}\n{HOG}{text}", scratch.display());
        shell(engine.home, &text, COMMAND)
    };
    assert_eq!(engine.get(&format!("/images/{IMAGE}/json")).0, 200, "the probe's image is missing");
    for (name, _, attempt, clean_up) in REQUESTS {
        let ended = line(attempt);
        line(&format!("{{ {clean_up}; }} >/dev/null 2>&1 || true"));
        let outcome = if ended.status.success() {
            Outcome::Open(ended.stdout.lines().last().unwrap_or("it had its effect").to_owned())
        } else {
            Outcome::Refused(ended.stderr.lines().last().unwrap_or("no effect").to_owned())
        };
        table.set(column, name, outcome);
    }
}

/// The names of all requests, with the containers in which each succeeds with isolation off.
pub fn all() -> impl Iterator<Item = (&'static str, Real)> {
    REQUESTS.iter().map(|(name, real, ..)| (*name, *real))
}
