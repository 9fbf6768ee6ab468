//! `bulkhead run`: a throw-away engine around one command.

use std::{
    ffi::OsString,
    fs, io,
    os::unix::process::ExitStatusExt,
    process::{ExitCode, ExitStatus},
    time::Duration,
};

use nix::{
    libc,
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::Pid,
};
use tokio::{
    io::unix::AsyncFd,
    process::{Child, ChildStdin, Command},
};

use super::{
    CliError,
    client::Client,
    follow::{self, Output},
    start::{self, Machine},
};
use crate::{
    backend::{launch::Mode, lock},
    settings::{Base, Paths, ProfileName},
};

/// Exit status when the engine, not the command, failed.
pub(super) const OWN_FAILURE: u8 = 125;

/// Signals that are passed on.
const FORWARDED: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// Time for the backend to remove everything.
const CLEAN_UP: Duration = Duration::from_secs(30);

/// Run one command with a throw-away engine.
///
/// A VM with an empty disk is started, the command is run with DOCKER_HOST pointing to it, and everything is removed
/// afterwards. Signals are passed on to the command.
///
/// The exit status is the command's, 128 plus the signal's number when a signal ended it, 126 or 127 when it could not be
/// run or found, and 125 when the engine could not be started.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead run -- docker run --rm alpine echo hello
  bulkhead run --cpus 4 --memory 8G -- docker compose up --exit-code-from test")]
pub(super) struct Arguments {
    /// Fail when the engine does not answer within this many seconds; 0 waits for ever.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,
    /// Do not show the stages of the start.
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    machine: Machine,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) fn run(base: &Base, arguments: Arguments) -> Result<ExitCode, CliError> {
    sweep(base);
    // Before any thread exists, so that every thread inherits the mask.
    let mask: SigSet = FORWARDED.into_iter().collect();
    mask.thread_block().map_err(|errno| CliError::io("cannot block signals")(errno.into()))?;
    let paths = fresh_profile(base)?;
    let runtime = super::runtime()?;
    let result = runtime.block_on(async {
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)
            .map_err(io::Error::from)
            // SAFETY: the descriptor is owned, so it stays open and the same until the registration is dropped with it.
            .and_then(|signals| unsafe { AsyncFd::register(signals) }.map_err(Into::into))
            .map_err(CliError::io("cannot receive signals"))?;
        let mut life_line = None;
        let result = with_engine(&paths, &arguments, &signals, &mut life_line).await;
        // The backend ends with this pipe and removes what it made.
        drop(life_line);
        let _ = start::until_gone(&paths, CLEAN_UP).await;
        result
    });
    runtime.shutdown_background();
    // What a backend that was killed, or that never came up, left behind.
    if lock::holder(&paths).is_none() {
        paths.remove_all()?;
    }
    result
}

/// A profile that nobody uses, marked as one to throw away.
fn fresh_profile(base: &Base) -> Result<Paths, CliError> {
    let pid = std::process::id();
    for number in 0..100 {
        let name = if number == 0 { format!("run-{pid}") } else { format!("run-{pid}-{number}") };
        let name: ProfileName = name.parse().map_err(|error| CliError::Failed(format!("{error}")))?;
        let paths = base.profile(&name)?;
        if !paths.exists() {
            paths.create()?;
            fs::write(paths.throw_away_marker(), "").map_err(CliError::io("cannot write to the data folder"))?;
            return Ok(paths);
        }
    }
    Err(CliError::Failed("no free name for a throw-away profile; remove old ones from the data folder".into()))
}

/// Removes throw-away profiles whose command and backend were both killed.
fn sweep(base: &Base) {
    for name in base.profiles() {
        let owner = name.as_str().strip_prefix("run-").and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
        let (Some(owner), Ok(paths)) = (owner, base.profile(&name)) else { continue };
        let gone = kill(Pid::from_raw(owner), None) == Err(nix::Error::ESRCH);
        if gone && lock::holder(&paths).is_none() && paths.throw_away_marker().exists() {
            let _ = paths.remove_all();
        }
    }
}

async fn with_engine(
    paths: &Paths,
    arguments: &Arguments,
    signals: &AsyncFd<SignalFd>,
    life_line: &mut Option<ChildStdin>,
) -> Result<ExitCode, CliError> {
    tokio::select! {
        ready = start_engine(paths, arguments, life_line) => ready?,
        (signal, _) = received(signals) => {
            eprintln!("error: interrupted by {} while the engine was starting", signal.as_str());
            return Ok(code(128 + signal as i32));
        }
    }
    let mut command = Command::new(&arguments.command[0]);
    command
        .args(&arguments.command[1..])
        .env("DOCKER_HOST", paths.docker_host())
        .env_remove("DOCKER_CONTEXT")
        .env_remove("DOCKER_TLS_VERIFY")
        .env_remove("DOCKER_CERT_PATH");
    // SAFETY: between fork and exec only one system call is made; nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| SigSet::all().thread_unblock().map_err(io::Error::from));
    }
    match command.spawn() {
        Ok(child) => attend(child, signals).await,
        Err(error) => {
            eprintln!("error: cannot run {}: {error}", arguments.command[0].display());
            Ok(code(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }))
        }
    }
}

async fn start_engine(
    paths: &Paths,
    arguments: &Arguments,
    life_line: &mut Option<ChildStdin>,
) -> Result<(), CliError> {
    let options = arguments.machine.options()?;
    *life_line = start::ensure_backend(paths, &options, Mode::ThrowAway).await?;
    let ended = || CliError::Failed("the throw-away backend ended".into());
    let client = Client::connect(paths).await?.ok_or_else(ended)?;
    let mut events = client.events().await?;
    let answer = client.start(&options).await?;
    start::tell_policy(paths, &client).await;
    let output = if arguments.quiet { Output::Nowhere } else { Output::Stderr };
    follow::until_ready(paths, &mut events, answer.boot, follow::limit(arguments.timeout), output).await
}

/// Waits for the command and passes signals on.
async fn attend(mut child: Child, signals: &AsyncFd<SignalFd>) -> Result<ExitCode, CliError> {
    loop {
        tokio::select! {
            status = child.wait() => {
                return Ok(code_of(status.map_err(CliError::io("cannot wait for the command"))?));
            }
            (signal, from_terminal) = received(signals) => {
                // A terminal sends its signals to the command as well: twice would mean something else to it.
                if let Some(pid) = child.id().filter(|_| !from_terminal) {
                    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
                }
            }
        }
    }
}

/// The next signal, and whether the kernel sent it because of a key.
async fn received(signals: &AsyncFd<SignalFd>) -> (Signal, bool) {
    loop {
        let Ok(mut ready) = signals.readable().await else { return std::future::pending().await };
        match ready.get_inner().read_signal() {
            Ok(Some(info)) => {
                if let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) {
                    return (signal, info.ssi_code == libc::SI_KERNEL);
                }
            }
            _ => ready.clear_ready(),
        }
    }
}

fn code_of(status: ExitStatus) -> ExitCode {
    code(status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1))
}

fn code(number: i32) -> ExitCode {
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}
