//! `bulkhead run`: one command with a temporary engine.
//!
//! The engine has a profile of its own, `run-PID`, and its backend has a pipe to this process, the *lifeline*. When
//! this process ends, in whatever way, the pipe closes, and the backend kills the VM and removes the profile's files.
//! If both are killed, the next `run` finds the files by the process ID in the name and removes them.

use std::{
    ffi::{OsStr, OsString},
    fs, io,
    os::unix::process::ExitStatusExt,
    path::PathBuf,
    process::{ExitCode, ExitStatus},
    time::Duration,
};

use nix::{
    libc,
    sys::{
        signal::{SigSet, Signal, kill},
        signalfd::{SfdFlags, SignalFd},
    },
    unistd::{AccessFlags, Pid, access},
};
use tokio::{
    io::unix::AsyncFd,
    process::{Child, ChildStdin, Command},
};

use super::{
    CliError,
    client::Client,
    colour, environment,
    follow::{self, Output},
    share,
    start::{self, Machine},
};
use crate::{
    backend::{launch::Mode, lock},
    settings::{Base, Paths, ProfileName},
};

/// Exit status if the engine failed, not the command.
pub(super) const OWN_FAILURE: u8 = 125;

/// Signals that are passed on to the command.
const FORWARDED: [Signal; 6] =
    [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM, Signal::SIGUSR1, Signal::SIGUSR2];

/// Time for the backend to end and remove its files.
const CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(30);

/// Run a command with a temporary engine.
///
/// Starts a VM with an empty disk, runs the command with DOCKER_HOST pointing to its engine, and removes everything
/// afterwards. Signals are passed on to the command.
///
/// Containers can mount what is below the home directory and below the current one.
///
/// Exit status: that of the command; 128 plus the signal number if a signal ended it; 127 if it was not found; 126 if
/// it could not be run; 125 if the engine could not be started, or an option could not be carried out. A command that
/// cannot be run is found before the engine is started.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead run -- docker run --rm alpine echo hello
  bulkhead run --cpus 4 --memory 8G -- docker compose up --exit-code-from test")]
pub(super) struct Arguments {
    /// Fail if the engine is not ready within this many seconds; 0 waits forever.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    timeout: u64,
    /// Do not print the stages of the start.
    #[arg(short, long)]
    quiet: bool,
    /// Share no directory of this machine with the engine, not even the current one, and no ssh-agent.
    #[arg(long)]
    no_share: bool,
    /// Read environment variables of the command from a file, in the form of `docker run --env-file`; can be repeated.
    /// DOCKER_HOST is always that of the engine.
    #[arg(long, value_name = "FILE")]
    env_file: Vec<PathBuf>,
    /// Append `DOCKER_HOST=…` and `BULKHEAD_PROFILE=…` to a file once the engine is ready, for other programs that use
    /// it while the command runs.
    #[arg(long, value_name = "FILE")]
    publish_env: Option<PathBuf>,
    #[command(flatten)]
    machine: Machine,
    /// Command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(super) fn run(base: &Base, arguments: Arguments) -> Result<ExitCode, CliError> {
    let variables = environment::read(&arguments.env_file)?;
    // Found now, a mistyped command costs no start of an engine.
    if let Some(refusal) = refusal(&arguments.command[0], search_path(&variables).as_deref()) {
        return Ok(report(&arguments.command[0], refusal));
    }
    sweep(base);
    // Before any thread exists, so that every thread inherits the mask: a signal that one of them takes by default
    // would end this process, and the command would miss it.
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
        // Out here, so that it closes in every case, also when the start is interrupted half-way.
        let mut lifeline = None;
        let result = with_engine(&paths, &arguments, variables, &signals, &mut lifeline).await;
        // The backend ends with this pipe and removes what it made.
        drop(lifeline);
        let _ = start::until_gone(&paths, CLEAN_UP_TIMEOUT).await;
        result
    });
    runtime.shutdown_background();
    // The files of a backend that was killed, or that never started. One that still lives may be using them.
    if lock::holder(&paths).is_none() {
        paths.remove_all()?;
    }
    result
}

/// Creates a profile that is not in use, and marks it as temporary.
fn fresh_profile(base: &Base) -> Result<Paths, CliError> {
    let pid = std::process::id();
    for number in 0..100 {
        // A number only if files of an earlier process with the same ID could not be removed.
        let name = if number == 0 { format!("run-{pid}") } else { format!("run-{pid}-{number}") };
        let name: ProfileName = name.parse().map_err(|error| CliError::Failed(format!("{error}")))?;
        let paths = base.profile(&name)?;
        if !paths.exists() {
            paths.create()?;
            fs::write(paths.throw_away_marker(), "").map_err(CliError::io("cannot write to the data directory"))?;
            return Ok(paths);
        }
    }
    Err(CliError::Failed("no free name for a temporary profile; remove old ones from the data directory".into()))
}

/// Removes temporary profiles whose command and backend were both killed.
fn sweep(base: &Base) {
    for name in base.profiles() {
        let owner = name.as_str().strip_prefix("run-").and_then(|rest| rest.split('-').next()?.parse::<i32>().ok());
        let (Some(owner), Ok(paths)) = (owner, base.profile(&name)) else { continue };
        // The marker and the lock matter as well: process IDs are used again, and a user may have named a profile
        // `run-1`.
        let gone = kill(Pid::from_raw(owner), None) == Err(nix::Error::ESRCH);
        if gone && lock::holder(&paths).is_none() && paths.throw_away_marker().exists() {
            let _ = paths.remove_all();
        }
    }
}

