//! Directories of the host in containers.

mod agent;
mod events;
mod locks;

use std::{
    fs::{self, Permissions},
    os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use serde_json::json;
use support::{
    engine::{Engine, ISOLATION, Isolation, START, engine_with, home},
    process::{COMMAND, Ran, poll, run},
    program,
};

/// Time for the guest to look at a file again that the host has changed. It believes what it knows for a second.
const SEEN: Duration = Duration::from_secs(10);

/// The setting of the containers' time zone.
const TIME_ZONE: &str = "timeZone";

/// An engine with two shared directories.
struct Shares {
    engine: Engine,
    /// Shared read-write.
    place: PathBuf,
    /// Shared read-only.
    fixed: PathBuf,
    /// The file with the rules of containers' time zone.
    zone: PathBuf,
}

/// A directory of the home, for everybody to read.
fn directory(name: &str) -> PathBuf {
    let path = home().path(name);
    fs::create_dir_all(&path).unwrap();
    // The temporary directory itself is closed to others, not what is in it.
    fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    fs::canonicalize(path).unwrap()
}

fn shares(isolation: Isolation) -> Shares {
    shares_with(isolation, &[])
}

/// The same with further settings.
fn shares_with(isolation: Isolation, settings: &[(&str, &str)]) -> Shares {
    let [place, fixed] = ["shared", "fixed"].map(directory);
    let list = json!([{"path": place}, {"path": fixed, "readOnly": true}]).to_string();
    let isolated = if isolation == Isolation::Off { "false" } else { "true" };
    let agent = agent::path().into_os_string().into_string().unwrap();
    let sockets = json!([agent::other(&place)]).to_string();
    let usual = [
        (ISOLATION, isolated),
        ("filesharingDirectories", &list),
        ("sshAgent", &agent),
        ("filesharingSockets", &sockets),
    ];
    let engine = engine_with(&[&usual[..], settings].concat());
    let zone = settings.iter().find(|(key, _)| *key == TIME_ZONE).map_or_else(
        || fs::canonicalize("/etc/localtime").unwrap(),
        |(_, name)| Path::new("/usr/share/zoneinfo").join(name),
    );
    Shares { engine, place, fixed, zone }
}

impl Shares {
    /// An empty directory in the shared one.
    fn fresh(&self, name: &str) -> PathBuf {
        let path = self.place.join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        path
    }

    /// Runs a shell line in a container with `source` at /d.
    #[track_caller]
    fn run(&self, source: &Path, options: &[&str], line: &str) -> Ran {
        let mount = format!("{}:/d", source.display());
        let arguments = [&["run", "--rm", "-v", &mount][..], options, &["alpine", "sh", "-c", line]].concat();
        self.engine.docker(&arguments)
    }
}

fn files_go_both_ways(shares: &Shares) {
    let place = shares.fresh("both");
    fs::write(place.join("from host"), "one").unwrap();
    let line =
        "cat '/d/from host' && printf two >/d/new && mkdir -p /d/a/b && mv /d/new /d/a/b/moved && ln -s b /d/a/link";
    assert_eq!(shares.run(&place, &[], line).ok(), "one");
    assert_eq!(fs::read_to_string(place.join("a/link/moved")).unwrap(), "two");
    assert!(!place.join("new").exists());
    // A container that runs sees what the host does meanwhile.
    let mount = format!("{}:/d", place.display());
    shares.engine.docker(&["run", "-d", "--name", "watcher", "--init", "-v", &mount, "alpine", "sleep", "1h"]).ok();
    let seen = |file: &str, expected: &str| {
        poll("the change is seen", SEEN, || {
            let ran = shares.engine.docker(&["exec", "watcher", "cat", file]);
            (ran.status.success() && ran.stdout == expected).then_some(())
        });
    };
    fs::write(place.join("later"), "1").unwrap();
    seen("/d/later", "1");
    fs::write(place.join("later"), "longer").unwrap();
    seen("/d/later", "longer");
    fs::write(place.join(".new"), "replaced").unwrap();
    fs::rename(place.join(".new"), place.join("later")).unwrap();
    seen("/d/later", "replaced");
    let listed = shares.engine.docker(&["inspect", "--format", "{{(index .Mounts 0).Source}}", "watcher"]).ok();
    assert_eq!(listed.trim(), place.to_str().unwrap(), "the engine shows the host's path");
    shares.engine.docker(&["rm", "--force", "watcher"]).ok();
}

fn owners_are_the_hosts_and_what_a_container_changes_stays_its_own(shares: &Shares) {
    let place = shares.fresh("owners");
    fs::set_permissions(&place, Permissions::from_mode(0o777)).unwrap();
    let me = fs::metadata(&place).unwrap();
    fs::write(place.join("mine"), "").unwrap();
    let ids = |options: &[&str], line: &str| shares.run(&place, options, line).ok();
    let own = format!("{}:{}", me.uid(), me.gid());
    assert_eq!(ids(&[], "stat -c %u:%g /d/mine"), format!("{own}\n"));
    if me.uid() == 0 {
        let other = place.join("other");
        fs::write(&other, "").unwrap();
        chown(&other, Some(1234), Some(5678)).unwrap();
        assert_eq!(ids(&[], "stat -c %u:%g /d/other"), "1234:5678\n");
    }
    assert_eq!(ids(&["--user", "1000:1000"], "touch /d/theirs && stat -c %u:%g /d/theirs"), "1000:1000\n");
    assert_eq!(ids(&[], "touch /d/roots && stat -c %u:%g /d/roots"), "0:0\n");
    // Neither has the rights of another user of the host.
    for name in ["theirs", "roots"] {
        let file = fs::metadata(place.join(name)).unwrap();
        assert_eq!((file.uid(), file.gid()), (me.uid(), me.gid()), "{name}");
    }
    let line = "chown 7:8 /d/mine && chmod 4750 /d/mine && stat -c %u:%g:%a /d/mine";
    assert_eq!(ids(&[], line), "7:8:4750\n");
    assert_eq!(ids(&[], "stat -c %u:%g:%a /d/mine"), "7:8:4750\n", "another container sees the same");
    let file = fs::metadata(place.join("mine")).unwrap();
    assert_eq!((file.uid(), file.gid()), (me.uid(), me.gid()));
    // Rights are those that the container sees.
    assert!(shares.run(&place, &["--user", "1000:1000"], "echo x >>/d/mine").fails(1).contains("Permission denied"));
}

fn paths_that_are_not_shared_are_refused_with_the_command_that_shares_them(shares: &Shares) {
    let expected = |path: &str| {
        format!("mounts denied: the path {path} is not shared from the host; share it with: bulkhead share add {path}")
    };
    for path in ["/opt/x", "/srv/other"] {
        for mount in
            [["-v".to_owned(), format!("{path}:/d")], ["--mount".into(), format!("type=bind,src={path},dst=/d")]]
        {
            let said = shares.engine.docker(&["run", "--rm", &mount[0], &mount[1], "alpine", "true"]).fails(125);
            assert!(said.contains(&expected(path)), "{said}");
        }
    }
    // A neighbour whose name begins like a share's.
    let beside = format!("{}x", shares.place.display());
    fs::create_dir_all(&beside).unwrap();
    assert!(shares.run(Path::new(&beside), &[], "true").fails(125).contains(&expected(&beside)));
}

fn a_source_that_is_missing_is_as_docker_documents_it(shares: &Shares) {
    let place = shares.fresh("missing");
    let source = place.join("made/by/docker");
    assert_eq!(shares.run(&source, &[], "ls -A /d").ok(), "");
    assert!(source.is_dir());
    let mount = format!("type=bind,src={},dst=/d", place.join("none").display());
    let said = shares.engine.docker(&["run", "--rm", "--mount", &mount, "alpine", "true"]).fails(125);
    assert!(said.contains("bind source path does not exist"), "{said}");
    assert!(!place.join("none").exists());
}

fn nothing_changes_in_a_read_only_share(shares: &Shares) {
    let file = shares.fixed.join("file");
    fs::write(&file, "kept").unwrap();
    assert_eq!(shares.run(&shares.fixed, &[], "cat /d/file").ok(), "kept");
    for line in ["echo x >/d/file", "touch /d/new", "rm /d/file", "chmod 777 /d/file", "mkdir /d/x", "mv /d/file /d/x"]
    {
        let said = shares.run(&shares.fixed, &["--privileged"], line).fails(1);
        assert!(said.contains("Read-only file system"), "{line}: {said}");
    }
    let names: Vec<_> = fs::read_dir(&shares.fixed).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!((names.len(), fs::read_to_string(&file).unwrap().as_str()), (1, "kept"));
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o644);
}

