//! Events of inotify in containers, of what programs of the host change in a share.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{BufRead, BufReader, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Child, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use support::engine::{Engine, Isolation};

use super::{Shares, shares};

/// Time for an event to come, or a container to start. The emulated machine is some 30 times slower than hardware.
const SOON: Duration = Duration::from_secs(60);

/// Time within which the usual event is printed, in the emulated machine beside other suites. It has to be below the second
/// for which the guest believes what it knows; on hardware an event takes a few milliseconds.
const PROMPT: Duration = Duration::from_millis(500);

/// Prints the events of /d: their names, the file's name and the cookie. Of the image's programs only perl can watch.
const WATCH: &str = r#"
my @names = ([0x2, "MODIFY"], [0x4, "ATTRIB"], [0x8, "CLOSE_WRITE"], [0x40, "MOVED_FROM"], [0x80, "MOVED_TO"],
    [0x100, "CREATE"], [0x200, "DELETE"], [0x40000000, "ISDIR"]);
$| = 1;
my ($inotify, $path) = (syscall(294, 0), "/d");
syscall(254, $inotify, $path, 0x3ce) > 0 or die "inotify_add_watch: $!";
open my $events, "<&=", $inotify or die $!;
print "watching\n";
while (sysread $events, my $bytes, 65536) {
    while (length $bytes) {
        my ($watch, $mask, $cookie, $length) = unpack "lLLL", substr $bytes, 0, 16, "";
        my $name = unpack "Z*", substr $bytes, 0, $length, "";
        print join(",", map { $mask & $_->[0] ? $_->[1] : () } @names), " $name $cookie\n";
    }
}
"#;

/// A container that watches, and what it prints.
struct Watcher {
    process: Child,
    lines: Receiver<(Instant, String)>,
}

impl Watcher {
    /// Runs a command in a container with `place` at /d.
    fn start(engine: &Engine, name: &str, place: &Path, command: &[&str]) -> Self {
        let mount = format!("{}:/d", place.display());
        let arguments = [&["run", "--rm", "--init", "--name", name, "-v", &mount, "debian"][..], command].concat();
        let mut docker = engine.home.docker_command(&arguments);
        let mut process = docker.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let output = BufReader::new(process.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send((Instant::now(), line));
            }
        });
        Self { process, lines }
    }

    /// Waits for this many lines; returns them and the time of the last.
    #[track_caller]
    fn next(&self, count: usize) -> (Vec<String>, Instant) {
        let mut lines = Vec::new();
        let mut last = Instant::now();
        while lines.len() < count {
            let Ok((at, line)) = self.lines.recv_timeout(SOON) else { panic!("no more lines after {lines:?}") };
            last = at;
            lines.push(line);
        }
        (lines, last)
    }

    fn stop(mut self, engine: &Engine, name: &str) {
        engine.docker(&["rm", "--force", name]).ok();
        self.process.wait().unwrap();
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_containers_see_the_events_of_what_the_host_changes_and_each_of_their_own_once() {
    containers_see_the_events_of_what_the_host_changes_and_each_of_their_own_once(&shares(Isolation::On));
}

pub fn containers_see_the_events_of_what_the_host_changes_and_each_of_their_own_once(shares: &Shares) {
    let engine = &shares.engine;
    engine.need_image("debian:latest", "debian.tar");
    let directory = shares.fresh("events");
    let watcher = Watcher::start(engine, "events", &directory, &["perl", "-e", WATCH]);
    assert_eq!(watcher.next(1).0, ["watching"]);
    let mut times = Vec::new();
    let mut expect = |what: &dyn Fn(), expected: &[&str]| {
        let start = Instant::now();
        what();
        let (lines, at) = watcher.next(expected.len());
        times.push(at - start);
        let seen: Vec<_> = lines.iter().map(|line| line.rsplit_once(' ').unwrap()).collect();
        assert_eq!(seen.iter().map(|(event, _)| *event).collect::<Vec<_>>(), expected);
        let cookies: Vec<_> = seen.iter().map(|(_, cookie)| cookie.to_owned()).collect();
        let moved = expected.iter().any(|event| event.starts_with("MOVED"));
        assert!(cookies.iter().all(|cookie| (*cookie != "0") == moved && *cookie == cookies[0]), "{lines:?}");
    };
    let at = |name: &str| directory.join(name);
    expect(&|| drop(File::create(at("a")).unwrap()), &["CREATE a", "CLOSE_WRITE a"]);
    let append = || OpenOptions::new().append(true).open(at("a")).unwrap().write_all(b"x").unwrap();
    expect(&append, &["MODIFY a", "CLOSE_WRITE a"]);
    expect(&|| fs::set_permissions(at("a"), Permissions::from_mode(0o600)).unwrap(), &["ATTRIB a"]);
    expect(&|| fs::rename(at("a"), at("b")).unwrap(), &["MOVED_FROM a", "MOVED_TO b"]);
    expect(&|| fs::create_dir(at("d")).unwrap(), &["CREATE,ISDIR d"]);
    expect(&|| fs::remove_dir(at("d")).unwrap(), &["DELETE,ISDIR d"]);
    expect(&|| fs::remove_file(at("b")).unwrap(), &["DELETE b"]);
    times.sort_unstable();
    let (usual, slowest) = (times[times.len() / 2], times[times.len() - 1]);
    eprintln!("events took {usual:?}, at most {slowest:?}, from the change to the line of the docker client");
    assert!(usual < PROMPT, "{times:?}");
    // Its own, and those of a container beside it: once each, and none of them comes back from the host.
    let own = "echo x >/d/o && chmod 600 /d/o && mv /d/o /d/p && rm /d/p";
    engine.docker(&["exec", "events", "sh", "-c", own]).ok();
    let once = ["CREATE o", "MODIFY o", "CLOSE_WRITE o", "ATTRIB o", "MOVED_FROM o", "MOVED_TO p", "DELETE p"];
    fs::write(at("last"), "").unwrap();
    let (lines, _) = watcher.next(once.len() + 1);
    let seen: Vec<_> = lines.iter().map(|line| line.rsplit_once(' ').unwrap().0).collect();
    assert_eq!(seen, [&once[..], &["CREATE last"]].concat());
    watcher.stop(engine, "events");
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_a_container_follows_a_log_that_the_host_writes_and_replaces() {
    let shares = shares(Isolation::On);
    let engine = &shares.engine;
    engine.need_image("debian:latest", "debian.tar");
    let directory = shares.fresh("log");
    let log = directory.join("log");
    fs::write(&log, "first\n").unwrap();
    let watcher = Watcher::start(engine, "follower", &directory, &["tail", "-F", "/d/log"]);
    assert_eq!(watcher.next(1).0, ["first"]);
    OpenOptions::new().append(true).open(&log).unwrap().write_all(b"second\n").unwrap();
    assert_eq!(watcher.next(1).0, ["second"]);
    fs::rename(&log, directory.join("log.1")).unwrap();
    fs::write(&log, "third\n").unwrap();
    assert_eq!(watcher.next(1).0, ["third"]);
    watcher.stop(engine, "follower");
}
