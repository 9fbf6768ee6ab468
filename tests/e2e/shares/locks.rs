//! Locks against programs of the host, which a setting turns on.

use std::{fs::File, path::Path};

use nix::fcntl::{Flock, FlockArg};
use support::{
    engine::Isolation,
    process::{Ran, poll},
};

use super::{SEEN, Shares, shares_with};

/// The setting for it.
pub const HOST_LOCKS: (&str, &str) = ("filesharingHostLocks", "true");

/// Locks /d/lock in one of two ways, at once or after a while, and keeps the lock for as long as there is /d/keep.
const PROGRAM: &str = r#"
my ($kind, $wait) = @ARGV;
$| = 1;
open my $file, "+<", "/d/lock" or die $!;
# F_WRLCK from the first byte on; F_SETLKW, F_SETLK.
my $range = pack "ssx4qqlx4", 1, 0, 0, 0, 0;
my $locked = $kind eq "flock" ? flock($file, $wait ? 2 : 6) : fcntl($file, $wait ? 7 : 6, $range);
# The engine's log has whole lines.
print $locked ? "locked\n" : "refused\n";
open my $said, ">", "/d/said" or die $!;
close $said;
while (-e "/d/keep") { select undef, undef, undef, 0.1 }
"#;

/// Starts the program in a container, and does not wait for its end with `wait`.
fn start(shares: &Shares, name: &str, place: &Path, kind: &str, wait: bool) -> Ran {
    let mount = format!("{}:/d", place.display());
    let (how, wait) = if wait { ("--detach", "1") } else { ("--rm", "") };
    let container = ["run", how, "--init", "--name", name, "-v", &mount, "debian"];
    shares.engine.docker(&[&container[..], &["perl", "-e", PROGRAM, kind, wait]].concat())
}

/// Locks a file of the host as a program does, or finds it locked.
fn lock(kind: &str, path: &Path) -> Option<Held> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    if kind == "flock" {
        return Flock::lock(file, FlockArg::LockExclusiveNonblock).ok().map(Held::Whole);
    }
    // SAFETY: integers only, which may be zero.
    let mut all: libc::flock = unsafe { std::mem::zeroed() };
    all.l_type = libc::F_WRLCK as i16;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_OFD_SETLK(&all)).ok().map(|_| Held::Range(file))
}

/// A lock of the host, which ends with its file.
#[expect(dead_code, reason = "held only")]
enum Held {
    Whole(Flock<File>),
    Range(File),
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn isolated_locks_hold_against_programs_of_the_host_if_the_setting_says_so() {
    locks_hold_against_programs_of_the_host(&shares_with(Isolation::On, &[HOST_LOCKS]));
}

pub fn locks_hold_against_programs_of_the_host(shares: &Shares) {
    shares.engine.need_image("debian:latest", "debian.tar");
    let place = shares.fresh("locks");
    let path = place.join("lock");
    File::create(&path).unwrap();
    for kind in ["flock", "fcntl"] {
        let held = lock(kind, &path).unwrap();
        assert_eq!(start(shares, "tries", &place, kind, false).ok(), "refused\n", "{kind}");
        std::fs::remove_file(place.join("said")).unwrap();
        // A container waits for the host, and then has the lock until it ends.
        File::create(place.join("keep")).unwrap();
        let name = format!("waits-{kind}");
        start(shares, &name, &place, kind, true).ok();
        let waits = || shares.engine.docker(&["top", &name]).stdout.contains("perl");
        poll("the container waits", SEEN, || waits().then_some(()));
        assert!(!place.join("said").exists(), "{kind}");
        drop(held);
        poll("the container has the lock", SEEN, || place.join("said").exists().then_some(()));
        assert_eq!(shares.engine.docker(&["logs", &name]).ok(), "locked\n", "{kind}");
        assert!(lock(kind, &path).is_none(), "{kind}");
        // A program that waits can be killed, and has no lock afterwards.
        let other = format!("ends-{kind}");
        start(shares, &other, &place, kind, true).ok();
        let waits = || shares.engine.docker(&["top", &other]).stdout.contains("perl");
        poll("the other container waits", SEEN, || waits().then_some(()));
        shares.engine.docker(&["rm", "--force", &other]).ok();
        shares.engine.docker(&["rm", "--force", &name]).ok();
        poll("the lock has ended with the container", SEEN, || lock(kind, &path).map(drop));
        for file in ["said", "keep"] {
            std::fs::remove_file(place.join(file)).unwrap();
        }
    }
}
