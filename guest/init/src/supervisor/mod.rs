//! The service supervisor: brings the engine up, keeps it up, and returns when the guest goes down.
//!
//! One loop handles every [`Event`]; whatever blocks has a thread of its own and sends its result as an event. Timers
//! (restart delays, the next ping, the watchdog) are the loop's receive timeout.

mod processes;
mod readiness;
mod watchdog;

use std::{
    sync::mpsc::{Receiver, RecvTimeoutError, Sender},
    time::{Duration, Instant},
};

use bulkhead_protocol::{Configuration, GuestMessage, HostMessage, Stage};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use self::{
    processes::{Ended, Processes},
    readiness::Readiness,
    watchdog::Watchdog,
};
use crate::{
    agent::Agent,
    config, diagnostics, disk,
    error::{Error, chain},
    event::Event,
    fd_store::{FdStore, Owner},
    handover,
    host_sockets::HostSockets,
    jail::Jail,
    log, oci_runtime,
    output::OUTPUT_GRACE,
    ping,
    ports::{self, Ports},
    procfs,
    restart::{Decision, MAX_BAD_STARTS},
    services::{self, HeldFds, Service},
    shutdown::ShutdownRequest,
    swarm,
};

/// The services of the engine, and everything that their supervision needs.
#[derive(Debug)]
pub(crate) struct Supervisor {
    agent: Agent,
    configuration: Configuration,
    ports: Ports,
    host_sockets: HostSockets,
    fds: HeldFds,
    events: Sender<Event>,
    inbox: Receiver<Event>,
    processes: Processes,
    readiness: Readiness,
    watchdog: Watchdog,
    /// The disk's tools run; their own thread waits for them.
    disk_busy: bool,
    /// A thread collects diagnostics.
    describing: bool,
    /// The start has failed, and the backend knows.
    failed: bool,
}

impl Supervisor {
    /// A supervisor that has not started any service.
    pub(crate) fn new(
        agent: Agent,
        configuration: Configuration,
        (ports, host_sockets): (Ports, HostSockets),
        store: FdStore,
        events: Sender<Event>,
        inbox: Receiver<Event>,
    ) -> Self {
        let wanted = Service::ALL.into_iter().filter(|one| configuration.isolation || *one != Service::Procfs);
        Self {
            processes: Processes::new(wanted),
            agent,
            configuration,
            ports,
            host_sockets,
            fds: HeldFds { store, endpoints: None, jail: None },
            events,
            inbox,
            readiness: Readiness::default(),
            watchdog: Watchdog::default(),
            disk_busy: false,
            describing: false,
            failed: false,
        }
    }

    /// Starts everything, and returns when the guest has to go down.
    pub(crate) fn run(&mut self) -> Result<ShutdownRequest, Error> {
        // Repairing a large disk can take minutes, and a shutdown must get through meanwhile.
        disk::start(self.configuration.data_disk_serial.clone(), self.events.clone())?;
        self.disk_busy = true;
        let prepared = services::write_configuration(&self.configuration)
            .and_then(|()| if self.configuration.isolation { self.isolate() } else { Ok(()) });
        // From here on a failure does not end the loop: the guest stays up, so that the reason can be read and the
        // machine examined, until the backend shuts it down.
        if let Err(error) = prepared {
            self.fail(Stage::Engine, chain(&error));
        }
        // Neither of the two needs the disk. containerd and dockerd follow once it is mounted.
        self.start(Service::Gate);
        if self.fds.endpoints.is_some() {
            self.start(Service::Procfs);
        }
        loop {
            let event = self.next_event();
            if let Some(event) = event
                && let Some(request) = self.handle(event)
            {
                return Ok(request);
            }
            self.run_due_timers();
        }
    }

    fn isolate(&mut self) -> Result<(), Error> {
        oci_runtime::isolate()?;
        self.fds.endpoints = Some(procfs::connect()?);
        handover::listen(config::ISOLATING_RUNTIME_PATH)
    }

