//! The main loop: brings the engine up, keeps it up, and ends when the guest shall end.

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use bulkhead_protocol::{Configuration, GuestMessage, HostMessage, ShutdownMode, Stage};
use nix::{
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use crate::{
    agent::Agent,
    diagnostics, disk,
    error::{Error, chain},
    event::{Event, spawn},
    fd_store::{FdStore, Owner},
    log, oci_runtime,
    output::{OUTPUT_GRACE, Tail},
    ping,
    ports::{self, Ports},
    restart::{Backoff, Decision},
    services::{self, InheritedFds, Service},
    warden,
};

/// How the guest shall end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct End {
    /// Power off or reboot.
    pub(crate) mode: ShutdownMode,
    /// What containers get between SIGTERM and SIGKILL.
    pub(crate) grace: Duration,
}

impl End {
    /// The end when nobody said how.
    pub(crate) const ORDERLY: Self = Self { mode: ShutdownMode::PowerOff, grace: Duration::from_secs(10) };
}

/// Longest grace that is honoured; a host that wants longer can wait before it asks.
const MAX_GRACE: Duration = Duration::from_secs(600);

/// Delay between pings when one failed although every service says that it serves.
const PING_RETRY_INTERVAL: Duration = Duration::from_millis(500);
const MAX_PINGS: u32 = 20;

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Not started yet, or given up.
    Idle,
    Running {
        pid: i32,
        since: Instant,
        ready: bool,
    },
    Waiting {
        until: Instant,
    },
}

#[derive(Debug)]
struct Supervised {
    service: Service,
    state: State,
    backoff: Backoff,
    tail: Tail,
}

/// The engine and everything it needs.
#[derive(Debug)]
pub(crate) struct Engine {
    agent: Agent,
    configuration: Configuration,
    ports: Ports,
    store: FdStore,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    services: Vec<Supervised>,
    /// The warden's connections, with isolation.
    endpoints: Option<warden::Endpoints>,
    /// When the warden last said that it serves; `None` while none runs.
    warden_heard: Option<Instant>,
    /// The disk's tools run and are waited for by their own thread.
    disk_busy: bool,
    /// A description of the guest is being made.
    describing: bool,
    failed: bool,
    pinging: bool,
    failed_pings: u32,
    ping_at: Option<Instant>,
}

impl Engine {
    /// An engine that is not started.
    pub(crate) fn new(
        agent: Agent,
        configuration: Configuration,
        ports: Ports,
        store: FdStore,
        events: Sender<Event>,
        inbox: Receiver<Event>,
    ) -> Self {
        let wanted = Service::ALL.into_iter().filter(|one| configuration.isolation || *one != Service::Warden);
        let supervised =
            |service| Supervised { service, state: State::Idle, backoff: Backoff::default(), tail: Tail::default() };
        let services = wanted.map(supervised).collect();
        Self {
            agent,
            configuration,
            ports,
            store,
            events,
            inbox,
            services,
            endpoints: None,
            warden_heard: None,
            disk_busy: false,
            describing: false,
            failed: false,
            pinging: false,
            failed_pings: 0,
            ping_at: None,
        }
    }

    /// Starts everything, and returns when the guest shall end.
    pub(crate) fn run(&mut self) -> Result<End, Error> {
        self.disk_busy = true;
        let (events, serial) = (self.events.clone(), self.configuration.data_disk_serial.clone());
        spawn("disk", move || {
            let _ = events.send(Event::DiskPrepared(disk::prepare(&serial)));
        })?;
        let prepared = services::write_configuration(&self.configuration)
            .and_then(|()| if self.configuration.isolation { self.isolate() } else { Ok(()) });
        if let Err(error) = prepared {
            self.fail(Stage::Engine, chain(&error));
        }
        self.start(Service::Gate);
        if self.endpoints.is_some() {
            self.start(Service::Warden);
        }
        loop {
            let event = self.next_event();
            if let Some(event) = event
                && let Some(end) = self.handle(event)
            {
                return Ok(end);
            }
            self.start_what_is_due();
        }
    }

    fn isolate(&mut self) -> Result<(), Error> {
        oci_runtime::isolate()?;
        self.endpoints = Some(warden::connect()?);
        Ok(())
    }

    fn next_event(&self) -> Option<Event> {
        let waiting = self.services.iter().filter_map(|one| match one.state {
            State::Waiting { until } => Some(until),
            _ => None,
        });
        let silence = self.warden_heard.map(|heard| heard + warden::WATCHDOG_TIMEOUT);
        let received = match waiting.chain(self.ping_at).chain(silence).min() {
            Some(deadline) => self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => self.inbox.recv().map_err(RecvTimeoutError::from),
        };
        // `self.events` keeps the channel open, so the only error is the deadline.
        received.ok()
    }

