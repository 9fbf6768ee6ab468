//! `bulkhead start`.

use std::{path::PathBuf, time::Duration};

use tokio::{process::ChildStdin, task::spawn_blocking, time::timeout};

use super::{
    CliError,
    client::{Client, ClientError},
    colour, command,
    follow::{self, Output},
    print, unisolated,
};
use crate::{
    backend::{
        api::{Outcome, StartOptions, StateName, Status},
        launch::{self, Mode},
        lock,
        plan::Plan,
    },
    settings::{NetworkKind, Paths, Policy, PolicyFacts, ProxyEnvironment, Size},
};

/// Time for a backend that is ending to exit.
const EXIT_TIMEOUT: Duration = Duration::from_secs(120);

/// Start the engine and wait until it is ready.
///
/// Prints each stage (kernel, agent, disk, engine) with the time since the start. Options that are not given follow the
/// settings; see `bulkhead settings list`. Creates the docker context `bulkhead`, or `bulkhead-NAME` for another
/// profile; the current context is not changed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead start
  bulkhead start --cpus 4 --memory 8G --disk 100G
  bulkhead start --detach && bulkhead status")]
pub(super) struct Arguments {
    /// Fail if the engine is not ready within this many seconds; 0 waits forever.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub(super) timeout: u64,
    /// Return as soon as the VM is starting, without waiting for the engine.
    #[arg(long)]
    pub(super) detach: bool,
    #[command(flatten)]
    pub(super) machine: Machine,
}

/// The options of the VM, which `start` and `run` share.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(super) struct Machine {
    /// Number of virtual CPUs [default: half of the host's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: Option<u8>,
    /// Guest memory, such as 8G [default: a quarter of the host's, at most 16G].
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Maximum size of the data disk, such as 100G; space is allocated only as it is used [default: 64G].
    #[arg(long, value_name = "SIZE")]
    disk: Option<Size>,
    /// Network: `user` (built-in user-mode networking), `none`, `passt`, or `tap=NAME` for an existing tap device
    /// [default: user].
    #[arg(long, value_name = "user|none|passt|tap=NAME")]
    net: Option<NetworkKind>,
    /// Kernel to boot instead of the image's (advanced); refused if a policy locks isolation on.
    #[arg(long, value_name = "PATH", requires = "rootfs", hide_short_help = true)]
    kernel: Option<PathBuf>,
    /// Root file system (EROFS) to use instead of the image's (advanced); refused if a policy locks isolation on.
    #[arg(long, value_name = "PATH", requires = "kernel", hide_short_help = true)]
    rootfs: Option<PathBuf>,
    /// Add a serial port and log all kernel messages, from the first line on, to serial.log next to console.log; slow
    /// (advanced).
    #[arg(long, hide_short_help = true)]
    serial: bool,
}

impl Machine {
    /// The options as a request. Paths and the environment are resolved here, because the backend has its own working
    /// directory and the environment of the command that started it.
    pub(super) fn options(&self) -> Result<StartOptions, CliError> {
        // An option takes precedence over its variable. The image's own lookup does the same, but in the backend, which
        // has the environment of the command that started it.
        let path = |named: &Option<PathBuf>, variable: &str| {
            named
                .clone()
                .or_else(|| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from))
                .map(std::path::absolute)
                .transpose()
                .map_err(CliError::io("cannot find the working directory"))
        };
        Ok(StartOptions {
            cpus: self.cpus,
            memory_mib: self.memory.map(Size::mib),
            disk_gib: self.disk.map(Size::gib_ceil),
            kernel: path(&self.kernel, "BULKHEAD_KERNEL")?,
            rootfs: path(&self.rootfs, "BULKHEAD_ROOTFS")?,
            serial: self.serial,
            network: self.net.clone(),
            proxy: ProxyEnvironment::read(|name| std::env::var(name).ok()),
            certificates: path(&None, "SSL_CERT_FILE")?,
            // One that is not text cannot be sent.
            ssh_agent: path(&None, "SSH_AUTH_SOCK")?.filter(|path| path.to_str().is_some()),
            working_directory: None,
            no_shares: false,
        })
    }
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let options = arguments.machine.options()?;
    ensure_backend(paths, &options, Mode::Detached).await?;
    let client = Client::connect(paths).await?.ok_or_else(|| gone(paths))?;
    // Subscribed before the request, so that no stage is missed.
    let mut events = client.events().await?;
    let answer = client.start(&options).await?;
    warn_of_policy(paths, &client).await;
    match answer.outcome {
        Outcome::Begun => {}
        // A VM exists, perhaps still starting. What it is made of cannot be changed any more.
        Outcome::Already => {
            let status = client.status().await?;
            if arguments.machine != Machine::default() {
                colour::warn(format_args!(
                    "the VM already exists, so the options have no effect; run `{}` first",
                    command(paths, "stop")
                ));
            }
            if status.state == StateName::Running {
                return print("the engine is already running");
            }
            print("the engine is already starting")?;
        }
        Outcome::Ending => return Err(gone(paths)),
    }
    if arguments.detach {
        return print(&format!("the engine is starting; `{}` shows its progress", command(paths, "status")));
    }
    follow::until_ready(paths, &mut events, answer.boot, follow::limit(arguments.timeout), Output::Stdout).await?;
    // Complete only now: some of it, such as a docker context that could not be made, is found on the way.
    let status = client.status().await?;
    if let Some(warning) = status.warning {
        colour::warn(warning);
    }
    note_unisolated(paths, &client).await;
    print(&match status.context {
        Some(context) => {
            format!("the engine is ready; docker context `{context}`, DOCKER_HOST={}", paths.docker_host())
        }
        None => format!("the engine is ready; DOCKER_HOST={}", paths.docker_host()),
    })
}

