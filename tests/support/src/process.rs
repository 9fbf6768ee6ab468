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

/// What a command that ended said.
#[derive(Debug)]
pub struct Ran {
    pub status: ExitStatus,
    pub stdout: String,
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

    /// The one line that begins with `error:`, which a verb of bulkhead that fails says last.
    #[track_caller]
    pub fn refused(self) -> String {
        let message = self.fails(1);
        let errors = message.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(errors == 1 && message.lines().last().is_some_and(|line| line.starts_with("error: ")), "{message}");
        message
    }
}

/// Kills a process group unless it is dropped in time.
pub struct Watchdog {
    fired: Arc<AtomicBool>,
    cancel: mpsc::Sender<()>,
}

impl Watchdog {
    pub fn new(child: &Child, limit: Duration) -> Self {
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

    pub fn fired(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        let _ = self.cancel.send(());
    }
}

/// What a person would type.
fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Starts a command in a process group of its own, with pipes to it.
pub fn spawn(mut command: Command) -> Child {
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
    // Who does not read all of its input has seen enough.
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

/// Asks again until there is an answer; for what no event tells.
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
