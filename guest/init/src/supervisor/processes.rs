//! The table of supervised services: their processes, and the time of the next start.

use std::time::{Duration, Instant};

use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};

use crate::{
    output::Tail,
    restart::{Backoff, Decision, MAX_BAD_STARTS},
    services::Service,
};

/// Maximum number of processes that were killed and do not end; as many as bad starts.
const MAX_ENDLESS: usize = MAX_BAD_STARTS as usize;

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Not started yet, or given up.
    Idle,
    Running {
        pid: i32,
        since: Instant,
        ready: bool,
    },
    /// Ended; the next start is due at `until`.
    Waiting {
        until: Instant,
    },
}

#[derive(Debug)]
struct Entry {
    service: Service,
    state: State,
    backoff: Backoff,
    tail: Tail,
}

/// A service whose process has ended.
#[derive(Debug)]
pub(super) struct Ended {
    pub(super) service: Service,
    /// Exit status or signal, for a log line.
    pub(super) how: String,
    /// Time since the process was started.
    pub(super) ran: Duration,
    /// It had sent `READY=1`.
    pub(super) ready: bool,
}

/// The supervised services.
#[derive(Debug)]
pub(super) struct Processes {
    entries: Vec<Entry>,
    /// Process ids of services that were killed and replaced before they ended.
    endless: Vec<i32>,
}

impl Processes {
    /// A table in which nothing runs; `services` is a prefix of [`Service::ALL`].
    pub(super) fn new(services: impl Iterator<Item = Service>) -> Self {
        let idle = |service| Entry { service, state: State::Idle, backoff: Backoff::default(), tail: Tail::default() };
        Self { entries: services.map(idle).collect(), endless: Vec::new() }
    }

    fn entry(&mut self, service: Service) -> &mut Entry {
        // Entries are in the order of the enum's numbers. The only service that may be missing is the last one, and
        // without isolation nothing asks for it.
        &mut self.entries[service as usize]
    }

    /// Returns the process id of a service that runs.
    pub(super) fn pid(&self, service: Service) -> Option<i32> {
        self.running().find_map(|(one, pid)| (one == service).then_some(pid))
    }

    /// Iterates over the services that run and their process ids.
    pub(super) fn running(&self) -> impl Iterator<Item = (Service, i32)> {
        self.entries.iter().filter_map(|entry| match entry.state {
            State::Running { pid, .. } => Some((entry.service, pid)),
            _ => None,
        })
    }

    /// Returns the service's last lines of output, which its next process shares.
    pub(super) fn tail(&mut self, service: Service) -> Tail {
        self.entry(service).tail.clone()
    }

    /// Records a new process.
    pub(super) fn started(&mut self, service: Service, pid: i32, since: Instant) {
        self.entry(service).state = State::Running { pid, since, ready: false };
    }

    /// Marks the service with this process id as ready and returns it.
    pub(super) fn mark_ready(&mut self, sender: i32) -> Option<Service> {
        self.entries.iter_mut().find_map(|entry| match &mut entry.state {
            State::Running { pid, ready, .. } if *pid == sender => {
                *ready = true;
                Some(entry.service)
            }
            _ => None,
        })
    }

    /// Returns whether every service runs and has sent `READY=1`.
    pub(super) fn all_ready(&self) -> bool {
        self.entries.iter().all(|entry| matches!(entry.state, State::Running { ready: true, .. }))
    }

