//! Changes by programs of the host in the shares, for watchers in the guest (inotify(7)).
//!
//! The guest's kernel tells which nodes its programs watch, and only those are watched here. It reports by itself what
//! its own programs change, so an event that this process has caused is not sent: see `own`.
//!
//! Both messages are Bulkhead's own, defined in `include/uapi/linux/fuse.h` of the guest's kernel as it is patched:
//! the request `FUSE_WATCH`, and the notification `FUSE_NOTIFY_HOST_EVENT` on the notification queue (virtio 1.3,
//! 5.11.2).

mod own;
mod queue;

use std::{
    collections::{HashMap, VecDeque},
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(crate) use own::{Change, Own};
pub(crate) use queue::{BUFFER, FEATURE};

/// Events that a watcher of the guest can ask for. What the host's programs merely read is their own business.
const EVENTS: u32 = libc::IN_MODIFY
    | libc::IN_ATTRIB
    | libc::IN_CLOSE_WRITE
    | libc::IN_MOVED_FROM
    | libc::IN_MOVED_TO
    | libc::IN_CREATE
    | libc::IN_DELETE
    | libc::IN_DELETE_SELF
    | libc::IN_MOVE_SELF;

/// Nodes that are watched, at most. The host's own limit for the user (`fs.inotify.max_user_watches`) is often lower.
const MAX_NODES: usize = 1 << 16;

/// Events that wait for the guest, at most: as many as inotify itself keeps by default.
const MAX_PENDING: usize = 1 << 14;

/// Bytes of events that one system call reads.
const READ: usize = 16 << 10;

/// An event for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// The node that is watched.
    pub(crate) node: u64,
    /// One of [`EVENTS`], with `IN_ISDIR` if it is about a directory.
    pub(crate) mask: u32,
    /// The same for both events of a move, otherwise 0.
    pub(crate) cookie: u32,
    /// Name in the directory that is watched; empty if the event is about the node itself.
    pub(crate) name: Vec<u8>,
}

/// An event on its way.
struct Pending {
    event: Event,
    /// The change in progress that may have caused it.
    held: Option<u64>,
}

/// A watched node.
struct Watch {
    descriptor: i32,
    mask: u32,
    sequence: u64,
}

#[derive(Default)]
struct State {
    nodes: HashMap<u64, Watch>,
    /// Nodes by watch descriptor. A file that is in two shares is two nodes and one inode.
    descriptors: HashMap<i32, Vec<u64>>,
    /// Changes by this process that have begun and not ended.
    changes: HashMap<u64, Vec<own::Expected>>,
    next_change: u64,
    pending: VecDeque<Pending>,
    /// A warning of this kind has been logged.
    warned_of_limit: bool,
    warned_of_loss: bool,
}

/// The descriptors by which the host is watched.
struct Host {
    inotify: OwnedFd,
    /// Raised when events are ready for the guest.
    ready: EventFd,
}

/// Watches on the host's files, and the events that they gave.
pub(crate) struct Events {
    /// `None` where the host refuses it.
    host: Option<Host>,
    /// Number of watched nodes, to be read without the lock.
    watched: AtomicUsize,
    state: Mutex<State>,
}

impl Host {
    fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC)?;
        Ok(Self { inotify, ready: EventFd::new(EFD_NONBLOCK)? })
    }
}

impl Events {
    /// Opens what is needed of the host, which this process cannot do later.
    pub(crate) fn new() -> Self {
        let host = Host::new().inspect_err(|error| {
            tracing::warn!(%error, "cannot watch files; containers do not see what the host's programs change");
        });
        Self { host: host.ok(), watched: AtomicUsize::new(0), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if something is watched.
    pub(crate) fn any(&self) -> bool {
        self.watched.load(Ordering::Acquire) > 0
    }

    /// Number of watched nodes.
    #[cfg(test)]
    pub(crate) fn watched(&self) -> usize {
        self.watched.load(Ordering::Acquire)
    }

    /// Watches a node, whose file `place` is, for these events. `sequence` numbers the guest's requests for the node:
    /// one that an earlier one has overtaken has no effect.
    pub(crate) fn watch(&self, node: u64, mask: u32, sequence: u64, place: BorrowedFd<'_>) -> Result<(), Errno> {
        let inotify = &self.host.as_ref().ok_or(Errno::NOSYS)?.inotify;
        let mut state = self.state();
        match state.nodes.get(&node) {
            Some(watch) if watch.sequence >= sequence => return Ok(()),
            None if state.nodes.len() >= MAX_NODES => return state.limit(Errno::NOSPC),
            _ => {}
        }
        let mask = mask & EVENTS;
        // A descriptor that is open as a place is all that there is of the file; the link below leads to it and nowhere
        // else. Bits are only added: another node of the same file may need them.
        let path = format!("/proc/self/fd/{}", place.as_raw_fd());
        let flags = WatchFlags::from_bits_retain(mask) | WatchFlags::MASK_ADD;
        // Counted before: from now on changes by this process are looked at.
        self.watched.store(state.nodes.len() + 1, Ordering::Release);
        let descriptor = match inotify::add_watch(inotify, path, flags) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                self.watched.store(state.nodes.len(), Ordering::Release);
                return state.limit(error);
            }
        };
        let of = state.descriptors.entry(descriptor).or_default();
        if !of.contains(&node) {
            of.push(node);
        }
        state.nodes.insert(node, Watch { descriptor, mask, sequence });
        Ok(())
    }