fn links_do_not_lead_out_of_a_share(shares: &Shares) {
    let place = shares.fresh("links");
    let secret = shares.engine.home.path("secret");
    fs::create_dir_all(&secret).unwrap();
    fs::write(secret.join("file"), "the host's secret").unwrap();
    symlink(&secret, place.join("absolute")).unwrap();
    symlink("../../secret", place.join("relative")).unwrap();
    symlink(secret.join("file"), place.join("file")).unwrap();
    let line = "for f in /d/file /d/absolute/file /d/relative/file /d/../../secret/file; do cat $f; done; readlink /d/relative";
    let ran = shares.run(&place, &[], line);
    assert_eq!(ran.ok(), "../../secret\n");
    // As a source a link is followed in the guest, where nothing of the host is outside of the shares.
    for name in ["absolute", "relative", "file"] {
        let ran = shares.run(&place.join(name), &[], "cat /d /d/file");
        assert!(!ran.stdout.contains("secret"), "{name}: {ran:?}");
    }
    // A container's link is one for the host as well, which the server does not follow.
    let line = format!("ln -sfn {} /d/made && cat /d/made/file", secret.display());
    assert!(!shares.run(&place, &[], &line).stdout.contains("secret"));
    assert_eq!(fs::read_link(place.join("made")).unwrap(), secret);
}

