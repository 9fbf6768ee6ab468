//! Threads that serve the queues, one each. A queue's requests are completed in the order in which they came, so that a
//! successor of this process can go on where it ended; but for those that wait for locks, see `parked`.

use std::{
    io,
    os::fd::{AsRawFd, RawFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender, TryRecvError},
    },
    thread,
    time::Duration,
};

use virtio_queue::QueueT;
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use bulkhead_queue::{GuestRam, SplitQueue};

use crate::{
    buffers::Buffers,
    error::ShareError,
    fs::{Served, Server, working_directory},
    parked::Parked,
};

/// A queue that is served.
pub(crate) struct Ring {
    pub(crate) queue: SplitQueue,
    pub(crate) memory: Arc<GuestRam>,
    pub(crate) kick: EventFd,
    pub(crate) call: Option<EventFd>,
    pub(crate) enabled: bool,
    pub(crate) role: Role,
    pub(crate) parked: Parked,
}

/// Purpose of a queue (virtio 1.3, 5.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The high priority queue: what the driver tells, without a reply. That it forgets a file, for the most part.
    Forgets,
    /// Buffers for notifications.
    Notifications,
    /// Requests whose replies are waited for.
    Requests,
}

/// Time for which a thread looks for more in a queue of [`Role::Forgets`] without a kick, and puts off the interrupt
/// for what it has completed. A program that removes files has one forgotten after each of its requests; a kick and an
/// interrupt for each would take as much time as the request. A program that a signal ends waits for this long, at
/// most.
const REST: Duration = Duration::from_millis(5);

enum Command {
    Start(Box<Ring>),
    /// Gives the queue back, after the request that is being served; with true, none of its requests waits any more.
    Stop(Sender<Box<Ring>>, bool),
    Call(Option<EventFd>),
    Enable(bool),
    /// Ends the thread.
    End,
}

/// The thread of a queue, seen from the one that sets the queue up.
pub(crate) struct Worker {
    commands: Sender<Command>,
    /// Set while there are commands, so that a busy thread looks.
    pending: Arc<AtomicBool>,
    wake: EventFd,
}

impl Worker {
    /// Starts the thread of a queue, which first confines itself.
    pub(crate) fn spawn(
        queue: usize,
        server: Arc<Server>,
        confine: impl FnOnce() -> Result<(), ShareError> + Send + 'static,
    ) -> Result<Self, io::Error> {
        let (commands, receiver) = mpsc::channel();
        let pending = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(EFD_NONBLOCK)?;
        let sources = Sources::new(wake.try_clone()?)?;
        let (confined, result) = mpsc::channel();
        let pending_too = Arc::clone(&pending);
        let (busy, woken) = (Arc::clone(&pending), wake.try_clone()?);
        server.locks.pool.wake_with(
            queue,
            Box::new(move || {
                busy.store(true, Ordering::Release);
                let _ = woken.write(1);
            }),
        );
        let inner = Thread { queue, commands: receiver, pending: pending_too, sources, ring: None };
        thread::Builder::new().name(format!("share-{queue}")).spawn(move || {
            // Refused by the usual filters of containers; records are read by paths then.
            if let Err(error) = working_directory::separate() {
                tracing::debug!(%error, "cannot have a working directory of its own");
            }
            let ready = confine().map_err(|error| io::Error::other(bulkhead_ipc::report::chain(&error)));
            let confined_well = ready.is_ok();
            if confined.send(ready).is_ok() && confined_well {
                inner.run(&server);
            }
        })?;
        result.recv().map_err(io::Error::other)??;
        Ok(Self { commands, pending, wake })
    }

    fn send(&self, command: Command) {
        // The thread ends only when this is dropped.
        let _ = self.commands.send(command);
        self.pending.store(true, Ordering::Release);
        let _ = self.wake.write(1);
    }

    /// Lets the thread serve a queue.
    pub(crate) fn start(&self, ring: Ring) {
        self.send(Command::Start(ring.into()));
    }

    /// Takes the queue back; the thread touches guest memory no more when this returns. With `forget` the requests that
    /// wait are never answered.
    pub(crate) fn stop(&self, forget: bool) -> Option<Ring> {
        let (give, take) = mpsc::channel();
        self.send(Command::Stop(give, forget));
        take.recv().ok().map(|ring| *ring)
    }

    /// Replaces the event that interrupts the driver.
    pub(crate) fn set_call(&self, call: Option<EventFd>) {
        self.send(Command::Call(call));
    }

    /// Lets requests be served or wait.
    pub(crate) fn enable(&self, enabled: bool) {
        self.send(Command::Enable(enabled));
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.send(Command::End);
    }
}

/// The events for which a thread waits. Edge-triggered: no event is ever read, which would be one more system call for each
/// request of a program that waits for the answer.
struct Sources {
    epoll: Epoll,
    /// Kept open: an event that is closed everywhere is not reported any more.
    wake: EventFd,
}

impl Sources {
    fn new(wake: EventFd) -> io::Result<Self> {
        let sources = Self { epoll: Epoll::new()?, wake };
        sources.add(sources.wake.as_raw_fd())?;
        Ok(sources)
    }

