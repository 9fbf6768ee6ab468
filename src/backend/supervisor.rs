//! Feeds the state machine and carries out its actions.
//!
//! One task owns the VM. Requests of the control API, signals, events of the VM and the deadline of a shutdown become
//! inputs of [`super::state`]; the actions that follow are carried out here, and the resulting status is published to
//! the API and, as the channel for docker clients, to [`super::docker`].
//!
//! A shutdown goes like this. `stop` leads to a `shutdown` message to the agent with the containers' grace: 10 s, or
//! two thirds of `--timeout`. init stops dockerd, which stops the containers; kills what is left when the grace is
//! over; unmounts the data disk and powers off through ACPI. A VM that is not down after the timeout (60 s) is killed.
//! `stop --force`, or a second signal to the backend, kills it at once.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bulkhead_protocol::Stage;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};
use tracing::{error, info};

use super::{
    api::{
        Answer, Examination, Ports, PortsAnswer, PortsOutcome, PublishedPort, SharesOutcome, StageTime, StartOptions,
        StateName, Status, StopOptions, VmFacts,
    },
    events::VmEvent,
    log_file::LogFile,
    logs,
    state::{Action, Input, Machine, State, Then},
    vm::{self, Vm},
    vmm::VmmChannel,
};
use crate::settings::{Paths, Policy};
use bulkhead_ipc::report::chain;

/// Time from the request to shut down until the VM is killed, unless a request says otherwise.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// Longest such time that can be asked for.
const MAX_STOP_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Time for containers between SIGTERM and SIGKILL, unless a request says otherwise.
const CONTAINER_GRACE: Duration = Duration::from_secs(10);

/// A request to the supervisor, with the place of its answer.
#[derive(Debug)]
pub(super) enum Request {
    /// Start the engine.
    Start(Box<StartOptions>, oneshot::Sender<Answer>),
    /// Stop the engine and exit the backend.
    Stop(StopOptions, oneshot::Sender<Answer>),
    /// Shut the VM down and boot a new one.
    Restart(StopOptions, oneshot::Sender<Answer>),
    /// Handle a signal: the first stops in order, the second kills.
    Signal,
    /// List the published ports.
    Ports(oneshot::Sender<Ports>),
    /// Examine the running VM.
    Examine(oneshot::Sender<Examination>),
    /// Share the directories of the settings; an error is the reason that they are not.
    Share(oneshot::Sender<Result<SharesOutcome, String>>),
    /// Publish the VM's own ports of the settings; an error is the reason that none is.
    PublishVmPorts(oneshot::Sender<Result<PortsAnswer, String>>),
}

/// Owner of the VM of one profile.
#[derive(Debug)]
pub(super) struct Supervisor {
    paths: Paths,
    /// The policy that was read when the backend started; it holds for every VM until the backend exits.
    policy: Policy,
    log: LogFile,
    context: Option<String>,
    warning: Option<String>,
    /// The warnings of the present VM.
    vm_warning: Option<String>,
    /// The reason that writes of the guest wait.
    no_room: Option<String>,
    /// The options of the present VM, and of one that a restart or a reset boots.
    options: StartOptions,
    machine: Machine,
    vm: Option<Vm>,
    boot_started: Instant,
    facts: Option<VmFacts>,
    /// The console's last lines of the VM that ended last.
    console: Vec<String>,
    timeout: Duration,
    grace: Duration,
    /// Time at which a VM that is shutting down is killed.
    deadline: Option<Instant>,
    signals: u32,
    status: watch::Sender<Status>,
    docker_channel: watch::Sender<Option<Arc<VmmChannel>>>,
}

impl Supervisor {
    /// Creates a supervisor without a VM. `policy` holds for all its VMs, whose processes write to `log`; `context` is
    /// the name of the profile's docker context if it has one, or the warning that it could not be made.
    pub(super) fn new(paths: Paths, policy: Policy, log: LogFile, context: Result<Option<String>, String>) -> Self {
        let (context, warning) = match context {
            Ok(context) => (context, None),
            Err(warning) => (None, Some(warning)),
        };
        let mut status = Status::stopped(&paths);
        status.backend_pid = Some(std::process::id());
        status.context.clone_from(&context);
        status.warning.clone_from(&warning);
        status.policy = policy.facts().cloned();
        Self {
            paths,
            policy,
            log,
            context,
            warning,
            vm_warning: None,
            no_room: None,
            options: StartOptions::default(),
            machine: Machine::default(),
            vm: None,
            boot_started: Instant::now(),
            facts: None,
            console: Vec::new(),
            timeout: STOP_TIMEOUT,
            grace: CONTAINER_GRACE,
            deadline: None,
            signals: 0,
            status: watch::Sender::new(status),
            docker_channel: watch::Sender::new(None),
        }
    }