async fn with_engine(
    paths: &Paths,
    arguments: &Arguments,
    variables: Vec<(String, String)>,
    signals: &AsyncFd<SignalFd>,
    lifeline: &mut Option<ChildStdin>,
) -> Result<ExitCode, CliError> {
    tokio::select! {
        ready = start_engine(paths, arguments, lifeline) => ready?,
        (signal, _) = received(signals) => {
            colour::fail(format_args!("interrupted by {} while the engine was starting", signal.as_str()));
            return Ok(code(128 + signal as i32));
        }
    }
    if let Some(file) = &arguments.publish_env {
        environment::publish(paths, file)?;
    }
    let mut command = Command::new(&arguments.command[0]);
    command
        .args(&arguments.command[1..])
        .envs(variables)
        .envs(environment::variables(paths))
        // Each of these would lead docker elsewhere or make it expect TLS.
        .env_remove("DOCKER_CONTEXT")
        .env_remove("DOCKER_TLS_VERIFY")
        .env_remove("DOCKER_CERT_PATH");
    // SAFETY: between fork and exec only one system call is made; nothing is allocated or locked.
    unsafe {
        // The mask survives exec; a command with blocked signals could not be interrupted.
        command.pre_exec(|| SigSet::all().thread_unblock().map_err(io::Error::from));
    }
    match command.spawn() {
        Ok(child) => attend(child, signals).await,
        Err(error) => Ok(report(&arguments.command[0], Refusal::from(error))),
    }
}

/// Reason that the command cannot be run.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    NotFound,
    Other(String),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::NotFound,
            _ => Self::Other(error.to_string()),
        }
    }
}

/// Prints the reason and returns the exit status that shells have for it.
fn report(program: &OsStr, refusal: Refusal) -> ExitCode {
    let (reason, status) = match refusal {
        Refusal::NotFound => ("there is no such program; check its name and PATH".to_owned(), 127),
        Refusal::Other(reason) => (reason, 126),
    };
    colour::fail(format_args!("cannot run {}: {reason}", program.display()));
    code(status)
}

/// The directories in which the command is looked for: it has the variables of the files.
fn search_path(variables: &[(String, String)]) -> Option<OsString> {
    let named = variables.iter().rfind(|(name, _)| name == "PATH").map(|(_, value)| value.into());
    named.or_else(|| std::env::var_os("PATH"))
}

/// Returns the reason that a program cannot be run, if it is known before the attempt. Looks for it as execvp(3) does.
fn refusal(program: &OsStr, path: Option<&OsStr>) -> Option<Refusal> {
    let places: Vec<PathBuf> = if program.as_encoded_bytes().contains(&b'/') {
        vec![program.into()]
    } else {
        std::env::split_paths(path?).map(|directory| directory.join(program)).collect()
    };
    let mut refusal = Refusal::NotFound;
    for place in places {
        let error = match fs::metadata(&place) {
            Ok(metadata) if metadata.is_dir() => io::Error::from(io::ErrorKind::IsADirectory),
            Ok(_) => match access(&place, AccessFlags::X_OK) {
                Ok(()) => return None,
                Err(errno) => errno.into(),
            },
            Err(error) => error,
        };
        // One that is there and cannot be run is remembered while the others are tried.
        if !matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) {
            refusal = error.into();
        }
    }
    Some(refusal)
}

async fn start_engine(paths: &Paths, arguments: &Arguments, lifeline: &mut Option<ChildStdin>) -> Result<(), CliError> {
    let mut options = arguments.machine.options()?;
    options.no_shares = arguments.no_share;
    // A directory that was removed, or has a name that is not text, is not shared.
    options.working_directory = share::working_directory().ok().filter(|path| path.to_str().is_some());
    *lifeline = start::ensure_backend(paths, &options, Mode::ThrowAway).await?;
    let ended = || CliError::Failed("the temporary backend exited".into());
    let client = Client::connect(paths).await?.ok_or_else(ended)?;
    let mut events = client.events().await?;
    let answer = client.start(&options).await?;
    start::warn_of_policy(paths, &client).await;
    let output = if arguments.quiet { Output::Nowhere } else { Output::Stderr };
    follow::until_ready(paths, &mut events, answer.boot, follow::limit(arguments.timeout), output).await
}

/// Waits for the command to exit, and passes signals on to it.
async fn attend(mut child: Child, signals: &AsyncFd<SignalFd>) -> Result<ExitCode, CliError> {
    loop {
        tokio::select! {
            status = child.wait() => {
                return Ok(code_of(status.map_err(CliError::io("cannot wait for the command"))?));
            }
            (signal, from_terminal) = received(signals) => {
                // A terminal signals its whole foreground process group, so the command got this one already. A second
                // one would mean something else to it, such as the second Ctrl-C to docker compose.
                if let Some(pid) = child.id().filter(|_| !from_terminal) {
                    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
                }
            }
        }
    }
}

/// Waits for a signal; returns it, and whether a key of the terminal caused it.
async fn received(signals: &AsyncFd<SignalFd>) -> (Signal, bool) {
    loop {
        // Without the reactor there are no more signals, but the command still has to be waited for.
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

/// The exit status by the convention of shells: 128 plus the signal's number.
fn code_of(status: ExitStatus) -> ExitCode {
    code(status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1))
}

fn code(number: i32) -> ExitCode {
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}