fn a_single_file_can_be_mounted(shares: &Shares) {
    let place = shares.fresh("single");
    let file = place.join("app.conf");
    fs::write(&file, "a=1\n").unwrap();
    fs::write(place.join("other"), "").unwrap();
    let mount = format!("{}:/etc/app.conf:ro", file.display());
    let read = |line: &str| shares.engine.docker(&["run", "--rm", "-v", &mount, "alpine", "sh", "-c", line]);
    assert_eq!(read("cat /etc/app.conf").ok(), "a=1\n");
    assert!(read("echo x >>/etc/app.conf").fails(1).contains("Read-only file system"));
    let mount = format!("{}:/f", file.display());
    shares.engine.docker(&["run", "--rm", "-v", &mount, "alpine", "sh", "-c", "echo b=2 >>/f"]).ok();
    assert_eq!(fs::read_to_string(&file).unwrap(), "a=1\nb=2\n");
}

fn docker_cp_reaches_a_mounted_directory(shares: &Shares) {
    let place = shares.fresh("copies");
    fs::create_dir(place.join("mounted")).unwrap();
    fs::write(place.join("source"), "copied").unwrap();
    let mount = format!("{}:/d", place.join("mounted").display());
    shares.engine.docker(&["rm", "--force", "copier"]);
    shares.engine.docker(&["create", "--name", "copier", "-v", &mount, "alpine", "true"]).ok();
    let source = place.join("source");
    shares.engine.docker(&["cp", source.to_str().unwrap(), "copier:/d/in"]).ok();
    assert_eq!(fs::read_to_string(place.join("mounted/in")).unwrap(), "copied");
    let back = place.join("back");
    shares.engine.docker(&["cp", "copier:/d/in", back.to_str().unwrap()]).ok();
    assert_eq!(fs::read_to_string(back).unwrap(), "copied");
    shares.engine.docker(&["rm", "copier"]).ok();
}

