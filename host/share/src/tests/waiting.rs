//! Requests that wait for a lock, with the threads of a device, a successor of its process, and a real kernel.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use super::{
    device::{Driver, device},
    kernel::mounted_with_locks,
    locks::{ALL, LAST, READ_LOCK, SETLKW, UNLOCK, WRITE_LOCK, lock},
    *,
};
use crate::sys::{self, HostLock};

const INTERRUPT: u32 = 36;

/// A device with the threads of its queues, and a file that is open in the guest.
struct Waiting {
    guest: Guest,
    driver: Driver,
    node: u64,
    handle: u64,
}

impl Waiting {
    fn new() -> Self {
        let guest = Guest::locking();
        std::fs::write(guest.path("file"), b"contents").unwrap();
        let (server, _) = Server::new(&[guest.share("", false)], &[], 4096, 8, &guest.state, true);
        server.start_lock_threads(|| Ok(())).unwrap();
        Self::of(guest, Driver::new(device(Arc::new(server))))
    }

    fn of(guest: Guest, driver: Driver) -> Self {
        let names = guest.path("file");
        let find = |node, name| entry(&driver.call(2, LOOKUP, node, body().name(name))[16..]).0;
        let node = names.components().skip(1).fold(fuse::ROOT, find);
        let handle = u64_at(&driver.call(2, OPEN, node, body().u32(libc::O_RDWR as u32).u32(0)), 16);
        // The reply is not one of those below.
        driver.reply_at(2, 0);
        Self { guest, driver, node, handle }
    }

    /// Another open file of the host.
    fn host(&self) -> File {
        File::options().read(true).write(true).open(self.guest.path("file")).unwrap()
    }

    /// Sends a request for a lock that waits; returns its id.
    fn send(&self, place: u64, owner: u64, kind: u32, flags: u32) -> u64 {
        let request = request(SETLKW, self.node, own(), &lock(self.handle, owner, ALL, kind, flags).0);
        self.driver.send_at(2, place, &request, 64);
        u64_at(&request, 8)
    }

    /// Lets requests that were sent before begin to wait: those behind them in the queue are answered.
    fn pass(&self) {
        let request = request(GETATTR, self.node, own(), &body().u64(0).u64(0).0);
        self.driver.send_at(2, 0, &request, 256);
        assert_eq!(u32_at(&self.driver.reply_at(2, 0), 4), 0);
    }

    /// The error of the reply to a request.
    fn error(&self, place: u64) -> i32 {
        -u32_at(&self.driver.reply_at(2, place), 4).cast_signed()
    }
}

const HOST_LOCKS: [(HostLock, HostLock, u32); 2] = [
    (HostLock::Whole(libc::LOCK_EX), HostLock::Whole(libc::LOCK_UN), 1),
    (HostLock::Range(libc::F_WRLCK, 3, 3), HostLock::Range(libc::F_UNLCK, 3, 3), 0),
];

#[test]
fn a_request_waits_for_the_host_while_those_behind_it_are_served() {
    for (held, free, flags) in HOST_LOCKS {
        let waiting = Waiting::new();
        let host = waiting.host();
        sys::try_lock(&host, &held).unwrap();
        waiting.send(1, 1, WRITE_LOCK, flags);
        waiting.pass();
        waiting.send(2, 1, UNLOCK, flags);
        assert_eq!(waiting.error(2), 0, "to unlock is not to wait");
        assert!(!waiting.driver.is_ready(2, 1));
        sys::try_lock(&host, &free).unwrap();
        assert_eq!(waiting.error(1), 0);
        // The guest has it now, until it gives it up.
        assert_eq!(sys::try_lock(&host, &held), Err(rustix::io::Errno::AGAIN));
        waiting.send(3, 1, UNLOCK, flags);
        assert_eq!(waiting.error(3), 0);
        sys::try_lock(&host, &held).unwrap();
    }
}