    /// The status and each change of it.
    pub(super) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// The channel to the vmm while the engine answers: the way of docker clients into the guest.
    pub(super) fn docker_channel(&self) -> watch::Receiver<Option<Arc<VmmChannel>>> {
        self.docker_channel.subscribe()
    }

    /// Serves requests until the backend has to exit; no VM is left then.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            let deadline = self.deadline;
            let (input, reply) = tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => match self.request(request) {
                        Some(input) => input,
                        None => continue,
                    },
                    // Every sender is gone: nothing could ever stop this VM.
                    None => (Input::Stop { force: false }, None),
                },
                event = next(&mut self.vm) => {
                    let Some(input) = self.event(event) else {
                        // The state is the same, but a warning may be new.
                        self.publish();
                        continue;
                    };
                    (input, None)
                }
                () = at(deadline) => {
                    self.deadline = None;
                    (Input::GraceExpired, None)
                }
            };
            if self.step(input, reply).await {
                break;
            }
        }
        self.publish();
    }

    /// Applies one input and carries out the actions that follow; returns true when the backend has to exit.
    async fn step(&mut self, input: Input, reply: Option<oneshot::Sender<Answer>>) -> bool {
        let (outcome, mut action) = self.machine.apply(input);
        // The answer comes before the action: it says that the request is accepted. The client then follows the status,
        // from the boot that the answer names.
        if let Some(reply) = reply {
            let _ = reply.send(Answer { outcome, boot: self.machine.awaited_boot() });
        }
        while let Some(next) = action.take() {
            match next {
                Action::Exit => return true,
                Action::Boot => {
                    // `starting` becomes visible now: the checks and the image take a moment.
                    self.publish();
                    if let Err(problem) = self.boot().await {
                        action = self.machine.apply(Input::BootFailed(problem)).1;
                    }
                }
                Action::Shutdown => {
                    self.deadline = Some(Instant::now() + self.timeout);
                    if let Some(vm) = &self.vm {
                        vm.shut_down(u64::try_from(self.grace.as_millis()).unwrap_or(u64::MAX));
                    }
                }
                // The VM's end arrives as an event, for a kill as for a shutdown.
                Action::Kill => {
                    if let Some(vm) = &self.vm {
                        vm.kill();
                    }
                }
            }
        }
        self.publish();
        false
    }

    async fn boot(&mut self) -> Result<(), String> {
        self.boot_started = Instant::now();
        self.console.clear();
        self.vm_warning = None;
        self.facts = None;
        // Settings and image are read at each boot, so a restart is enough to apply a change.
        let vm = Vm::boot(&self.paths, &self.options, &self.policy, &self.log).await.map_err(|problem| {
            let problem = chain(&problem);
            error!("{problem}");
            problem
        })?;
        self.vm_warning.clone_from(&vm.plan.warning);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.facts = Some(VmFacts {
            cpus: vm.plan.cpus,
            memory_mib: vm.plan.memory_mib,
            disk_gib: vm.plan.disk.gib(),
            enhanced_container_isolation: vm.plan.configuration.isolation,
            // The guest reports it with its Hello.
            kernel: None,
            started_unix: now.as_secs(),
        });
        self.vm = Some(vm);
        Ok(())
    }

    /// Converts a request into an input; returns `None` for one that needs no input, once it is answered.
    fn request(&mut self, request: Request) -> Option<(Input, Option<oneshot::Sender<Answer>>)> {
        Some(match request {
            Request::Start(options, reply) => {
                // A VM that runs keeps the options it was made with, and they stay those of its restart.
                if matches!(self.machine.state(), State::Stopped | State::Failed(_)) {
                    self.options = *options;
                }
                (Input::Start, Some(reply))
            }
            Request::Stop(options, reply) => {
                let force = options.force;
                self.set_timeout(&options);
                (Input::Stop { force }, Some(reply))
            }
            Request::Restart(options, reply) => {
                self.set_timeout(&options);
                (Input::Restart, Some(reply))
            }
            Request::Signal => {
                // systemd sends one SIGTERM and waits; an impatient user presses Ctrl-C twice.
                self.signals += 1;
                info!(signals = self.signals, "received a signal to stop");
                self.set_timeout(&StopOptions::default());
                (Input::Stop { force: self.signals > 1 }, None)
            }
            Request::Ports(reply) => {
                let ports = self.vm.as_ref().map_or_else(Vec::new, Vm::ports);
                let ports = ports.into_iter().map(|one| PublishedPort::new(one.port, one.of_vm)).collect();
                let _ = reply.send(Ports { ports });
                return None;
            }
            Request::PublishVmPorts(reply) => {
                self.publish_vm_ports(reply);
                return None;
            }
            Request::Share(reply) => {
                self.share(reply);
                return None;
            }
            Request::Examine(reply) => {
                // In a task of its own: an examination takes seconds, and a guest that hangs must not keep a `stop`
                // waiting. Without a VM the reply is dropped, which the API reports.
                if let Some(vm) = &self.vm {
                    let examination = vm.examine();
                    tokio::spawn(async move {
                        let _ = reply.send(examination.await);
                    });
                }
                return None;
            }
        })
    }

    fn share(&self, reply: oneshot::Sender<Result<SharesOutcome, String>>) {
        let Some(vm) = &self.vm else {
            let _ = reply.send(Ok(SharesOutcome::NotRunning));
            return;
        };
        // A guest that starts has its configuration, or will not be asked before it has.
        let change = vm.share(&self.paths, &self.options, &self.policy);
        let Some(change) = change.filter(|_| self.machine.name() == StateName::Running) else {
            let _ = reply.send(Ok(SharesOutcome::NextStart));
            return;
        };
        // In a task of its own, since it waits for the guest.
        tokio::spawn(async move {
            let changed = change.await.map(|()| SharesOutcome::Changed);
            let _ = reply.send(changed.map_err(|error| chain(&error)));
        });
    }

    fn publish_vm_ports(&self, reply: oneshot::Sender<Result<PortsAnswer, String>>) {
        let Some(vm) = &self.vm else {
            let _ = reply.send(Ok(PortsOutcome::NotRunning.into()));
            return;
        };
        let published = vm.publish_own_ports(&self.paths, &self.policy);
        // In a task of its own, since it may wait for a port that is just being released.
        tokio::spawn(async move {
            let _ = reply.send(published.await.map_err(|error| chain(&error)));
        });
    }

    /// Sets the time for a shutdown. Containers get two thirds of it; the rest is for the daemons, the file system and
    /// the power-off.
    fn set_timeout(&mut self, options: &StopOptions) {
        let timeout = options.timeout_seconds.map(|seconds| Duration::from_secs(seconds).min(MAX_STOP_TIMEOUT));
        self.timeout = timeout.unwrap_or(STOP_TIMEOUT);
        self.grace = timeout.map_or(CONTAINER_GRACE, |timeout| timeout * 2 / 3);
        // The shutdown is under way: a second `stop --timeout` moves its end, in either direction.
        if self.deadline.is_some() {
            self.deadline = Some(Instant::now() + self.timeout);
        }
    }

    /// Converts an event into an input; returns `None` for one that leaves the state as it is.
    fn event(&mut self, event: VmEvent) -> Option<Input> {
        let input = match event {
            VmEvent::AgentConnected { kernel, uptime_us } => {
                info!(kernel, uptime_us, "the agent is connected");
                if let Some(facts) = &mut self.facts {
                    facts.kernel = Some(kernel);
                }
                // Two inputs: a guest whose init runs has reached its first stage as well.
                self.machine.apply(Input::AgentConnected);
                self.reached(Stage::Kernel)
            }
            VmEvent::AgentLost => Input::AgentLost,
            VmEvent::Reached(stage) => self.reached(stage),
            VmEvent::GuestFailed(reason) => {
                error!("the guest reported a failure: {reason}");
                // The shutdown that follows is not a user's, so the times of an earlier request do not hold for it.
                self.set_timeout(&StopOptions::default());
                Input::GuestFailed(reason)
            }
            VmEvent::Described(description) => {
                if let Some(vm) = &self.vm {
                    vm.described(&description);
                }
                return None;
            }
            VmEvent::SharesTaken(error) => {
                if let Some(vm) = &self.vm {
                    vm.shares_taken(error);
                }
                return None;
            }
            VmEvent::DeviceDown(warning) => {
                error!("{warning}");
                // Containers go on without the device, so the VM stays.
                let warning = format!("{warning}; `bulkhead restart` brings it back");
                let others = self.vm_warning.take().into_iter();
                self.vm_warning = others.chain([warning]).reduce(|all, one| format!("{all}; {one}"));
                return None;
            }
            VmEvent::NoRoom(waits) => {
                self.no_room = waits.then(|| no_room(&self.paths.data_disk()));
                if let Some(reason) = &self.no_room {
                    error!("{reason}");
                } else {
                    info!("the data disk has free space again");
                }
                return None;
            }
            VmEvent::EngineDown(reason) => {
                error!("the engine went down: {reason}");
                Input::EngineDown(reason)
            }
            VmEvent::Ended(end) => {
                self.vm = None;
                self.no_room = None;
                self.deadline = None;
                vm::remove_sockets(&self.paths);
                // Read now: the next boot, which may follow from this very input, rotates the log.
                self.console = logs::tail(&self.paths.console_log(), logs::CONSOLE_LINES).unwrap_or_default();
                Input::Ended(end)
            }
        };
        Some(input)
    }

    fn reached(&self, stage: Stage) -> Input {
        let ms = u64::try_from(self.boot_started.elapsed().as_millis()).unwrap_or(u64::MAX);
        info!(%stage, ms, "reached a stage");
        Input::Reached(StageTime { stage, ms })
    }

    /// Publishes the status, and the channel for docker clients, to their readers.
    fn publish(&self) {
        let status = self.snapshot();
        // Docker clients are let through while the engine answers; before that they get an error and no silence.
        let channel = self.vm.as_ref().filter(|_| status.state == StateName::Running).map(Vm::channel);
        self.docker_channel.send_if_modified(|current| {
            // `starting` lies between two VMs, so a channel never replaces another one directly.
            let changed = current.is_some() != channel.is_some();
            *current = channel;
            changed
        });
        // Readers wait for changes: an event without one must not wake them.
        self.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    /// Assembles the status from the machine's state and the facts about the VM.
    fn snapshot(&self) -> Status {
        // From a blank one each time, so that no state shows what belongs to another.
        let mut status = Status::stopped(&self.paths);
        status.state = self.machine.name();
        status.boot = self.machine.boots();
        status.context.clone_from(&self.context);
        status.policy = self.policy.facts().cloned();
        let warnings = [self.warning.as_deref(), self.vm_warning.as_deref()];
        status.warning =
            warnings.into_iter().flatten().map(ToOwned::to_owned).reduce(|all, one| format!("{all}; {one}"));
        status.backend_pid = Some(std::process::id());
        status.vmm_pid = self.vm.as_ref().map(|vm| vm.pid);
        // A VM that ended takes its facts with it.
        status.vm = self.vm.as_ref().and(self.facts.clone());
        match self.machine.state() {
            State::Stopped => {}
            State::Starting(progress) => {
                status.stages.clone_from(&progress.stages);
                status.reason = self.no_room.clone().or_else(|| progress.note.clone());
                status.waiting_for = Some(progress.waiting_for());
            }
            State::Running(progress) => {
                status.stages.clone_from(&progress.stages);
                status.reason.clone_from(&self.no_room);
            }
            State::Stopping(then) => status.ending = *then == Then::Exit,
            // The console explains a failure; in any other state it would be about an older VM.
            State::Failed(reason) => {
                status.reason = Some(reason.clone());
                status.console.clone_from(&self.console);
            }
        }
        status
    }
}

/// The reason that the guest's writes wait, for the user.
fn no_room(disk: &Path) -> String {
    let place = disk.parent().unwrap_or(disk);
    format!("paused: the file system of {} is full; free some space, and the engine continues", place.display())
}

/// Waits for the next event; without a VM forever.
async fn next(vm: &mut Option<Vm>) -> VmEvent {
    match vm {
        Some(vm) => vm.next().await,
        None => std::future::pending().await,
    }
}

/// Waits for the deadline; without one forever.
async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