fn compose_finds_what_is_beside_its_file(shares: &Shares) {
    const PROJECT: &str = r#"
services:
  reader:
    image: alpine
    command: sh -c "cat /src/file /run/secrets/key /config && echo made >/src/out"
    volumes: ["${SOURCE}:/src"]
    secrets: [key]
    configs: [{source: config, target: /config}]
secrets: {key: {file: ./key.txt}}
configs: {config: {file: ./config.txt}}
"#;
    let place = shares.fresh("project");
    fs::create_dir(place.join("src")).unwrap();
    fs::write(place.join(".env"), "SOURCE=./src\n").unwrap();
    for (name, text) in [("compose.yaml", PROJECT), ("src/file", "1\n"), ("key.txt", "2\n"), ("config.txt", "3\n")] {
        fs::write(place.join(name), text).unwrap();
    }
    let compose = |arguments: &[&str]| {
        let mut command = shares.engine.home.docker_command(&["compose", "--project-name", "beside"]);
        command.current_dir(&place).args(arguments);
        run(command, START)
    };
    assert_eq!(compose(&["run", "--rm", "reader"]).ok().replace('\r', ""), "1\n2\n3\n");
    assert_eq!(fs::read_to_string(place.join("src/out")).unwrap(), "made\n");
    compose(&["down", "--timeout", "1"]).ok();
}

fn the_time_zone_is_the_hosts_or_that_of_the_setting(shares: &Shares) {
    let line = "sha256sum </etc/localtime; cat /etc/timezone; for file in /etc/localtime /etc/timezone; do \
                mount -o remount,rw,bind $file; echo x >>$file || echo kept; done 2>/dev/null";
    let mounts = ["--privileged", "-v", "/etc/localtime:/etc/localtime:ro", "-v", "/etc/timezone:/etc/timezone"];
    let arguments = [&["run", "--rm"][..], &mounts, &["alpine", "sh", "-c", line]].concat();
    let seen = shares.engine.docker(&arguments).ok();
    let mut sum = Command::new("sha256sum");
    sum.arg(&shares.zone);
    let host = run(sum, COMMAND).ok();
    let sum = host.split(' ').next().unwrap();
    let zone = shares.zone.to_str().unwrap().split_once("/zoneinfo/").unwrap().1;
    assert_eq!(seen, format!("{sum}  -\n{zone}\nkept\nkept\n"));
}

fn a_lock_of_one_container_holds_in_another(shares: &Shares) {
    shares.engine.need_image("debian:latest", "debian.tar");
    let place = shares.fresh("locked");
    let mount = format!("{}:/d", place.display());
    let run = |options: &[&str], line: &str| {
        let image = ["-v", &mount, "debian:latest", "bash", "-c", line];
        shares.engine.docker(&[&["run"], options, &image[..]].concat()).ok()
    };
    run(&["-d", "--name", "holder", "--init"], "flock /d/lock -c 'touch /d/held && sleep 1h'");
    poll("the lock is held", COMMAND, || place.join("held").exists().then_some(()));
    assert_eq!(run(&["--rm"], "flock -n /d/lock true; echo $?"), "1\n");
    shares.engine.docker(&["rm", "--force", "holder"]).ok();
    assert_eq!(run(&["--rm"], "flock -w 30 /d/lock true; echo $?"), "0\n");
}