#[test]
fn an_interrupted_request_waits_no_longer_and_has_no_lock() {
    for (held, free, flags) in HOST_LOCKS {
        let waiting = Waiting::new();
        let host = waiting.host();
        sys::try_lock(&host, &held).unwrap();
        // Before, while and after a thread begins to wait.
        for round in 0..200 {
            let unique = waiting.send(1, 1, WRITE_LOCK, flags);
            waiting.pass();
            thread::sleep(Duration::from_micros(round));
            let interrupt = request(INTERRUPT, 0, own(), &body().u64(unique).0);
            waiting.driver.send_at(0, 1, &interrupt, 0);
            assert_eq!(waiting.error(1), libc::EINTR, "round {round}");
        }
        // The interrupt overtakes the request in another queue.
        let request = request(SETLKW, waiting.node, own(), &lock(waiting.handle, 1, ALL, WRITE_LOCK, flags).0);
        let interrupt = super::request(INTERRUPT, 0, own(), &body().u64(u64_at(&request, 8)).0);
        waiting.driver.send(0, &interrupt, 0);
        waiting.driver.completed(0);
        waiting.driver.send_at(2, 1, &request, 64);
        assert_eq!(waiting.error(1), libc::EINTR);
        sys::try_lock(&host, &free).unwrap();
        sys::try_lock(waiting.host(), &held).unwrap();
    }
}

#[test]
fn processes_that_are_killed_while_requests_wait_leave_none_without_an_answer() {
    for (held, free, flags) in HOST_LOCKS {
        let guest = Guest::new();
        std::fs::write(guest.path("file"), b"contents").unwrap();
        let (memory, shares) = (process::state(), [guest.share("", false)]);
        let (mut child, mut control, ours) = process::serve(&memory, &shares, true);
        let mut waiting = Waiting::of(guest, Driver::new(ours));
        let host = waiting.host();
        for round in 0..12 {
            sys::try_lock(&host, &held).unwrap();
            waiting.send(1, 1, WRITE_LOCK, flags);
            waiting.pass();
            waiting.send(2, 1, READ_LOCK, flags);
            // Before it waits, and while both do.
            thread::sleep(Duration::from_micros(round * 100));
            child.kill().unwrap();
            child.wait().unwrap();
            drop(control);
            let ours;
            (child, control, ours) = process::serve(&memory, &shares, true);
            waiting.driver.reconnect(ours);
            waiting.pass();
            assert!(!waiting.driver.is_ready(2, 1) && !waiting.driver.is_ready(2, 2), "round {round}");
            sys::try_lock(&host, &free).unwrap();
            // One owner asks for both, so that neither is in the way of the other.
            assert_eq!((waiting.error(1), waiting.error(2)), (0, 0), "round {round}");
            waiting.pass();
            waiting.send(3, 1, UNLOCK, flags);
            assert_eq!(waiting.error(3), 0, "round {round}");
        }
        drop(control);
        process::end(child);
    }
}

#[test]
fn as_many_requests_wait_as_there_are_threads() {
    let guest = Guest::locking();
    let (node, handle) = guest.file("file");
    let host = File::options().write(true).open(guest.path("file")).unwrap();
    sys::try_lock(&host, &HostLock::Whole(libc::LOCK_EX)).unwrap();
    let server = guest.serving.as_ref().unwrap();
    thread::scope(|scope| {
        let whole = || lock(handle, 1, ALL, WRITE_LOCK, 1).0;
        let requests: Vec<_> = (0..70).map(|_| request(SETLKW, node, own(), &whole())).collect();
        let wait = |request: &Vec<u8>| {
            let request = request.clone();
            scope.spawn(move || -u32_at(&exchange(server, &request, 64), 4).cast_signed())
        };
        let threads: Vec<_> = requests.iter().map(wait).collect();
        let deadline = Instant::now() + Duration::from_secs(20);
        while threads.iter().filter(|thread| thread.is_finished()).count() < 6 {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(1));
        }
        for request in &requests {
            exchange(server, &super::request(INTERRUPT, 0, own(), &body().u64(u64_at(request, 8)).0), 0);
        }
        let errors: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        let count = |error| errors.iter().filter(|other| **other == error).count();
        assert_eq!((count(libc::EINTR), count(libc::ENOLCK)), (64, 6));
    });
}

