//! Commands that always end.

use std::{
    io::{Read, Write},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// Time for a docker command; the emulated machine needs ten seconds for what hardware does in a third of one.
pub const COMMAND: Duration = Duration::from_secs(90);

/// A command that ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output; bytes that are not UTF-8 are replaced.
    pub stdout: String,
    /// Standard error, likewise.
    pub stderr: String,
}

impl Ran {
    /// Standard output of a command that must succeed.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "{}: {}{}", self.status, self.stdout, self.stderr);
        self.stdout
    }

    /// Standard error of a command that must fail with `code`.
    #[track_caller]
    pub fn fails(self, code: i32) -> String {
        assert_eq!(self.status.code(), Some(code), "{}{}", self.stdout, self.stderr);
        self.stderr
    }

    /// Standard error of a verb that fails: its last line, and no other, begins with `error:`.
    #[track_caller]
    pub fn refused(self) -> String {
        let message = self.fails(1);
        let errors = message.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(errors == 1 && message.lines().last().is_some_and(|line| line.starts_with("error: ")), "{message}");
        message
    }
}

/// Kills a process group at a deadline unless it is dropped before.
struct Watchdog {
    fired: Arc<AtomicBool>,
    cancel: mpsc::Sender<()>,
}

impl Watchdog {
    fn new(child: &Child, limit: Duration) -> Self {
        let group = Pid::from_raw(-child.id().cast_signed());
        let fired = Arc::new(AtomicBool::new(false));
        let (cancel, cancelled) = mpsc::channel();
        let mine = Arc::clone(&fired);
        thread::spawn(move || {
            if cancelled.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                mine.store(true, Ordering::SeqCst);
                let _ = kill(group, Signal::SIGKILL);
            }
        });
        Self { fired, cancel }
    }

    fn fired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.cancel.send(());
    }
}

/// The command as a user types it.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Starts a command in a process group of its own, with pipes to it.
fn spawn(mut command: Command) -> Child {
    command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Runs a command with `input` as its whole standard input.
#[track_caller]
pub fn run_with(command: Command, input: &[u8], limit: Duration) -> Ran {
    let line = line(&command);
    let begun = Instant::now();
    let mut child = spawn(command);
    let watchdog = Watchdog::new(&child, limit);
    let (mut stdin, input) = (child.stdin.take().unwrap(), input.to_owned());
    // EPIPE is not an error: a command may end without reading all of its input.
    let feeder = thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let ran = Ran { status: output.status, stdout: text(&output.stdout), stderr: text(&output.stderr) };
    assert!(!watchdog.fired(), "{line} did not end within {limit:?}: {}{}", ran.stdout, ran.stderr);
    println!("{:6.2} s  {line}", begun.elapsed().as_secs_f64());
    ran
}

/// Runs a command without input.
#[track_caller]
pub fn run(command: Command, limit: Duration) -> Ran {
    run_with(command, b"", limit)
}

/// A command between two streams that are both checked while they flow.
///
/// `feed` writes standard input, which is closed when it returns; `check` reads standard output to its end. Returns how
/// long it took.
#[track_caller]
pub fn stream<F, C>(command: Command, limit: Duration, feed: F, check: C) -> Duration
where
    F: FnOnce(&mut dyn Write) + Send + 'static,
    C: FnOnce(&mut dyn Read),
{
    let line = line(&command);
    let begun = Instant::now();
    let mut child = spawn(command);
    let watchdog = Watchdog::new(&child, limit);
    let mut stdin = child.stdin.take().unwrap();
    let feeder = thread::spawn(move || {
        feed(&mut stdin);
        drop(stdin);
    });
    let mut stderr = child.stderr.take().unwrap();
    let complaints = thread::spawn(move || {
        let mut text = String::new();
        let _ = stderr.read_to_string(&mut text);
        text
    });
    check(&mut child.stdout.take().unwrap());
    let status = child.wait().unwrap();
    assert!(!watchdog.fired(), "{line} did not end within {limit:?}");
    let complaints = complaints.join().unwrap();
    assert!(status.success(), "{line}: {status} (signal {:?}): {complaints}", status.signal());
    feeder.join().expect("standard input was not taken");
    begun.elapsed()
}

/// Asks until there is an answer, for states that come without an event.
#[track_caller]
pub fn poll<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
        thread::sleep(Duration::from_millis(50));
    }
}
