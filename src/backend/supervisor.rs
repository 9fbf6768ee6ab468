//! Feeds the state machine and does what it says.

use std::{
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
    api::{Answer, Examination, Ports, StageTime, StartOptions, StateName, Status, StopOptions, VmFacts},
    events::VmEvent,
    logs,
    state::{Action, Input, Machine, State, Then},
    vm::{self, Vm},
    vmm::VmmChannel,
};
use crate::settings::{Paths, Policy};
use bulkhead_ipc::report::chain;

/// Seconds after which a VM that was asked to shut down is killed, when nobody says otherwise.
const STOP_SECONDS: u64 = 60;

/// Longest time that can be asked for.
const MAX_STOP_SECONDS: u64 = 24 * 3600;

/// What containers get between SIGTERM and SIGKILL, when nobody says otherwise.
const GRACE: Duration = Duration::from_secs(10);

/// What is asked of the supervisor.
#[derive(Debug)]
pub(super) enum Request {
    /// Start the engine.
    Start(StartOptions, oneshot::Sender<Answer>),
    /// Stop it and end the backend.
    Stop(StopOptions, oneshot::Sender<Answer>),
    /// Boot afresh.
    Restart(StopOptions, oneshot::Sender<Answer>),
    /// A signal arrived: the first stops in order, the second kills.
    Signal,
    /// Which ports are published.
    Ports(oneshot::Sender<Ports>),
    /// What the VM does at the moment.
    Examine(oneshot::Sender<Examination>),
}

/// Owns the VM of one profile.
#[derive(Debug)]
pub(super) struct Supervisor {
    paths: Paths,
    policy: Policy,
    context: Option<String>,
    warning: Option<String>,
    network_warning: Option<String>,
    options: StartOptions,
    machine: Machine,
    vm: Option<Vm>,
    begun: Instant,
    facts: Option<VmFacts>,
    console: Vec<String>,
    timeout: Duration,
    grace: Duration,
    deadline: Option<Instant>,
    signals: u32,
    status: watch::Sender<Status>,
    link: watch::Sender<Option<Arc<VmmChannel>>>,
}