fn files_may_be_empty_and_large(shares: &Shares) {
    const LARGE: u64 = 10 << 30;
    let place = shares.fresh("sizes");
    shares.engine.need_image("debian:latest", "debian.tar");
    fs::write(place.join("empty"), "").unwrap();
    let large = fs::File::create(place.join("large")).unwrap();
    large.set_len(LARGE).unwrap();
    large.write_all_at(b"middle", LARGE / 2).unwrap();
    large.write_all_at(b"end", LARGE - 3).unwrap();
    let mount = format!("{}:/d", place.display());
    let line = "cd /d && wc -c <empty && cat empty && stat -c %s large && tail -c 3 large && echo &&
        cp empty none && cp large copy && printf more >>copy && tail -c +5368709121 copy | head -c 6";
    let said = shares.engine.docker(&["run", "--rm", "-v", &mount, "debian", "bash", "-euc", line]).ok();
    assert_eq!(said, format!("0\n{LARGE}\nend\nmiddle"));
    assert_eq!(fs::metadata(place.join("none")).unwrap().len(), 0);
    let copy = fs::File::open(place.join("copy")).unwrap();
    let of = copy.metadata().unwrap();
    assert_eq!(of.len(), LARGE + 4);
    assert!(of.blocks() * 512 < LARGE / 1000, "the holes are copied as holes, {} blocks", of.blocks());
    let mut end = [0; 7];
    copy.read_exact_at(&mut end, LARGE - 3).unwrap();
    assert_eq!(&end, b"endmore");
    fs::remove_dir_all(place).unwrap();
}

fn every_call_and_every_error_is_as_on_a_disk(shares: &Shares) {
    let program = std::env::var_os("BULKHEAD_TEST_POSIX").expect("BULKHEAD_TEST_POSIX names the built posix-table");
    let place = shares.fresh("calls");
    fs::copy(program, place.join("posix-table")).unwrap();
    fs::set_permissions(place.join("posix-table"), Permissions::from_mode(0o755)).unwrap();
    let ran = shares.run(&place, &[], "umask 0; mkdir /d/rows && /d/posix-table /d/rows");
    assert!(ran.status.success(), "{}{}", ran.stdout, ran.stderr);
    println!("{}", ran.stdout);
    let rows = ran.stdout.split(' ').next().and_then(|rows| rows.parse::<usize>().ok());
    assert!(rows.is_some_and(|rows| rows > 120), "{}", ran.stdout);
}

