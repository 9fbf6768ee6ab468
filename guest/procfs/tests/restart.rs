//! A warden that dies or hangs under load, seen by those who read its files. Needs root and `/dev/fuse`.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::{
    namespace::Identity,
    process::Process,
    registry::{Container, Registry},
};

use support::procfs::Warden;

/// The longest that a read may take while the warden is killed every 50 ms; init's patience is no part of it.
const BOUND: Duration = Duration::from_secs(5);

struct Init {
    dir: tempfile::TempDir,
    warden: Warden,
}

impl Init {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let warden = Warden::new(Path::new(env!("CARGO_BIN_EXE_bulkhead-procfs")), &dir.path().join("warden"));
        Self { dir, warden }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("warden")
    }

    /// Enters a container; it lives as long as this process.
    fn enter(&self, id: &str) -> PathBuf {
        let creator = Process::find(std::process::id()).unwrap();
        let container = Container {
            slot: 0,
            id: id.to_owned(),
            state_root: "/nowhere".into(),
            owner: 0,
            user_namespace: Identity::of(fs::File::open("/proc/self/ns/user").unwrap()).unwrap(),
            cgroup: None,
            read_only: false,
            creator,
        };
        let slot = Registry::open(&self.state()).unwrap().enter(container).unwrap();
        self.state().join("fs").join(slot.to_string())
    }

    fn replace_warden(&mut self) {
        self.warden.kill();
        self.warden.start();
    }

    /// Stops every thread of the warden and returns when all of them have stopped.
    fn hang(&self) {
        let (warden, mut status) = (self.warden.process.as_ref().unwrap().id().cast_signed(), 0);
        // SAFETY: takes plain integers and a place for one; the child has not ended, so the number is its own.
        unsafe {
            assert_eq!(libc::kill(warden, libc::SIGSTOP), 0);
            assert_eq!(libc::waitpid(warden, &raw mut status, libc::WUNTRACED), warden);
        }
        assert!(libc::WIFSTOPPED(status));
    }
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn readers_only_wait_while_the_warden_is_killed_under_load() {
    let mut init = Init::new();
    let directories = [init.enter("a"), init.enter("b")];
    // From the first close on the kernel flushes no more. A child of this process would else wait at its execve(2), which
    // closes copies of the readers' files, for the warden that it is to become; init has none of these files open.
    fs::read_to_string(directories[0].join("proc+uptime")).unwrap();
    let (ended, reads) = (AtomicBool::new(false), AtomicUsize::new(0));
    let longest = thread::scope(|scope| {
        let reader = |directory: &Path, mine: usize| {
            let panic = directory.join("proc+sys+kernel+panic");
            let mut longest = Duration::ZERO;
            let mut number = mine;
            while !ended.load(Ordering::Relaxed) {
                let begun = Instant::now();
                number += 10;
                fs::write(&panic, number.to_string()).unwrap();
                let read = fs::read_to_string(&panic).unwrap();
                // Each directory has one writer: what it wrote must have survived.
                assert_eq!(read.trim(), number.to_string());
                let uptime = fs::read_to_string(directory.join("proc+uptime")).unwrap();
                assert_eq!(uptime.split_ascii_whitespace().count(), 2, "{uptime:?}");
                assert!(fs::read_to_string(directory.join("proc+meminfo")).unwrap().starts_with("MemTotal:"));
                longest = longest.max(begun.elapsed());
                reads.fetch_add(1, Ordering::Relaxed);
            }
            longest
        };
        let readers: Vec<_> = directories
            .iter()
            .enumerate()
            .map(|(mine, directory)| scope.spawn(move || reader(directory, mine)))
            .collect();
        for _ in 0..40 {
            thread::sleep(Duration::from_millis(50));
            init.replace_warden();
        }
        thread::sleep(Duration::from_millis(200));
        ended.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).max().unwrap()
    });
    println!("{} rounds while 40 wardens were killed, the longest {longest:.1?}", reads.load(Ordering::Relaxed));
    assert!(reads.load(Ordering::Relaxed) > 100);
    assert!(longest < BOUND, "{longest:?}");
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn what_a_warden_that_hangs_took_is_answered_by_the_next_one() {
    let mut init = Init::new();
    let directory = init.enter("a");
    fs::read_to_string(directory.join("proc+uptime")).unwrap();
    init.hang();
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let path = directory.join("proc+uptime");
            thread::spawn(move || fs::read_to_string(path).unwrap())
        })
        .collect();
    thread::sleep(Duration::from_millis(300));
    assert!(readers.iter().all(|reader| !reader.is_finished()));
    init.replace_warden();
    for reader in readers {
        assert!(!reader.join().unwrap().is_empty());
    }
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn once_the_connection_is_let_go_everything_fails_and_nothing_waits() {
    let init = Init::new();
    let directory = init.enter("a");
    let uptime = directory.join("proc+uptime");
    let mut open = fs::File::open(&uptime).unwrap();
    init.hang();
    let waiting = thread::spawn(move || std::io::read_to_string(&mut open).unwrap_err());
    thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished());
    init.warden.abort().unwrap();
    let error = waiting.join().unwrap();
    assert!([Some(libc::ECONNABORTED), Some(libc::ENOTCONN)].contains(&error.raw_os_error()), "{error}");
}
