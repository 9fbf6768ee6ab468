//! The table of supervised services: their processes, and the time of the next start.

use std::time::{Duration, Instant};

use nix::{
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
    unistd::Pid,
};

use crate::{
    output::Tail,
    restart::{Backoff, Decision},
    services::Service,
};

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
pub(super) struct Processes(Vec<Entry>);

impl Processes {
    /// A table in which nothing runs; `services` is a prefix of [`Service::ALL`].
    pub(super) fn new(services: impl Iterator<Item = Service>) -> Self {
        let idle = |service| Entry { service, state: State::Idle, backoff: Backoff::default(), tail: Tail::default() };
        Self(services.map(idle).collect())
    }

    fn entry(&mut self, service: Service) -> &mut Entry {
        // Entries are in the order of the enum's numbers. The only service that may be missing is the last one, and
        // without isolation nothing asks for it.
        &mut self.0[service as usize]
    }

    /// Returns the process id of a service that runs.
    pub(super) fn pid(&self, service: Service) -> Option<i32> {
        self.running().find_map(|(one, pid)| (one == service).then_some(pid))
    }

    /// Iterates over the services that run and their process ids.
    pub(super) fn running(&self) -> impl Iterator<Item = (Service, i32)> {
        self.0.iter().filter_map(|entry| match entry.state {
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
        self.0.iter_mut().find_map(|entry| match &mut entry.state {
            State::Running { pid, ready, .. } if *pid == sender => {
                *ready = true;
                Some(entry.service)
            }
            _ => None,
        })
    }

    /// Returns whether every service runs and has sent `READY=1`.
    pub(super) fn all_ready(&self) -> bool {
        self.0.iter().all(|entry| matches!(entry.state, State::Running { ready: true, .. }))
    }

    /// Reaps every child that has ended, without waiting. With `services_only` other children stay zombies.
    pub(super) fn reap(&self, services_only: bool) -> Vec<WaitStatus> {
        if services_only {
            let ended = |pid| waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)).ok();
            return self.running().filter_map(|(_, pid)| ended(pid)).collect();
        }
        let next = || waitpid(None, Some(WaitPidFlag::WNOHANG)).ok().filter(|status| *status != WaitStatus::StillAlive);
        std::iter::from_fn(next).collect()
    }

    /// Returns the service behind a status of [`Self::reap`]; its state changes with [`Self::schedule_restart`].
    pub(super) fn ended(&self, status: WaitStatus) -> Option<Ended> {
        let (pid, how) = match status {
            WaitStatus::Exited(pid, code) => (pid, format!("exited with status {code}")),
            WaitStatus::Signaled(pid, signal, _) => (pid, format!("was killed by {signal}")),
            _ => return None,
        };
        // Any other process was an orphan: the kernel makes PID 1 the parent of processes whose own parent has ended.
        self.0.iter().find_map(|entry| match entry.state {
            State::Running { pid: running, since, ready } if running == pid.as_raw() => {
                Some(Ended { service: entry.service, how: how.clone(), ran: since.elapsed(), ready })
            }
            _ => None,
        })
    }

    /// Plans the next start of a service that ended after `ran`; `served` tells whether it had become ready.
    pub(super) fn schedule_restart(&mut self, service: Service, ran: Duration, served: bool) -> Decision {
        let entry = self.entry(service);
        let decision = entry.backoff.ended(ran, served);
        entry.state = match decision {
            Decision::RestartAfter(delay) => State::Waiting { until: Instant::now() + delay },
            Decision::GiveUp => State::Idle,
        };
        decision
    }

    /// Returns the time of the next start.
    pub(super) fn next_start(&self) -> Option<Instant> {
        let waiting = self.0.iter().filter_map(|entry| match entry.state {
            State::Waiting { until } => Some(until),
            _ => None,
        });
        waiting.min()
    }

    /// Returns the services whose next start is due.
    pub(super) fn due(&self, now: Instant) -> Vec<Service> {
        let is_due = |entry: &&Entry| matches!(entry.state, State::Waiting { until } if until <= now);
        self.0.iter().filter(is_due).map(|entry| entry.service).collect()
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
    fn orphans_are_not_services() {
        let mut processes = Processes::new(Service::ALL.into_iter());
        processes.started(Service::Dockerd, 9, Instant::now());
        assert!(processes.ended(exited(10)).is_none());
        assert!(processes.ended(WaitStatus::StillAlive).is_none());
        assert_eq!(processes.ended(exited(9)).unwrap().how, "exited with status 1");
    }
}