#[test]
fn a_queue_that_is_taken_back_has_no_waiting_requests() {
    let waiting = Waiting::new();
    let host = waiting.host();
    sys::try_lock(&host, &HOST_LOCKS[0].0).unwrap();
    waiting.send(1, 1, WRITE_LOCK, 1);
    waiting.pass();
    waiting.driver.stop();
    sys::try_lock(&host, &HOST_LOCKS[0].1).unwrap();
    // The lock that nobody waits for any more is nobody's.
    sys::try_lock(waiting.host(), &HOST_LOCKS[0].0).unwrap();
    assert!(!waiting.driver.is_ready(2, 1));
    assert_eq!(waiting.guest.state.waiting(), 0);
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn programs_behind_a_real_kernel_lock_against_those_of_the_host() {
    mounted_with_locks(|mount| {
        mount.output(0, "echo > l; chmod 666 l");
        let path = mount.directory.path().join("share/l");
        let host = File::options().read(true).write(true).open(&path).unwrap();
        for (held, free, command) in [
            (HOST_LOCKS[0].0, HOST_LOCKS[0].1, "flock"),
            (HostLock::Range(libc::F_WRLCK, 0, LAST), HostLock::Range(libc::F_UNLCK, 0, LAST), "flock --fcntl"),
        ] {
            let command = if command == "flock" { "flock".to_owned() } else { posix_flock() };
            sys::try_lock(&host, &held).unwrap();
            assert!(!mount.run(0, &format!("{command} -n l true")).status.success(), "{command}");
            // A signal ends the waiting, by which `timeout` needs no more than a second.
            assert_eq!(mount.run(0, &format!("timeout 1 {command} l true")).status.code(), Some(124), "{command}");
            thread::scope(|scope| {
                let waiting = scope.spawn(|| mount.run(0, &format!("{command} l echo got")));
                thread::sleep(Duration::from_millis(300));
                assert!(!waiting.is_finished());
                sys::try_lock(&host, &free).unwrap();
                assert_eq!(waiting.join().unwrap().stdout, b"got\n", "{command}");
            });
            // The program has ended, and its lock with it: that of flock(2) as soon as the kernel's RELEASE arrives, for
            // which close(2) does not wait.
            let deadline = Instant::now() + Duration::from_secs(20);
            while let Err(error) = sys::try_lock(&host, &held) {
                assert!(error == rustix::io::Errno::AGAIN && Instant::now() < deadline, "{command}: {error}");
                thread::sleep(Duration::from_millis(1));
            }
            sys::try_lock(&host, &free).unwrap();
        }
        let script = r#"/usr/bin/python3 - <<'END'
import fcntl, os, sqlite3
fd = os.open("l", os.O_RDWR)
fcntl.lockf(fd, fcntl.LOCK_EX)
if os.fork() == 0:
    other = os.open("l", os.O_RDWR)
    try:
        fcntl.lockf(other, fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(1)
    except BlockingIOError:
        os._exit(0)
assert os.wait()[1] == 0
os.close(os.open("l", os.O_RDONLY))
if os.fork() == 0:
    fcntl.lockf(os.open("l", os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB); os._exit(0)
assert os.wait()[1] == 0
db = sqlite3.connect("db")
db.execute("create table t (x)"); db.execute("insert into t values (1)"); db.commit()
END"#;
        mount.output(0, script);
    });
}

/// A program like flock(1) for locks of fcntl(2).
fn posix_flock() -> String {
    let script = "import fcntl, os, sys; a = sys.argv[1:]; n = a[0] == '-n'; a = a[1:] if n else a; \
                  fcntl.lockf(os.open(a[0], os.O_RDWR), fcntl.LOCK_EX | (fcntl.LOCK_NB if n else 0)); \
                  os.execvp(a[1], a[1:])";
    // execvp would keep the lock; the descriptor is closed by it, as Python makes it.
    format!("/usr/bin/python3 -c \"{script}\"")
}
