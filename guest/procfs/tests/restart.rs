//! A service that dies or hangs under load, as readers of its files see it. Needs root and `/dev/fuse`.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::registry::Registry;
use support::procfs::{Service, container};

/// Maximum time of a read while the service is killed every 50 ms. init's timeout is not part of it.
const BOUND: Duration = Duration::from_secs(5);

struct Init {
    dir: tempfile::TempDir,
    service: Service,
}

impl Init {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let service = Service::new(Path::new(env!("CARGO_BIN_EXE_bulkhead-procfs")), &dir.path().join("procfs"));
        Self { dir, service }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("procfs")
    }

    /// Enters a container that lives as long as this process.
    fn enter(&self, id: &str) -> PathBuf {
        let slot = Registry::open(&self.state()).unwrap().enter(container(id)).unwrap();
        self.state().join("fs").join(slot.to_string())
    }

    fn restart_service(&mut self) {
        self.service.kill();
        self.service.start();
    }

    /// Stops all threads of the service, and returns when they have stopped.
    fn hang(&self) {
        let (pid, mut status) = (self.service.process.as_ref().unwrap().id().cast_signed(), 0);
        // SAFETY: takes plain integers and a place for one; the child has not ended, so the number is its own.
        unsafe {
            assert_eq!(libc::kill(pid, libc::SIGSTOP), 0);
            assert_eq!(libc::waitpid(pid, &raw mut status, libc::WUNTRACED), pid);
        }
        assert!(libc::WIFSTOPPED(status));
    }
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn readers_only_wait_while_the_service_is_killed_under_load() {
    let mut init = Init::new();
    let directories = [init.enter("a"), init.enter("b")];
    // After the first close the kernel sends no more FLUSH. Otherwise execve(2) in a child of this process, which
    // closes copies of the readers' files, would wait for the service that the child is about to become. init has none
    // open.
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
                // Each directory has one writer, so its value must have survived.
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
            init.restart_service();
        }
        thread::sleep(Duration::from_millis(200));
        ended.store(true, Ordering::Relaxed);
        readers.into_iter().map(|reader| reader.join().unwrap()).max().unwrap()
    });
    println!("{} rounds while 40 processes were killed, the longest {longest:.1?}", reads.load(Ordering::Relaxed));
    assert!(reads.load(Ordering::Relaxed) > 100);
    assert!(longest < BOUND, "{longest:?}");
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn requests_that_a_hanging_process_took_are_answered_by_the_next_one() {
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
    init.restart_service();
    for reader in readers {
        assert!(!reader.join().unwrap().is_empty());
    }
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn after_an_abort_all_requests_fail_and_none_waits() {
    let init = Init::new();
    let directory = init.enter("a");
    let uptime = directory.join("proc+uptime");
    let mut open = fs::File::open(&uptime).unwrap();
    init.hang();
    let waiting = thread::spawn(move || std::io::read_to_string(&mut open).unwrap_err());
    thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished());
    init.service.abort().unwrap();
    let error = waiting.join().unwrap();
    assert!([Some(libc::ECONNABORTED), Some(libc::ENOTCONN)].contains(&error.raw_os_error()), "{error}");
}