/// The cases that hold with isolation and without. Without it a path that is not shared is one of the VM.
const CASES: &[fn(&Shares)] = &[
    files_go_both_ways,
    owners_are_the_hosts_and_what_a_container_changes_stays_its_own,
    a_source_that_is_missing_is_as_docker_documents_it,
    nothing_changes_in_a_read_only_share,
    links_do_not_lead_out_of_a_share,
    a_single_file_can_be_mounted,
    docker_cp_reaches_a_mounted_directory,
    compose_finds_what_is_beside_its_file,
    the_time_zone_is_the_hosts_or_that_of_the_setting,
    a_lock_of_one_container_holds_in_another,
    files_may_be_empty_and_large,
    every_call_and_every_error_is_as_on_a_disk,
];

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_files_of_the_host_are_files_in_containers() {
    let shares = shares(Isolation::On);
    for case in CASES {
        case(&shares);
    }
    paths_that_are_not_shared_are_refused_with_the_command_that_shares_them(&shares);
    agent::nothing_else_is_beside_the_agents_socket(&shares);
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_the_hosts_ssh_agent_answers_in_containers() {
    agent::the_hosts_ssh_agent_answers_in_containers(&shares(Isolation::On));
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn without_isolation_all_of_it_is_the_same() {
    let shares = shares_with(Isolation::Off, &[(TIME_ZONE, "Asia/Tokyo"), locks::HOST_LOCKS]);
    for case in CASES {
        case(&shares);
    }
    events::containers_see_the_events_of_what_the_host_changes_and_each_of_their_own_once(&shares);
    locks::locks_hold_against_programs_of_the_host(&shares);
    a_server_that_dies_is_replaced_and_nobody_waits_for_it(&shares);
}

/// Process ids of the backend's children that serve files.
fn servers(shares: &Shares) -> Vec<u32> {
    let mut processes = shares.engine.home.processes();
    processes
        .retain(|pid| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| line.ends_with(b"\0share-server\0")));
    processes
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_a_server_that_dies_is_replaced_and_nobody_waits_for_it() {
    a_server_that_dies_is_replaced_and_nobody_waits_for_it(&shares(Isolation::On));
}

fn a_server_that_dies_is_replaced_and_nobody_waits_for_it(shares: &Shares) {
    let place = shares.fresh("crash");
    let mount = format!("{}:/d", place.display());
    // The shell keeps a file open, and a working directory, both of which outlive the server.
    let line = "cd /d; exec 3>log; i=0; while :; do i=$((i+1)); echo $i >&3; echo $i >new; sleep 0.1; done";
    shares.engine.docker(&["run", "-d", "--init", "--name", "writer", "-v", &mount, "alpine", "sh", "-ec", line]).ok();
    poll("the container writes", SEEN, || place.join("new").exists().then_some(()));
    let [old] = servers(shares)[..] else { panic!("{:?}", servers(shares)) };
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(old.cast_signed()), nix::sys::signal::Signal::SIGKILL).unwrap();
    poll("another server", SEEN, || servers(shares).first().is_some_and(|pid| *pid != old).then_some(()));
    // The older mount goes on: the loop writes with what it had open, each line once.
    assert!(shares.engine.docker(&["exec", "writer", "ls", "/d"]).ok().contains("log"));
    let lines = || fs::read_to_string(place.join("log")).unwrap().lines().count();
    let before = lines();
    poll("the container goes on writing", SEEN, || (lines() > before + 2).then_some(()));
    let log = fs::read_to_string(place.join("log")).unwrap();
    assert!(log.lines().enumerate().all(|(at, line)| line == (at + 1).to_string()), "{log}");
    fs::write(place.join("after"), "it").unwrap();
    assert_eq!(shares.run(&place, &[], "echo made >/d/made; cat /d/after").ok(), "it");
    assert_eq!(fs::read_to_string(place.join("made")).unwrap(), "made\n");
    assert!(shares.engine.home.status()["warning"].is_null());
    shares.engine.docker(&["rm", "--force", "writer"]).ok();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_the_list_changes_while_containers_run() {
    let shares = shares(Isolation::On);
    let place = shares.fresh("meanwhile");
    fs::write(place.join("file"), "kept").unwrap();
    let late = directory("late");
    fs::write(late.join("file"), "late").unwrap();
    let sleeper = |name: &str, source: &Path| {
        let mount = format!("{}:/d", source.display());
        shares
            .engine
            .docker(&["run", "-d", "--init", "--name", name, "-v", &mount, "-w", "/d", "alpine", "sleep", "1h"])
    };
    let says = |name: &str| shares.engine.docker(&["exec", name, "cat", "file"]);
    sleeper("before", &place).ok();
    assert!(sleeper("refused", &late).fails(125).contains("bulkhead share add"));
    let share = |verb: &str| home().bulkhead(&["share", verb, late.to_str().unwrap()], COMMAND);
    let added = share("add");
    assert_eq!((added.stderr.as_str(), added.status.success()), ("", true), "it is shared at once");
    sleeper("after", &late).ok();
    assert_eq!((says("before").ok().as_str(), says("after").ok().as_str()), ("kept", "late"));
    assert_eq!(shares.run(&late, &[], "echo made >/d/made").ok(), "");
    assert_eq!(fs::read_to_string(late.join("made")).unwrap(), "made\n");
    let removed = share("remove");
    assert_eq!((removed.stderr.as_str(), removed.status.success()), ("", true));
    poll("the directory is not there any more", SEEN, || (!says("after").status.success()).then_some(()));
    assert_eq!(says("before").ok(), "kept");
    assert!(sleeper("again", &late).fails(125).contains("bulkhead share add"));
    shares.engine.remove_containers();
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_throw_away_engine_mounts_nothing_of_the_host_when_told_so() {
    let here = home().path("here");
    fs::create_dir_all(&here).unwrap();
    let mut command = home().command(program());
    command.current_dir(&here).env("PWD", &here).args(["run", "--quiet", "--no-share"]);
    command.args(["--", "sh", "-c", "docker create -v \"$PWD\":/d alpine"]);
    let said = run(command, START * 2).fails(1);
    assert!(said.contains("mounts denied: the path ") && said.contains("bulkhead share add"), "{said}");
}