    /// Ceases to watch a node, at the guest's request of this number.
    pub(crate) fn unwatch(&self, node: u64, sequence: u64) {
        let mut state = self.state();
        if state.nodes.get(&node).is_some_and(|watch| watch.sequence < sequence) {
            self.remove(&mut state, node);
        }
    }

    /// Ceases to watch a node that the guest has returned.
    pub(crate) fn forget(&self, node: u64) {
        if self.any() {
            self.remove(&mut self.state(), node);
        }
    }

    fn remove(&self, state: &mut State, node: u64) {
        let Some(watch) = state.nodes.remove(&node) else { return };
        self.watched.store(state.nodes.len(), Ordering::Release);
        if let Some(of) = state.descriptors.get_mut(&watch.descriptor) {
            of.retain(|other| *other != node);
            if of.is_empty() {
                state.descriptors.remove(&watch.descriptor);
                if let Some(Host { inotify, .. }) = &self.host {
                    // Fails if the file is gone, and the watch with it.
                    let _ = inotify::remove_watch(inotify, watch.descriptor);
                }
            }
        }
        state.pending.retain(|pending| pending.event.node != node);
    }

    /// Ceases to watch anything: the guest starts over.
    pub(crate) fn clear(&self) {
        if self.any() {
            let mut state = self.state();
            for node in state.nodes.keys().copied().collect::<Vec<_>>() {
                self.remove(&mut state, node);
            }
        }
    }

    /// Reads all events that the host has.
    fn drain(&self, state: &mut State) {
        let Some(Host { inotify, .. }) = &self.host else { return };
        let mut buffer = [MaybeUninit::uninit(); READ];
        let mut reader = Reader::new(inotify.as_fd(), &mut buffer);
        loop {
            match reader.next() {
                Ok(event) => {
                    let name = event.file_name().map(|name| name.to_bytes().to_vec()).unwrap_or_default();
                    state.sort(event.wd(), event.events(), event.cookie(), name);
                }
                Err(Errno::INTR) => {}
                // The host's queue is empty.
                Err(_) => break,
            }
        }
        // Watches that ended by themselves: the file is gone.
        self.watched.store(state.nodes.len(), Ordering::Release);
    }

    /// Reads what the host has and tells the thread that serves the guest, if there is something for it.
    fn collect(&self, state: &mut State) {
        self.drain(state);
        self.announce(state);
    }

    fn announce(&self, state: &State) {
        if let Some(Host { ready, .. }) = self.host.as_ref().filter(|_| !state.pending.is_empty()) {
            let _ = ready.write(1);
        }
    }

    /// Takes the next event for the guest.
    pub(crate) fn next(&self) -> Option<Event> {
        let mut state = self.state();
        let is_ready = |state: &State| state.pending.front().is_some_and(|first| first.held.is_none());
        // Not for each event: one read gives many. Before a `None` the host's queue is empty, and nobody is woken for it.
        if !is_ready(&state) {
            self.drain(&mut state);
        }
        // Those behind one that may be the guest's own wait for it, so that their order stays.
        if !is_ready(&state) {
            return None;
        }
        state.pending.pop_front().map(|pending| pending.event)
    }
}

impl State {
    /// Notes a refusal by a limit.
    fn limit(&mut self, error: Errno) -> Result<(), Errno> {
        if matches!(error, Errno::NOSPC | Errno::NOMEM) && !self.warned_of_limit {
            self.warned_of_limit = true;
            tracing::warn!(
                "no more files can be watched; containers do not see all that the host's programs change; raise \
                 fs.inotify.max_user_watches"
            );
        }
        Err(error)
    }

    /// Sorts an event to the nodes that it is about.
    fn sort(&mut self, descriptor: i32, flags: ReadFlags, cookie: u32, name: Vec<u8>) {
        if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
            self.lose();
            return;
        }
        if flags.contains(ReadFlags::IGNORED) {
            for node in self.descriptors.remove(&descriptor).unwrap_or_default() {
                self.nodes.remove(&node);
            }
            return;
        }
        let mask = flags.bits() & EVENTS;
        for node in self.descriptors.get(&descriptor).cloned().unwrap_or_default() {
            if self.nodes.get(&node).is_some_and(|watch| watch.mask & mask != 0) {
                let mask = mask | flags.bits() & libc::IN_ISDIR;
                let event = Event { node, mask, cookie, name: name.clone() };
                let held = self.cause(&event);
                self.push(Pending { event, held });
            }
        }
    }

    fn push(&mut self, pending: Pending) {
        // As inotify does itself. Two that are held are dropped or sent alike.
        if self.pending.back().is_some_and(|last| last.event == pending.event && last.held == pending.held) {
            return;
        }
        if self.pending.len() >= MAX_PENDING {
            self.lose();
        } else {
            self.pending.push_back(pending);
        }
    }

    fn lose(&mut self) {
        if !self.warned_of_loss {
            self.warned_of_loss = true;
            tracing::warn!("more files changed than events are kept for; containers do not see all of the changes");
        }
    }
}