    fn handle(&mut self, event: Event) -> Option<End> {
        match event {
            Event::Child => self.reap(),
            Event::Signal(signal) => {
                log::info(&format!("{signal} asks for the end"));
                return Some(End::ORDERLY);
            }
            Event::Host(HostMessage::Shutdown { mode, grace_ms }) => {
                return Some(End { mode, grace: Duration::from_millis(grace_ms).min(MAX_GRACE) });
            }
            Event::Host(HostMessage::Configure(_) | HostMessage::Certificates { .. }) => {
                log::info("ignored a second configuration");
            }
            Event::Host(HostMessage::Published { id, error }) => self.ports.answer(id, error),
            Event::Host(HostMessage::Describe) => self.describe(),
            Event::Described(description) => {
                self.describing = false;
                self.agent.send(&GuestMessage::Described(description));
            }
            Event::Publish { id, .. } if self.configuration.network.is_none() => {
                self.ports.answer(id, Some(ports::NO_NETWORK.to_owned()));
            }
            Event::Publish { id, port } => self.agent.send(&GuestMessage::Publish { id, port }),
            Event::Unpublish(id) => self.agent.send(&GuestMessage::Unpublish { id }),
            Event::HostDisconnected(reason) => {
                log::info(&format!("{reason}; powering off"));
                return Some(End::ORDERLY);
            }
            Event::DiskPrepared(result) => self.disk_done(result),
            Event::Ready(pid) => self.ready(pid),
            Event::Watchdog(pid) => {
                if self.pid_of(Service::Warden) == Some(pid) {
                    self.warden_heard = Some(Instant::now());
                }
            }
            Event::Pinged(result) => self.pinged(result),
        }
        None
    }

    /// One description at a time answers everybody who asks meanwhile.
    fn describe(&mut self) {
        if self.describing {
            return;
        }
        let events = self.events.clone();
        let begun = spawn("describe", move || {
            let _ = events.send(Event::Described(diagnostics::collect()));
        });
        match begun {
            Ok(()) => self.describing = true,
            Err(error) => log::info(&chain(&error)),
        }
    }

    fn fail(&mut self, stage: Stage, reason: String) {
        // The first failure is the cause; what follows from it would only hide it.
        if !self.failed {
            self.failed = true;
            self.agent.failed(stage, reason);
        }
    }

    fn disk_done(&mut self, result: Result<(), Error>) {
        self.disk_busy = false;
        if let Err(error) = result {
            self.fail(Stage::Disk, chain(&error));
            return;
        }
        self.agent.reached(Stage::Disk);
        if !self.failed {
            self.start(Service::Containerd);
            self.start(Service::Dockerd);
        }
        self.reap();
    }

    fn supervised(&mut self, service: Service) -> &mut Supervised {
        // They are in the order of their numbers, and what is not there is never asked for.
        &mut self.services[service as usize]
    }

    fn pid_of(&self, service: Service) -> Option<i32> {
        self.services.iter().find(|one| one.service == service).and_then(|one| match one.state {
            State::Running { pid, .. } => Some(pid),
            _ => None,
        })
    }

