//! The thread that serves the queue: performs what the page cache has, hands other requests to an engine and returns them
//! as they are done.

use std::{
    io,
    time::{Duration, Instant},
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    MAX_IN_FLIGHT,
    cached::Cached,
    disk::DiskFile,
    job::{Job, Progress},
    pool::Pool,
    request::Request,
    ring::Flights,
};
use crate::{
    devices::virtio::{ActiveQueue, MAX_NOTIFY_DELAY, RunningQueue, worker::StopSignal},
    memory::GuestRam,
    room::RoomSignal,
};

/// Maximum number of requests taken before those that are done are returned.
const BATCH: usize = 32;
/// Number of turns with work between two looks at whether the thread has to end.
const TURNS: usize = 16;
/// Interval between attempts of requests for which the host had no room.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The way in which requests are performed beside each other.
pub(super) enum Engine<'r, 'm> {
    Ring(Flights<'r, 'm>),
    Pool(Pool),
}

impl Engine<'_, '_> {
    fn start(&mut self, job: Job) -> io::Result<()> {
        match self {
            Self::Ring(flights) => flights.start(job),
            Self::Pool(pool) => {
                pool.start_job(job);
                Ok(())
            }
        }
    }

    fn submit(&mut self) -> io::Result<()> {
        match self {
            Self::Ring(flights) => flights.submit(),
            Self::Pool(_) => Ok(()),
        }
    }

    fn landed(&mut self) -> io::Result<Option<(Job, Progress)>> {
        match self {
            Self::Ring(flights) => flights.landed(),
            Self::Pool(pool) => Ok(pool.landed()),
        }
    }
}

/// The needs of the thread besides its engine.
pub(super) struct Parts<'m> {
    pub(super) memory: &'m GuestRam,
    pub(super) disk: &'m DiskFile,
    /// Raised by the engine.
    pub(super) done: &'m EventFd,
    pub(super) room: &'m RoomSignal,
    /// The driver did not negotiate flushes.
    pub(super) write_through: bool,
}

/// Serves the queue until the worker is stopped. Afterwards no request touches guest memory.
pub(super) fn run(stop: &StopSignal, queue: ActiveQueue, parts: Parts<'_>, engine: Engine<'_, '_>) -> io::Result<()> {
    let (queue, parked, retry) = (queue.run(), Vec::new(), Instant::now());
    let cached = Cached::new();
    let mut server = Server { queue, parts, engine, cached, in_flight: 0, parked, waiting: 0, retry };
    let mut turns = 0;
    loop {
        let worked = server.turn()?;
        turns = if worked { turns + 1 } else { 0 };
        if worked && turns % TURNS != 0 {
            continue;
        }
        let timeout = if worked { Some(Duration::ZERO) } else { server.time_to_retry() };
        if !stop.wait(&[&server.queue.kick, server.parts.done], timeout)? {
            return server.drain();
        }
        if !worked {
            // Reset before the next look at the queue and at what is done, so that a later one wakes the next wait.
            let _ = server.queue.kick.read();
            let _ = server.parts.done.read();
        }
    }
}

struct Server<'m, 'r> {
    queue: RunningQueue,
    parts: Parts<'m>,
    engine: Engine<'r, 'm>,
    cached: Cached,
    in_flight: usize,
    /// Requests for which the host had no room.
    parked: Vec<Job>,
    /// Number of requests, parked or tried again, for which the host had no room.
    waiting: usize,
    /// The time of the next attempt of those that are parked.
    retry: Instant,
}

impl Server<'_, '_> {
    /// Takes requests and returns those that are done. False if there was nothing to do and a kick announces the next.
    fn turn(&mut self) -> io::Result<bool> {
        self.retry_parked()?;
        let taken = self.take()?;
        self.engine.submit()?;
        let returned = self.give_back()?;
        self.queue.notify(self.parts.memory);
        if taken || returned {
            return Ok(true);
        }
        // A full device asks for no kicks; a request that is done makes it look again.
        Ok(self.has_place() && self.queue.queue.enable_notifications(self.parts.memory))
    }

    fn has_place(&self) -> bool {
        self.in_flight + self.parked.len() < MAX_IN_FLIGHT
    }

    fn take(&mut self) -> io::Result<bool> {
        let (memory, disk) = (self.parts.memory, self.parts.disk);
        let mut notified = Instant::now();
        for count in 0..BATCH {
            if !self.has_place() {
                return Ok(count > 0);
            }
            let Some(chain) = self.queue.queue.pop(memory) else { return Ok(count > 0) };
            let head = chain.head_index();
            match Request::parse(chain, memory) {
                Some(request) => {
                    let mut job = Job::new(head, request, disk, memory, self.parts.write_through);
                    match self.cached.perform(disk, &mut job, memory) {
                        Some(Progress::Next) => self.queue.queue.complete(memory, head, job.finish(memory)),
                        Some(Progress::NoRoom) => self.park(job),
                        None => {
                            self.in_flight += 1;
                            self.engine.start(job)?;
                        }
                    }
                }
                None => self.queue.queue.complete(memory, head, 0),
            }
            if notified.elapsed() >= MAX_NOTIFY_DELAY {
                self.queue.notify(memory);
                notified = Instant::now();
            }
        }
        Ok(true)
    }

    fn give_back(&mut self) -> io::Result<bool> {
        let mut any = false;
        while let Some((job, progress)) = self.engine.landed()? {
            any = true;
            self.in_flight -= 1;
            if progress == Progress::NoRoom {
                self.park(job);
            } else {
                if job.waited {
                    self.no_longer_waits();
                }
                let head = job.head;
                self.queue.queue.complete(self.parts.memory, head, job.finish(self.parts.memory));
            }
        }
        Ok(any)
    }

    /// Keeps a request for which the host has no room. The guest would take an error for a broken disk; this way it
    /// waits until the user has made room.
    fn park(&mut self, mut job: Job) {
        if !std::mem::replace(&mut job.waited, true) {
            self.waiting += 1;
            // Once, and not each time that a retry finds the disk still full.
            if self.waiting == 1 {
                self.retry = Instant::now() + RETRY_INTERVAL;
                self.parts.room.report(self.parts.disk.serial(), false);
            }
        }
        self.parked.push(job);
    }

    fn no_longer_waits(&mut self) {
        self.waiting -= 1;
        if self.waiting == 0 {
            self.parts.room.report(self.parts.disk.serial(), true);
        }
    }

    fn retry_parked(&mut self) -> io::Result<()> {
        if !self.parked.is_empty() && self.retry <= Instant::now() {
            self.retry = Instant::now() + RETRY_INTERVAL;
            for job in std::mem::take(&mut self.parked) {
                self.in_flight += 1;
                self.engine.start(job)?;
            }
        }
        Ok(())
    }

    fn time_to_retry(&self) -> Option<Duration> {
        // Rounded up to what poll(2) counts in, so that the time is over when it returns.
        let rest = self.retry.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        (!self.parked.is_empty()).then_some(rest)
    }

    /// Waits for all requests in the engine. Those without room are given up: the driver has reset the device.
    fn drain(&mut self) -> io::Result<()> {
        self.engine.submit()?;
        loop {
            let _ = self.parts.done.read();
            self.give_back()?;
            if self.in_flight == 0 {
                break;
            }
            StopSignal::wait_for(self.parts.done)?;
        }
        if self.waiting > 0 {
            self.parts.room.report(self.parts.disk.serial(), true);
        }
        Ok(())
    }
}