    /// Waits for an event; `None` at the next timer.
    fn next_event(&self) -> Option<Event> {
        let deadlines = [self.processes.next_start(), self.readiness.deadline(), self.watchdog.deadline()];
        let received = match deadlines.into_iter().flatten().min() {
            Some(deadline) => self.inbox.recv_timeout(deadline.saturating_duration_since(Instant::now())),
            None => self.inbox.recv().map_err(RecvTimeoutError::from),
        };
        // `self.events` keeps the channel open, so the only error is the deadline.
        received.ok()
    }

    fn handle(&mut self, event: Event) -> Option<ShutdownRequest> {
        match event {
            Event::Child => self.reap(),
            Event::Signal(signal) => {
                log::info(&format!("received {signal}; shutting down"));
                return Some(ShutdownRequest::DEFAULT);
            }
            Event::Host(HostMessage::Shutdown { mode, grace_ms }) => {
                return Some(ShutdownRequest::new(mode, Duration::from_millis(grace_ms)));
            }
            Event::Host(HostMessage::Configure(_) | HostMessage::Certificates { .. } | HostMessage::TimeZone(_)) => {
                log::info("ignored a second configuration");
            }
            // The agent's thread passes it to the clock.
            Event::Host(HostMessage::Time { .. }) => {}
            Event::Host(HostMessage::Published { id, error }) => self.ports.answer(id, error),
            Event::Host(HostMessage::SocketRefused { socket, reason }) => self.host_sockets.refused(socket, reason),
            Event::ConnectSocket(socket) => self.agent.send(&GuestMessage::ConnectSocket { socket }),
            Event::Host(HostMessage::Shares { shares }) => {
                let error = services::write_shares(&shares).err().map(|error| chain(&error));
                self.agent.send(&GuestMessage::SharesTaken { error });
            }
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
                // A guest without a backend could not be stopped, or its ports unpublished: it must not linger.
                log::info(&format!("{reason}; powering off"));
                return Some(ShutdownRequest::DEFAULT);
            }
            Event::DiskPrepared(result) => self.disk_prepared(result),
            Event::Ready(pid) => self.service_ready(pid),
            Event::Watchdog(pid) => {
                // Any root process of the VM can write to the socket; only the service's own messages count.
                if self.processes.pid(Service::Procfs) == Some(pid) {
                    self.watchdog.renew(Instant::now());
                }
            }
            Event::Pinged(result) => self.ping_answered(result),
        }
        None
    }

    fn run_due_timers(&mut self) {
        let now = Instant::now();
        for service in self.processes.due(now) {
            self.start(service);
        }
        self.kill_silent_procfs();
        if self.readiness.take_due(now) {
            self.ping_if_all_ready();
        }
    }

    /// Collects diagnostics; one description answers every request that arrives before it is sent.
    fn describe(&mut self) {
        if self.describing {
            return;
        }
        match diagnostics::start(self.events.clone()) {
            Ok(()) => self.describing = true,
            Err(error) => log::info(&chain(&error)),
        }
    }

    fn fail(&mut self, stage: Stage, reason: String) {
        // The first failure is the cause; its consequences would only hide it.
        if !self.failed {
            self.failed = true;
            self.agent.failed(stage, reason);
        }
    }

    fn disk_prepared(&mut self, result: Result<(), Error>) {
        self.disk_busy = false;
        if let Err(error) = result {
            self.fail(Stage::Disk, chain(&error));
            return;
        }
        self.agent.reached(Stage::Disk);
        if let Err(error) = swarm::prepare(self.configuration.isolation) {
            self.fail(Stage::Engine, chain(&error));
        }
        if self.configuration.isolation && !self.failed {
            // It shows the engine's directories of the disk. Without it the engine does not start.
            match Jail::make() {
                Ok(jail) => self.fds.jail = Some(jail),
                Err(error) => self.fail(Stage::Engine, chain(&error)),
            }
        }
        if !self.failed {
            // Side by side: dockerd itself waits until containerd accepts its connection.
            self.start(Service::Containerd);
            self.start(Service::Dockerd);
        }
        // Orphans that ended while the disk's tools ran are still zombies.
        self.reap();
    }

    fn start(&mut self, service: Service) {
        let tail = self.processes.tail(service);
        match services::start(service, &self.configuration, &self.fds, tail) {
            Ok(pid) => {
                let now = Instant::now();
                self.processes.started(service, pid, now);
                if service == Service::Procfs {
                    self.watchdog.start(now);
                }
            }
            Err(error) => {
                let reason = chain(&error);
                log::info(&reason);
                self.restart_later(service, Duration::ZERO, false, &reason);
            }
        }
    }

    fn reap(&mut self) {
        // While the disk's tools run, waiting for any child could take their status from the thread that waits for it.
        for status in self.processes.reap(self.disk_busy) {
            if let Some(ended) = self.processes.ended(status) {
                self.service_ended(ended);
            }
        }
    }

    fn service_ended(&mut self, Ended { service, how, ran, ready }: Ended) {
        let mut reason = format!("{} {how}", service.name());
        if !ready {
            // The cause is usually in the last line of output, which may still be in the pipe. A failed start can wait
            // for it.
            std::thread::sleep(OUTPUT_GRACE);
            if let Some(line) = self.processes.tail(service).last() {
                reason = format!("{reason} ({line})");
            }
        }
        log::info(&reason);
        if service == Service::Procfs {
            // The engine serves without it: containers only wait for their files until the next one runs.
            self.watchdog.stop();
        } else {
            self.agent.send(&GuestMessage::EngineDown { reason: reason.clone() });
        }
        self.restart_later(service, ran, ready, &reason);
    }

    fn restart_later(&mut self, service: Service, ran: Duration, served: bool, reason: &str) {
        if self.processes.schedule_restart(service, ran, served) == Decision::GiveUp {
            if service == Service::Procfs {
                // Nothing serves the files any more. Closing every descriptor and aborting the connection makes what
                // waits for them fail, instead of waiting forever.
                self.fds.endpoints = None;
                self.fds.store.release(Owner::Procfs);
                procfs::abort();
            }
            self.fail(Stage::Engine, format!("{reason}, {MAX_BAD_STARTS} times in a row"));
        }
    }

    /// Kills a procfs service that hangs; its end is then an event like any other. If the end does not come, the next
    /// one is started all the same.
    ///
    /// Only this service: a second dockerd or gate would use the same files and sockets as the first, while this one's
    /// descriptors are made for several processes after each other, and a killed process does nothing with them.
    fn kill_silent_procfs(&mut self) {
        let now = Instant::now();
        if self.watchdog.take_expired(now)
            && let Some(pid) = self.processes.pid(Service::Procfs)
        {
            log::info(&format!("{} does not respond; killing it", Service::Procfs.name()));
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if self.watchdog.take_endless(now)
            && let Some(ended) = self.processes.abandon(Service::Procfs)
        {
            self.service_ended(ended);
        }
    }

    fn service_ready(&mut self, sender: i32) {
        let Some(service) = self.processes.mark_ready(sender) else { return };
        if service == Service::Dockerd {
            services::restrict_dockerd_socket();
        }
        self.readiness.reset();
        self.ping_if_all_ready();
    }

    fn ping_if_all_ready(&mut self) {
        if self.readiness.in_flight() || !self.processes.all_ready() {
            return;
        }
        match ping::start(self.events.clone()) {
            Ok(()) => self.readiness.sent(),
            Err(error) => self.ping_answered(Err(chain(&error))),
        }
    }

    fn ping_answered(&mut self, result: Result<(), String>) {
        self.readiness.answered();
        if !self.processes.all_ready() {
            // A service has ended since the ping was sent; its next `READY=1` brings the next ping.
            return;
        }
        match result {
            Ok(()) => {
                self.agent.reached(Stage::Engine);
                log::info(&format!("the engine answers at {}", log::uptime_us()));
            }
            Err(reason) => {
                log::info(&reason);
                if !self.readiness.retry(Instant::now()) {
                    self.fail(Stage::Engine, reason);
                }
            }
        }
    }

    /// Returns what a shutdown needs: the agent, the events, and the services that run with their process ids.
    pub(crate) fn into_parts(self) -> (Agent, Receiver<Event>, Vec<(Service, i32)>) {
        let running = self.processes.running().collect();
        (self.agent, self.inbox, running)
    }
}