    fn add(&self, source: RawFd) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        match self.epoll.ctl(ControlOperation::Add, source, event) {
            // The host's events, when another ring is served.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            result => result,
        }
    }

    fn remove(&self, source: RawFd) {
        // Fails only for one that could not be added.
        let _ = self.epoll.ctl(ControlOperation::Delete, source, EpollEvent::default());
    }

    /// Waits for an event of any of them, or for a time.
    fn wait(&self, time: Option<Duration>) -> io::Result<()> {
        let mut events = [EpollEvent::default(); 4];
        let time = time.map_or(-1, |time| time.as_millis() as i32);
        loop {
            match self.epoll.wait(time, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return result.map(drop),
            }
        }
    }
}

struct Thread {
    queue: usize,
    commands: Receiver<Command>,
    pending: Arc<AtomicBool>,
    sources: Sources,
    ring: Option<Box<Ring>>,
}

impl Thread {
    fn run(mut self, server: &Server) {
        let mut rest = None;
        while self.wait(rest) && self.obey(server) {
            let ring = self.ring.as_mut().filter(|ring| ring.enabled);
            rest = ring.and_then(|ring| ring.serve(self.queue, server, &self.pending));
        }
    }

    /// Waits for a command, a kick, or events, or for a time; false when that is not possible.
    fn wait(&self, time: Option<Duration>) -> bool {
        let waited = self.sources.wait(time);
        if let Err(error) = &waited {
            tracing::error!(%error, "cannot wait for requests; the files of the host are out of reach");
        }
        waited.is_ok()
    }

    /// Takes a ring over, with the events that it needs.
    fn take(&mut self, ring: Box<Ring>, server: &Server) {
        let host = server.events.sources().filter(|_| ring.role == Role::Notifications);
        let host = host.map(|(host, ready)| [host.as_raw_fd(), ready.as_raw_fd()]).into_iter().flatten();
        for source in host.chain([ring.kick.as_raw_fd()]) {
            if let Err(error) = self.sources.add(source) {
                tracing::error!(%error, "cannot wait for requests; the files of the host are out of reach");
            }
        }
        self.ring = Some(ring);
    }

    /// Carries out all commands; false when there will be no more.
    fn obey(&mut self, server: &Server) -> bool {
        self.pending.store(false, Ordering::Release);
        loop {
            match self.commands.try_recv() {
                Ok(Command::Start(ring)) => self.take(ring, server),
                Ok(Command::Stop(give, forget)) => {
                    // Without a queue it is dropped unanswered.
                    if let Some(mut ring) = self.ring.take() {
                        self.sources.remove(ring.kick.as_raw_fd());
                        // The next thread or process of the queue does not know what was put off.
                        ring.interrupt();
                        if forget {
                            ring.parked.forget(self.queue, server);
                        }
                        let _ = give.send(ring);
                    }
                }
                Ok(Command::Call(call)) => {
                    if let Some(ring) = &mut self.ring {
                        ring.call = call;
                    }
                }
                Ok(Command::Enable(enabled)) => {
                    if let Some(ring) = &mut self.ring {
                        ring.enabled = enabled;
                    }
                }
                Err(TryRecvError::Empty) => return true,
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return false,
            }
        }
    }
}

impl Ring {
    /// Serves requests until there are none, or a command is waiting; or gives the events that there are. Returns the
    /// time after which the queue has to be looked at again, if no kick says so.
    fn serve(&mut self, queue: usize, server: &Server, pending: &AtomicBool) -> Option<Duration> {
        if self.role == Role::Notifications {
            server.events.deliver(&mut self.queue, &self.memory, self.call.as_ref(), pending);
            return None;
        }
        self.parked.resume(queue, &mut self.queue, &self.memory, server);
        self.parked.finish(&mut self.queue, &self.memory, server);
        self.interrupt_unless_put_off(0);
        let mut served = false;
        while !pending.load(Ordering::Acquire) {
            let Some(chain) = self.queue.pop(&self.memory) else {
                if served && self.role == Role::Forgets {
                    self.queue.disable_notifications(&self.memory);
                    return Some(REST);
                }
                self.interrupt();
                // The driver may have added a request between the look above and this request for a kick.
                if self.queue.enable_notifications(&self.memory) {
                    continue;
                }
                return None;
            };
            served = true;
            let head = chain.head_index();
            // A chain that is none, with a buffer outside of memory, is returned empty.
            let buffers = Buffers::new(chain.clone(), &self.memory);
            let written = match buffers.map(|buffers| server.serve(queue, &buffers)) {
                None => 0,
                Some(Served::Done(written)) => written,
                Some(Served::Waits(wait)) => {
                    self.parked.add(queue, chain, server, wait);
                    continue;
                }
            };
            self.queue.complete(&self.memory, head, written as u32);
            self.interrupt_unless_put_off(written);
        }
        None
    }

    /// Interrupts the driver for a reply of this length, or for chains that it may need soon.
    fn interrupt_unless_put_off(&mut self, written: usize) {
        let many = self.queue.unsignalled() >= self.queue.queue().size() / 4;
        if self.role != Role::Forgets || written > 0 || many {
            self.interrupt();
        }
    }

    /// Interrupts the driver if it wants that for the requests that were completed.
    fn interrupt(&mut self) {
        if self.queue.should_interrupt(&self.memory)
            && let Some(call) = &self.call
        {
            let _ = call.write(1);
        }
    }
}