    /// Reaps every child that has ended, without waiting. With `services_only` other children stay zombies.
    pub(super) fn reap(&self, services_only: bool) -> Vec<WaitStatus> {
        if services_only {
            let ended = |pid| waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)).ok();
            let running = self.running().map(|(_, pid)| pid);
            return running.chain(self.endless.iter().copied()).filter_map(ended).collect();
        }
        let next = || waitpid(None, Some(WaitPidFlag::WNOHANG)).ok().filter(|status| *status != WaitStatus::StillAlive);
        std::iter::from_fn(next).collect()
    }

    /// Gives up a service's process that was killed and has not ended: the next one is started beside it. It is reaped
    /// when it ends.
    pub(super) fn abandon(&mut self, service: Service) -> Option<Ended> {
        let State::Running { pid, since, ready } = self.entry(service).state else { return None };
        self.endless.push(pid);
        Some(Ended { service, how: "was killed and does not end".to_owned(), ran: since.elapsed(), ready })
    }

    /// Returns the service behind a status of [`Self::reap`]; its state changes with [`Self::schedule_restart`].
    pub(super) fn ended(&mut self, status: WaitStatus) -> Option<Ended> {
        let (pid, how) = match status {
            WaitStatus::Exited(pid, code) => (pid, format!("exited with status {code}")),
            WaitStatus::Signaled(pid, signal, _) => (pid, format!("was killed by {signal}")),
            _ => return None,
        };
        // Its service goes on with another process, which may have a state of any kind by now.
        if let Some(place) = self.endless.iter().position(|one| *one == pid.as_raw()) {
            self.endless.swap_remove(place);
            return None;
        }
        // Any other process was an orphan: the kernel makes PID 1 the parent of processes whose own parent has ended.
        self.entries.iter().find_map(|entry| match entry.state {
            State::Running { pid: running, since, ready } if running == pid.as_raw() => {
                Some(Ended { service: entry.service, how: how.clone(), ran: since.elapsed(), ready })
            }
            _ => None,
        })
    }

    /// Plans the next start of a service that ended after `ran`; `served` tells whether it had become ready.
    pub(super) fn schedule_restart(&mut self, service: Service, ran: Duration, served: bool) -> Decision {
        let endless = self.endless.len();
        let entry = self.entry(service);
        let mut decision = entry.backoff.ended(ran, served);
        // Each one keeps its memory. Requests that fail are better than requests that wait forever.
        if endless >= MAX_ENDLESS {
            decision = Decision::GiveUp;
        }
        entry.state = match decision {
            Decision::RestartAfter(delay) => State::Waiting { until: Instant::now() + delay },
            Decision::GiveUp => State::Idle,
        };
        decision
    }

    /// Returns the time of the next start.
    pub(super) fn next_start(&self) -> Option<Instant> {
        let waiting = self.entries.iter().filter_map(|entry| match entry.state {
            State::Waiting { until } => Some(until),
            _ => None,
        });
        waiting.min()
    }

    /// Returns the services whose next start is due.
    pub(super) fn due(&self, now: Instant) -> Vec<Service> {
        let is_due = |entry: &&Entry| matches!(entry.state, State::Waiting { until } if until <= now);
        self.entries.iter().filter(is_due).map(|entry| entry.service).collect()
    }
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    fn exited(pid: i32) -> WaitStatus {
        WaitStatus::Exited(Pid::from_raw(pid), 1)
    }

    #[test]
    fn a_service_is_ready_ends_and_is_due_again() {
        let mut processes = Processes::new([Service::Gate, Service::Containerd].into_iter());
        processes.started(Service::Gate, 7, Instant::now());
        assert_eq!((processes.mark_ready(8), processes.mark_ready(7)), (None, Some(Service::Gate)));
        assert!(!processes.all_ready());
        let ended = processes.ended(WaitStatus::Signaled(Pid::from_raw(7), Signal::SIGKILL, false)).unwrap();
        assert_eq!((ended.service, ended.ready, ended.how.as_str()), (Service::Gate, true, "was killed by SIGKILL"));
        let before = Instant::now();
        assert!(matches!(processes.schedule_restart(Service::Gate, ended.ran, false), Decision::RestartAfter(_)));
        assert_eq!((processes.pid(Service::Gate), processes.due(before)), (None, vec![]));
        assert_eq!(processes.due(processes.next_start().unwrap()), [Service::Gate]);
    }

    #[test]
    fn a_process_that_does_not_end_is_replaced_and_its_end_is_not_the_next_ones() {
        let mut processes = Processes::new(Service::ALL.into_iter());
        let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        processes.started(Service::Procfs, 7, long_ago);
        processes.mark_ready(7);
        let given_up = processes.abandon(Service::Procfs).unwrap();
        assert_eq!((given_up.how.as_str(), given_up.ready), ("was killed and does not end", true));
        let decision = processes.schedule_restart(Service::Procfs, given_up.ran, given_up.ready);
        assert_eq!(decision, Decision::RestartAfter(Duration::ZERO));
        assert_eq!(processes.due(Instant::now()), [Service::Procfs]);
        assert!(processes.abandon(Service::Procfs).is_none(), "it does not run");
        processes.started(Service::Procfs, 8, Instant::now());
        assert_eq!(processes.mark_ready(7), None, "the old one's messages do not count");
        assert!(processes.ended(exited(7)).is_none());
        assert_eq!(processes.pid(Service::Procfs), Some(8));
        assert_eq!(processes.ended(exited(8)).unwrap().service, Service::Procfs);
    }

    #[test]
    fn processes_that_do_not_end_are_limited_in_number() {
        let mut processes = Processes::new(Service::ALL.into_iter());
        let long_ago = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        for pid in 1.. {
            processes.started(Service::Procfs, pid, long_ago);
            processes.mark_ready(pid);
            let ended = processes.abandon(Service::Procfs).unwrap();
            if processes.schedule_restart(Service::Procfs, ended.ran, ended.ready) == Decision::GiveUp {
                assert_eq!(pid as usize, MAX_ENDLESS);
                break;
            }
        }
        // One that ends after all makes room.
        assert!(processes.ended(exited(1)).is_none());
        let decision = processes.schedule_restart(Service::Procfs, Duration::from_secs(60), true);
        assert_eq!(decision, Decision::RestartAfter(Duration::ZERO));
    }

    #[test]
    fn a_process_that_was_replaced_is_reaped_beside_the_services() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id().cast_signed();
        let mut processes = Processes::new(Service::ALL.into_iter());
        processes.started(Service::Procfs, pid, Instant::now());
        processes.abandon(Service::Procfs).unwrap();
        processes.schedule_restart(Service::Procfs, Duration::ZERO, true);
        child.kill().unwrap();
        let deadline = Instant::now() + Duration::from_secs(10);
        let status = loop {
            // Only what is in the table: other tests of this process have children as well.
            if let Some(status) = processes.reap(true).into_iter().find(|status| *status != WaitStatus::StillAlive) {
                break status;
            }
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.pid(), Some(Pid::from_raw(pid)));
        assert!(processes.ended(status).is_none());
        assert!(processes.endless.is_empty());
        assert!(child.wait().is_err(), "it is reaped");
    }

    #[test]
    fn orphans_are_not_services() {
        let mut processes = Processes::new(Service::ALL.into_iter());
        processes.started(Service::Dockerd, 9, Instant::now());
        assert!(processes.ended(exited(10)).is_none());
        assert!(processes.ended(WaitStatus::StillAlive).is_none());
        assert_eq!(processes.ended(exited(9)).unwrap().how, "exited with status 1");
    }
}