    /// Kills a warden that has been silent for too long; its end is an event like any other.
    fn kill_silent_warden(&mut self) {
        if self.warden_heard.is_some_and(|heard| heard.elapsed() >= warden::WATCHDOG_TIMEOUT) {
            self.warden_heard = None;
            if let Some(pid) = self.pid_of(Service::Warden) {
                log::info("the warden does not answer; it is killed");
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
    }

    fn start(&mut self, service: Service) {
        let tail = self.supervised(service).tail.clone();
        let inherited = InheritedFds { store: &self.store, endpoints: self.endpoints.as_ref() };
        match services::start(service, &self.configuration, &inherited, tail) {
            Ok(pid) => {
                let since = Instant::now();
                self.supervised(service).state = State::Running { pid, since, ready: false };
                if service == Service::Warden {
                    self.warden_heard = Some(since);
                }
            }
            Err(error) => {
                let reason = chain(&error);
                log::info(&reason);
                self.again(service, Duration::ZERO, false, &reason);
            }
        }
    }

    fn start_what_is_due(&mut self) {
        let now = Instant::now();
        let is_due = |one: &&Supervised| matches!(one.state, State::Waiting { until } if until <= now);
        let due: Vec<_> = self.services.iter().filter(is_due).map(|one| one.service).collect();
        for service in due {
            self.start(service);
        }
        self.kill_silent_warden();
        if self.ping_at.is_some_and(|at| at <= now) {
            self.ping_at = None;
            self.ping_when_all_serve();
        }
    }

    fn reap(&mut self) {
        if self.disk_busy {
            // Waiting for any child could take a disk tool's status from the thread that waits for it.
            for index in 0..self.services.len() {
                if let State::Running { pid, .. } = self.services[index].state
                    && let Ok(status) = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG))
                {
                    self.ended(status);
                }
            }
            return;
        }
        while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            if status == WaitStatus::StillAlive {
                return;
            }
            self.ended(status);
        }
    }

    fn ended(&mut self, status: WaitStatus) {
        let (pid, how) = match status {
            WaitStatus::Exited(pid, code) => (pid, format!("ended with status {code}")),
            WaitStatus::Signaled(pid, signal, _) => (pid, format!("was killed by {signal}")),
            _ => return,
        };
        let found = self.services.iter().find_map(|one| match one.state {
            State::Running { pid: running, since, ready } if running == pid.as_raw() => {
                Some((one.service, since.elapsed(), ready))
            }
            _ => None,
        });
        // Anything else was an orphan that PID 1 inherited.
        let Some((service, ran, ready)) = found else { return };
        let mut reason = format!("{} {how}", service.name());
        if !ready {
            // Its last words are on their way through the pipe; a failed start can wait for them.
            std::thread::sleep(OUTPUT_GRACE);
            if let Some(line) = self.supervised(service).tail.last() {
                reason = format!("{reason} ({line})");
            }
        }
        log::info(&reason);
        if service == Service::Warden {
            // The engine goes on meanwhile.
            self.warden_heard = None;
        } else {
            self.agent.send(&GuestMessage::EngineDown { reason: reason.clone() });
        }
        self.again(service, ran, ready, &reason);
    }

    fn again(&mut self, service: Service, ran: Duration, served: bool, reason: &str) {
        let one = self.supervised(service);
        match one.backoff.ended(ran, served) {
            Decision::RestartAfter(delay) => one.state = State::Waiting { until: Instant::now() + delay },
            Decision::GiveUp => {
                one.state = State::Idle;
                if service == Service::Warden {
                    self.endpoints = None;
                    self.store.release(Owner::Warden);
                    warden::abort();
                }
                self.fail(Stage::Engine, format!("{reason}, {} times in a row", crate::restart::MAX_BAD_STARTS));
            }
        }
    }

    fn ready(&mut self, pid: i32) {
        let mut known = false;
        for one in &mut self.services {
            if let State::Running { pid: running, ready, .. } = &mut one.state
                && *running == pid
            {
                *ready = true;
                known = true;
                if one.service == Service::Dockerd {
                    services::restrict_dockerd_socket();
                }
            }
        }
        if known {
            self.failed_pings = 0;
            self.ping_when_all_serve();
        }
    }

    fn all_serve(&self) -> bool {
        self.services.iter().all(|one| matches!(one.state, State::Running { ready: true, .. }))
    }

    fn ping_when_all_serve(&mut self) {
        if self.pinging || !self.all_serve() {
            return;
        }
        match ping::start(self.events.clone()) {
            Ok(()) => self.pinging = true,
            Err(error) => self.pinged(Err(chain(&error))),
        }
    }

    fn pinged(&mut self, result: Result<(), String>) {
        self.pinging = false;
        if !self.all_serve() {
            // Something ended meanwhile; its next READY brings the next ping.
            return;
        }
        match result {
            Ok(()) => {
                self.agent.reached(Stage::Engine);
                log::info(&format!("the engine answers at {}", log::uptime_us()));
            }
            Err(reason) => {
                self.failed_pings += 1;
                log::info(&reason);
                if self.failed_pings < MAX_PINGS {
                    self.ping_at = Some(Instant::now() + PING_RETRY_INTERVAL);
                } else {
                    self.fail(Stage::Engine, reason);
                }
            }
        }
    }

    /// What the end of the guest needs: the agent, the events, and the running services' process ids.
    pub(crate) fn into_parts(self) -> (Agent, Receiver<Event>, Vec<(Service, i32)>) {
        let running = self.services.iter().filter_map(|one| match one.state {
            State::Running { pid, .. } => Some((one.service, pid)),
            _ => None,
        });
        let running = running.collect();
        (self.agent, self.inbox, running)
    }
}