/// Warns of a policy that cannot be used, or that has changed since the backend started.
pub(super) async fn warn_of_policy(paths: &Paths, client: &Client<'_>) {
    // A backend that is ending may not respond any more; the caller finds out by itself.
    let Ok(Status { policy, .. }) = client.status().await else { return };
    let running = policy.as_ref();
    for line in running.and_then(PolicyFacts::warning).into_iter().chain(policy_change(paths, running)) {
        colour::warn(line);
    }
}

/// Notes containers that were created while isolation was off, if it is on now.
pub(super) async fn note_unisolated(paths: &Paths, client: &Client<'_>) {
    let isolated = client.status().await.ok().and_then(|status| status.vm);
    if isolated.is_some_and(|vm| vm.enhanced_container_isolation)
        && let Some(line) = unisolated::note(paths, client).await
    {
        eprintln!("note: {line}");
    }
}

/// The warning that the policy has changed since the backend started, if it has.
pub(super) fn policy_change(paths: &Paths, running: Option<&PolicyFacts>) -> Option<String> {
    // Compared by path and digest, so also a file that appeared, is gone or cannot be used counts as a change.
    let policy = Policy::system();
    let now = policy.facts();
    let file = now.or(running).filter(|_| now != running)?.file.display();
    Some(format!(
        "the policy {file} has changed since the backend started; the change takes effect after `{}` and `{}`, not after a \
         restart",
        command(paths, "stop"),
        command(paths, "start")
    ))
}

fn gone(paths: &Paths) -> CliError {
    CliError::Failed(format!("another command is stopping the engine; run `{}` again", command(paths, "start")))
}

/// Starts a backend unless one is listening that is not about to end. Returns the lifeline of a new temporary one.
pub(super) async fn ensure_backend(
    paths: &Paths,
    options: &StartOptions,
    mode: Mode,
) -> Result<Option<ChildStdin>, CliError> {
    if is_there(paths).await? {
        return Ok(None);
    }
    // Errors that can be found without a VM are reported before a process is started or a directory created. The
    // backend plans again, from the files as they are then.
    Plan::new(paths, options, &Policy::system())?;
    paths.create()?;
    let mine = paths.clone();
    // Of two commands at once, the second waits here and then finds the backend of the first.
    let turn = blocking(move || launch::lock_start(&mine)).await??;
    if is_there(paths).await? {
        return Ok(None);
    }
    // `launch` returns when the backend is listening; until then others wait for their turn.
    let lifeline = launch::launch(paths, mode).await?;
    drop(turn);
    Ok(lifeline)
}

/// Returns whether a backend is listening. Waits for one that is ending to exit.
async fn is_there(paths: &Paths) -> Result<bool, CliError> {
    if let Some(client) = Client::connect(paths).await? {
        match client.status().await {
            Ok(status) if !status.ending => return Ok(true),
            // It is ending, or exited in the middle of the request.
            Ok(_) | Err(ClientError::Io(_) | ClientError::Http(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if lock::holder(paths).is_some() {
        until_gone(paths, EXIT_TIMEOUT).await?;
    }
    Ok(false)
}

/// Waits until no backend holds the profile.
pub(super) async fn until_gone(paths: &Paths, limit: Duration) -> Result<(), CliError> {
    let mine = paths.clone();
    match timeout(limit, blocking(move || lock::wait_until_free(&mine))).await {
        Ok(done) => done,
        Err(_) => Err(match lock::holder(paths) {
            Some(pid) => ClientError::Unresponsive(pid).into(),
            // It exited at the last moment.
            None => return Ok(()),
        }),
    }
}

/// Runs blocking work in a thread. The runtime has one thread of its own, which must not stop.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, CliError> {
    spawn_blocking(work).await.map_err(|error| CliError::Failed(error.to_string()))
}