impl Supervisor {
    /// A supervisor without a VM; `policy` holds for all that it will have, and `context` is the docker context that
    /// exists for the profile, or why there is none.
    pub(super) fn new(paths: Paths, policy: Policy, context: Result<Option<String>, String>) -> Self {
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
            context,
            warning,
            network_warning: None,
            options: StartOptions::default(),
            machine: Machine::default(),
            vm: None,
            begun: Instant::now(),
            facts: None,
            console: Vec::new(),
            timeout: Duration::from_secs(STOP_SECONDS),
            grace: GRACE,
            deadline: None,
            signals: 0,
            status: watch::Sender::new(status),
            link: watch::Sender::new(None),
        }
    }

    /// The status and each change of it.
    pub(super) fn status(&self) -> watch::Receiver<Status> {
        self.status.subscribe()
    }

    /// The channel to the VM while its engine answers.
    pub(super) fn link(&self) -> watch::Receiver<Option<Arc<VmmChannel>>> {
        self.link.subscribe()
    }

    /// Serves requests until the backend shall end; no VM is left then.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            let deadline = self.deadline;
            let input = tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => match self.request(request) {
                        Some(input) => input,
                        None => continue,
                    },
                    None => (Input::Stop { force: false }, None),
                },
                event = next(&mut self.vm) => {
                    let Some(input) = self.event(event) else {
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
            if self.step(input.0, input.1).await {
                break;
            }
        }
        self.publish();
    }

    /// Applies one input and what follows from it; true when the backend shall end.
    async fn step(&mut self, input: Input, reply: Option<oneshot::Sender<Answer>>) -> bool {
        let (outcome, mut action) = self.machine.apply(input);
        if let Some(reply) = reply {
            let _ = reply.send(Answer { outcome, boot: self.machine.awaited_boot() });
        }
        while let Some(next) = action.take() {
            match next {
                Action::Exit => return true,
                Action::Boot => {
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
        self.begun = Instant::now();
        self.console.clear();
        self.network_warning = None;
        self.facts = None;
        let vm = Vm::boot(&self.paths, &self.options, &self.policy).await.map_err(|problem| {
            let problem = chain(&problem);
            error!("{problem}");
            problem
        })?;
        // A network that goes down later says more.
        self.network_warning.clone_from(&vm.plan.warning);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.facts = Some(VmFacts {
            cpus: vm.plan.cpus,
            memory_mib: vm.plan.memory_mib,
            disk_gib: vm.plan.disk.gib(),
            enhanced_container_isolation: vm.plan.configuration.isolation,
            kernel: None,
            started_unix: now.as_secs(),
        });
        self.vm = Some(vm);
        Ok(())
    }

    /// What a request is to the state machine; `None` when it is answered already.
    fn request(&mut self, request: Request) -> Option<(Input, Option<oneshot::Sender<Answer>>)> {
        Some(match request {
            Request::Start(options, reply) => {
                // The options of a VM that runs stay those it was made with.
                if matches!(self.machine.state(), State::Stopped | State::Failed(_)) {
                    self.options = options;
                }
                (Input::Start, Some(reply))
            }
            Request::Stop(options, reply) => {
                let force = options.force;
                self.take_time(&options);
                (Input::Stop { force }, Some(reply))
            }
            Request::Restart(options, reply) => {
                self.take_time(&options);
                (Input::Restart, Some(reply))
            }
            Request::Signal => {
                self.signals += 1;
                info!(signals = self.signals, "asked to end by a signal");
                self.take_time(&StopOptions::default());
                (Input::Stop { force: self.signals > 1 }, None)
            }
            Request::Ports(reply) => {
                let ports = self.vm.as_ref().map_or_else(Vec::new, Vm::ports);
                let _ = reply.send(Ports { ports: ports.into_iter().map(Into::into).collect() });
                return None;
            }
            Request::Examine(reply) => {
                // Without a VM nobody is asked, and the reply ends here.
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

    /// Containers get two thirds of the time; the rest is for the daemons, the file system and the power-off.
    fn take_time(&mut self, options: &StopOptions) {
        let timeout = options.timeout_seconds.map(|seconds| Duration::from_secs(seconds.min(MAX_STOP_SECONDS)));
        self.timeout = timeout.unwrap_or(Duration::from_secs(STOP_SECONDS));
        self.grace = timeout.map_or(GRACE, |timeout| timeout * 2 / 3);
        if self.deadline.is_some() {
            self.deadline = Some(Instant::now() + self.timeout);
        }
    }

    /// What an event is to the state machine; `None` when the engine goes on regardless.
    fn event(&mut self, event: VmEvent) -> Option<Input> {
        let input = match event {
            VmEvent::AgentConnected { kernel, uptime_us } => {
                info!(kernel, uptime_us, "the agent is connected");
                if let Some(facts) = &mut self.facts {
                    facts.kernel = Some(kernel);
                }
                self.machine.apply(Input::AgentConnected);
                self.reached(Stage::Kernel)
            }
            VmEvent::AgentLost => Input::AgentLost,
            VmEvent::Reached(stage) => self.reached(stage),
            VmEvent::GuestFailed(reason) => {
                error!("the guest gave up: {reason}");
                self.take_time(&StopOptions::default());
                Input::GuestFailed(reason)
            }
            VmEvent::Described(description) => {
                if let Some(vm) = &self.vm {
                    vm.described(&description);
                }
                return None;
            }
            VmEvent::NetworkDown(warning) => {
                error!("{warning}");
                self.network_warning = Some(format!("{warning}; `restart` brings it back"));
                return None;
            }
            VmEvent::EngineDown(reason) => {
                error!("the engine went down: {reason}");
                Input::EngineDown(reason)
            }
            VmEvent::Ended(end) => {
                self.vm = None;
                self.deadline = None;
                vm::remove_sockets(&self.paths);
                self.console = logs::tail(&self.paths.console_log(), logs::CONSOLE_LINES).unwrap_or_default();
                Input::Ended(end)
            }
        };
        Some(input)
    }

    fn reached(&self, stage: Stage) -> Input {
        let ms = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        info!(%stage, ms, "reached a stage");
        Input::Reached(StageTime { stage, ms })
    }

    fn publish(&self) {
        let status = self.snapshot();
        let link = self.vm.as_ref().filter(|_| status.state == StateName::Running).map(Vm::channel);
        self.link.send_if_modified(|current| {
            let changed = current.is_some() != link.is_some();
            *current = link;
            changed
        });
        self.status.send_if_modified(|current| {
            let changed = *current != status;
            *current = status;
            changed
        });
    }

    fn snapshot(&self) -> Status {
        let mut status = Status::stopped(&self.paths);
        status.state = self.machine.name();
        status.boot = self.machine.boots();
        status.context.clone_from(&self.context);
        status.policy = self.policy.facts().cloned();
        let warnings = [self.warning.as_deref(), self.network_warning.as_deref()];
        status.warning =
            warnings.into_iter().flatten().map(ToOwned::to_owned).reduce(|all, one| format!("{all}; {one}"));
        status.backend_pid = Some(std::process::id());
        status.vmm_pid = self.vm.as_ref().map(|vm| vm.pid);
        status.vm = self.vm.as_ref().and(self.facts.clone());
        match self.machine.state() {
            State::Stopped => {}
            State::Starting(progress) => {
                status.stages.clone_from(&progress.stages);
                status.reason.clone_from(&progress.note);
                status.waiting_for = Some(progress.waiting_for());
            }
            State::Running(progress) => status.stages.clone_from(&progress.stages),
            State::Stopping(then) => status.ending = *then == Then::Exit,
            State::Failed(reason) => {
                status.reason = Some(reason.clone());
                status.console.clone_from(&self.console);
            }
        }
        status
    }
}

async fn next(vm: &mut Option<Vm>) -> VmEvent {
    match vm {
        Some(vm) => vm.next().await,
        None => std::future::pending().await,
    }
}

async fn at(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
