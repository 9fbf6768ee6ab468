//! `bulkhead start`.

use std::{path::PathBuf, time::Duration};

use tokio::{process::ChildStdin, task::spawn_blocking, time::timeout};

use super::{
    CliError,
    client::{Client, ClientError},
    command,
    follow::{self, Output},
    older, print,
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

/// Time for an ending backend to be gone.
const GONE: Duration = Duration::from_secs(120);

/// Start the engine and wait until it answers.
///
/// Shows each stage (kernel, agent, disk, engine) with the time since the start. What is left out follows the settings,
/// see `bulkhead settings list`. The docker context `bulkhead` (`bulkhead-NAME` for another profile) is made; the
/// current context is not changed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead start
  bulkhead start --cpus 4 --memory 8G --disk 100G
  bulkhead start --detach && bulkhead status")]
pub(super) struct Arguments {
    /// Fail when the engine does not answer within this many seconds; 0 waits for ever.
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    pub(super) timeout: u64,
    /// Return as soon as the VM is being started.
    #[arg(long)]
    pub(super) detach: bool,
    #[command(flatten)]
    pub(super) machine: Machine,
}

/// What the VM is made of.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args)]
pub(super) struct Machine {
    /// Virtual CPUs [default: half of the host's].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: Option<u8>,
    /// Guest memory, such as 8G [default: a quarter of the host's].
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,
    /// Largest size of the data disk, such as 100G; it takes only the room that is used [default: 64G].
    #[arg(long, value_name = "SIZE")]
    disk: Option<Size>,
    /// What the VM is connected to: the host's network through a process of this user, nothing, the host's passt, or an
    /// existing tap device [default: user].
    #[arg(long, value_name = "user|none|passt|tap=NAME")]
    net: Option<NetworkKind>,
    /// Another guest kernel (advanced); not where a policy locks isolation on.
    #[arg(long, value_name = "PATH", requires = "rootfs", hide_short_help = true)]
    kernel: Option<PathBuf>,
    /// Another root file system, EROFS (advanced); not where a policy locks isolation on.
    #[arg(long, value_name = "PATH", requires = "kernel", hide_short_help = true)]
    rootfs: Option<PathBuf>,
    /// Give the VM a serial port and log everything its kernel says there, from the first line on, in serial.log
    /// beside console.log; slow (advanced).
    #[arg(long, hide_short_help = true)]
    serial: bool,
}

impl Machine {
    /// The same for a backend, which has another folder and perhaps another environment.
    pub(super) fn options(&self) -> Result<StartOptions, CliError> {
        let path = |named: &Option<PathBuf>, variable: &str| {
            named
                .clone()
                .or_else(|| std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from))
                .map(std::path::absolute)
                .transpose()
                .map_err(CliError::io("cannot find the working folder"))
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
        })
    }
}

pub(super) async fn run(paths: &Paths, arguments: Arguments) -> Result<(), CliError> {
    let options = arguments.machine.options()?;
    ensure_backend(paths, &options, Mode::Detached).await?;
    let client = Client::connect(paths).await?.ok_or_else(|| gone(paths))?;
    let mut events = client.events().await?;
    let answer = client.start(&options).await?;
    tell_policy(paths, &client).await;
    match answer.outcome {
        Outcome::Begun => {}
        Outcome::Already => {
            let status = client.status().await?;
            if arguments.machine != Machine::default() {
                eprintln!(
                    "warning: the VM exists already, options do not change it; run `{}` first",
                    command(paths, "stop")
                );
            }
            if status.state == StateName::Running {
                return print("the engine is already running");
            }
            print("the engine is already being started")?;
        }
        Outcome::Ending => return Err(gone(paths)),
    }
    if arguments.detach {
        return print(&format!("the engine is being started; `{}` shows how far it is", command(paths, "status")));
    }
    follow::until_ready(paths, &mut events, answer.boot, follow::limit(arguments.timeout), Output::Stdout).await?;
    let status = client.status().await?;
    if let Some(warning) = status.warning {
        eprintln!("warning: {warning}");
    }
    tell_older(paths, &client).await;
    print(&match status.context {
        Some(context) => {
            format!("the engine is ready; docker context `{context}`, DOCKER_HOST={}", paths.docker_host())
        }
        None => format!("the engine is ready; DOCKER_HOST={}", paths.docker_host()),
    })
}

/// Says what a person has to know of the policy that the backend has; one that is ending does not say it any more.
pub(super) async fn tell_policy(paths: &Paths, client: &Client<'_>) {
    let Ok(Status { policy, .. }) = client.status().await else { return };
    let running = policy.as_ref();
    for line in running.and_then(PolicyFacts::warning).into_iter().chain(changed(paths, running)) {
        eprintln!("warning: {line}");
    }
}

/// Names the containers that were made while isolation was off, when it is on.
pub(super) async fn tell_older(paths: &Paths, client: &Client<'_>) {
    let isolated = client.status().await.ok().and_then(|status| status.vm);
    if isolated.is_some_and(|vm| vm.enhanced_container_isolation)
        && let Some(line) = older::of(paths, client).await
    {
        eprintln!("note: {line}");
    }
}

/// That the policy is not what the backend began with, if it is not.
pub(super) fn changed(paths: &Paths, running: Option<&PolicyFacts>) -> Option<String> {
    let policy = Policy::system();
    let now = policy.facts();
    let file = now.or(running).filter(|_| now != running)?.file.display();
    Some(format!(
        "the policy {file} changed since the backend began; it takes effect after `{}` and `{}`, not after a restart",
        command(paths, "stop"),
        command(paths, "start")
    ))
}

fn gone(paths: &Paths) -> CliError {
    CliError::Failed(format!("the engine is being stopped by somebody else; run `{}` again", command(paths, "start")))
}

/// Makes sure that a backend listens that is not about to end, starting one if need be.
pub(super) async fn ensure_backend(
    paths: &Paths,
    options: &StartOptions,
    mode: Mode,
) -> Result<Option<ChildStdin>, CliError> {
    if is_there(paths).await? {
        return Ok(None);
    }
    // What cannot work is said before anything is begun.
    Plan::new(paths, options, &Policy::system())?;
    paths.create()?;
    let mine = paths.clone();
    let turn = blocking(move || launch::lock_start(&mine)).await??;
    if is_there(paths).await? {
        return Ok(None);
    }
    let life_line = launch::launch(paths, mode).await?;
    drop(turn);
    Ok(life_line)
}

/// Whether a backend listens; waits for one that is ending to be gone.
async fn is_there(paths: &Paths) -> Result<bool, CliError> {
    if let Some(client) = Client::connect(paths).await? {
        match client.status().await {
            Ok(status) if !status.ending => return Ok(true),
            Ok(_) | Err(ClientError::Io(_) | ClientError::Http(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if lock::holder(paths).is_some() {
        until_gone(paths, GONE).await?;
    }
    Ok(false)
}

/// Waits until no backend holds the profile.
pub(super) async fn until_gone(paths: &Paths, limit: Duration) -> Result<(), CliError> {
    let mine = paths.clone();
    match timeout(limit, blocking(move || lock::wait_until_free(&mine))).await {
        Ok(done) => done,
        Err(_) => Err(match lock::holder(paths) {
            Some(pid) => ClientError::Deaf(pid).into(),
            None => return Ok(()),
        }),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, CliError> {
    spawn_blocking(work).await.map_err(|error| CliError::Failed(error.to_string()))
}
