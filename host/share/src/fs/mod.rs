//! The file system: answers requests with the host's files. Shared by all workers.

mod access;
mod attributes;
mod cache;
mod change;
mod create;
mod data;
mod handles;
mod hidden;
mod list;
pub(crate) mod locks;
mod lookup;
mod nodes;
mod owners;
mod record;
mod recovery;
mod replay;
mod resolve;
mod state;
mod tree;
mod watch;
pub(crate) mod working_directory;
mod xattr;

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_ipc::sandbox::Shared;
use rustix::{fd::AsFd, io::Errno};

use crate::{
    api,
    buffers::{Buffers, Segments},
    events::Events,
    fuse::{
        reply::{self, Body},
        request::{self, Header, Operation},
    },
};
use attributes::Devices;
use cache::Cache;
#[cfg(test)]
pub(crate) use data::{open_flags, write_flags};
use handles::Handles;
use hidden::Hidden;
use locks::Locks;
pub(crate) use locks::Wait;
use nodes::Nodes;
use owners::Ids;
use resolve::Place;
pub(crate) use state::{LEN as STATE_LEN, Slots, State, WAITS};
use tree::Tree;
pub(crate) use tree::Unusable;

/// Descriptors that are not the guest's handles: directories that are kept open, those of requests that are being
/// served, the shares, and the process's own.
const RESERVED_DESCRIPTORS: usize = 2048;

/// The outcome of a request.
pub(crate) enum Reply {
    Body(Body),
    /// Data of this length, which is in the guest's buffers already, behind the header.
    Data(usize),
    /// The request has no reply.
    None,
    /// The reply comes when a lock can be had.
    Waits(Arc<Wait>),
}

/// A request of which this server has taken note.
pub(crate) enum Served {
    /// It is answered, with this number of bytes in the guest's buffers.
    Done(usize),
    /// It will be answered, by [`Server::finish_wait`].
    Waits(Arc<Wait>),
}

type Answer = Result<Reply, Errno>;

impl From<Body> for Reply {
    fn from(body: Body) -> Self {
        Self::Body(body)
    }
}

/// An empty body.
fn done() -> Reply {
    Body::default().into()
}

/// The file system.
pub(crate) struct Server {
    tree: Tree,
    hidden: Hidden,
    nodes: Mutex<Nodes>,
    cache: Mutex<Cache>,
    devices: Devices,
    handles: Handles,
    /// Changes by the host's programs.
    pub(crate) events: Events,
    pub(crate) locks: Locks,
    /// Requests that wait, for a successor.
    pub(crate) waits: Mutex<Slots>,
    ids: Ids,
    /// Serialises changes of records and modes, which are read, changed and written.
    records: Mutex<()>,
    /// Time in seconds and nanoseconds for directories that are not the host's.
    started: (i64, u32),
    state: Arc<State>,
}

impl Server {
    /// Opens the shares; those that cannot be served are returned with the reason.
    ///
    /// `hidden` are paths of the host at which the guest finds nothing. `descriptors` is the limit of this process,
    /// `epoch` a random number that differs from earlier processes'. `state` is what earlier processes of this device
    /// left. With `locks` the host keeps the guest's locks.
    pub(crate) fn new(
        shares: &[api::Share],
        hidden: &[PathBuf],
        descriptors: usize,
        epoch: u32,
        state: &Arc<State>,
        locks: bool,
    ) -> (Self, Vec<Unusable>) {
        let hidden = Hidden::find(hidden.iter().map(PathBuf::as_path));
        let (tree, failed) = Tree::open(shares, &hidden);
        let started = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // A waiting thread has a descriptor, too.
        let reserved = RESERVED_DESCRIPTORS + if locks { locks::MAX_OWNERS + locks::MAX_WAITING } else { 0 };
        let server = Self {
            nodes: recovery::nodes(&tree, &hidden, epoch, state).into(),
            tree,
            hidden,
            cache: Mutex::default(),
            devices: Devices::new(state),
            handles: Handles::new(epoch, descriptors.saturating_sub(reserved), state),
            events: Events::new(),
            locks: Locks::new(locks),
            waits: Slots::find(state, state::WAITS).0.into(),
            ids: Ids::own(),
            records: Mutex::default(),
            started: (started.as_secs() as i64, started.subsec_nanos()),
            state: Arc::clone(state),
        };
        server.resume_watches();
        (server, failed)
    }

    /// The shares, for this process to confine itself to.
    pub(crate) fn shared(&self) -> Vec<Shared<'_>> {
        let shares = self.tree.shares.iter();
        shares.map(|share| Shared { directory: share.directory.as_fd(), read_only: share.read_only }).collect()
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a request of a queue.
    pub(crate) fn serve(&self, queue: usize, buffers: &Buffers<'_>) -> Served {
        // Copied before it is looked at: the guest can change its buffers at any time.
        let first = buffers.readable.first::<{ request::HEADER }>();
        let Some(header) = first.and_then(|bytes| request::header(&bytes)) else { return Served::Done(0) };
        let most = match header.opcode {
            request::OP_WRITE => request::HEADER + request::WRITE,
            _ => (header.len as usize).min(request::MAX_COPY),
        };
        let bytes = buffers.readable.copy(most);
        let answer = match request::header(&bytes).filter(|again| *again == header) {
            // A length that is a lie, or a header that changed meanwhile.
            None => Err(Errno::INVAL),
            Some(_) => match request::operation(&header, &bytes) {
                Some(operation) => {
                    let own = self.begin_change(header.node, &operation);
                    let answer = self.answer_once(queue, &header, operation, buffers);
                    if let Some(own) = own {
                        own.end(answer.is_ok());
                    }
                    answer
                }
                None => Err(Errno::INVAL),
            },
        };
        match answer {
            Ok(Reply::Waits(wait)) => Served::Waits(wait),
            answer => Served::Done(finish(header.unique, answer, &buffers.writable)),
        }
    }

    /// The reply to a request that has waited, which is a header alone.
    pub(crate) fn finish_wait(&self, wait: &Arc<Wait>) -> [u8; reply::HEADER] {
        let error = self.lock_answer(wait).err().map_or(0, Errno::raw_os_error);
        reply::header(wait.unique, error, 0)
    }

    /// Lets a request wait again that has waited in an earlier process; fails with the reply if it need not wait.
    pub(crate) fn wait_again(
        &self,
        request: (usize, u64),
        node: u64,
        lock: &request::Lock,
    ) -> Result<Arc<Wait>, [u8; reply::HEADER]> {
        match self.set_lock(request, node, lock, true) {
            Ok(Reply::Waits(wait)) => Ok(wait),
            answer => Err(reply::header(request.1, answer.err().map_or(0, Errno::raw_os_error), 0)),
        }
    }

    fn answer(&self, queue: usize, header: &Header, operation: Operation<'_>, buffers: &Buffers<'_>) -> Answer {
        let (node, caller) = (header.node, header.caller);
        match operation {
            Operation::Init { major: 7, minor, readahead, flags } => {
                // A new connection knows nothing of an earlier one.
                self.locks.clear();
                self.handles.clear();
                self.nodes().clear();
                self.state.forget_requests();
                self.events.clear();
                Ok(Body::init(minor, readahead, flags, self.locks.on()).into())
            }
            Operation::Init { .. } => Err(Errno::PROTO),
            Operation::Destroy => {
                self.locks.clear();
                self.handles.clear();
                Ok(done())
            }
            Operation::Lookup(name) => self.lookup(node, name),
            Operation::Forget(count) => {
                self.nodes().forget(node, count);
                self.cease_if_returned(node);
                Ok(Reply::None)
            }
            Operation::BatchForget(pairs) => {
                self.forget(pairs);
                Ok(Reply::None)
            }
            Operation::Interrupt(unique) => {
                self.locks.pool.interrupt(unique);
                Ok(Reply::None)
            }
            Operation::GetLock(lock) => self.get_lock(node, &lock),
            Operation::SetLock { lock, wait } => self.set_lock((queue, header.unique), node, &lock, wait),
            Operation::Flush { owner, .. } => self.flush(node, owner),
            Operation::GetAttributes { handle } => self.get_attributes(node, handle),
            Operation::SetAttributes(changes) => self.set_attributes(node, &changes),
            Operation::ReadLink => self.read_link(node),
            Operation::Symlink { name, target } => self.symlink(node, name, target),
            Operation::MakeNode { name, mode, device } => self.make_node(node, name, mode, device, caller),
            Operation::MakeDirectory { name, mode } => self.make_directory(node, name, mode, caller),
            Operation::Unlink(name) => self.unlink(node, name),
            Operation::RemoveDirectory(name) => self.remove_directory(node, name),
            Operation::Rename { name, to, new, flags } => self.rename((node, name), (to, new), flags),
            Operation::Link { node: of, name } => self.link(of, node, name),
            Operation::Create { name, flags, mode, kill_privileges } => {
                self.create(node, name, flags, mode, caller, kill_privileges)
            }
            Operation::TemporaryFile { flags, mode } => self.temporary_file(node, flags, mode, caller),
            Operation::Open { flags, kill_privileges } => self.open_file(node, flags, kill_privileges, caller),
            _ => self.answer_data(node, operation, buffers),
        }
    }

    fn answer_data(&self, node: u64, operation: Operation<'_>, buffers: &Buffers<'_>) -> Answer {
        match operation {
            Operation::Read { handle, offset, size } => self.read(node, handle, offset, size, &buffers.writable),
            Operation::Write(write) => self.write(node, &write, &buffers.readable),
            Operation::Release { handle } | Operation::ReleaseDirectory { handle } => {
                if let Some(node) = self.handles.remove(handle) {
                    self.release_locks(node, handle);
                }
                Ok(done())
            }
            Operation::Sync { handle, data_only } => self.sync(node, handle, data_only),
            Operation::OpenDirectory => self.open_listing(node),
            Operation::ReadDirectory { handle, offset, size, plus } => {
                // The guest's buffer may be smaller than it says.
                let room = buffers.writable.len().saturating_sub(reply::HEADER);
                self.list(node, handle, offset, room.min(size as usize), plus)
            }
            Operation::SyncDirectory { handle, data_only } => self.sync_directory(node, handle, data_only),
            Operation::Statistics => self.statistics(node),
            Operation::SetXattr { name, value, flags } => self.set_xattr(node, name, value, flags),
            Operation::GetXattr { name, size } => self.get_xattr(node, name, size),
            Operation::ListXattr { size } => self.list_xattr(node, size),
            Operation::RemoveXattr(name) => self.remove_xattr(node, name),
            Operation::Allocate { handle, offset, length, mode } => self.allocate(node, handle, offset, length, mode),
            Operation::Seek { handle, offset, whence } => self.seek(node, handle, offset, whence),
            Operation::CopyRange(range) => self.copy_range(node, &range),
            Operation::Watch { mask, sequence } => self.watch(node, mask, sequence),
            // The kernel asks once for each, and for FLUSH unless the host keeps locks: nothing else is left to do when
            // a program closes a file, since writes are never held back. ACCESS is never asked where the kernel checks permissions itself.
            // SYNCFS would have the whole disk of the host written each time that a container calls sync(2); it may
            // ask that of single files. STATX adds nothing but the time of birth.
            _ => Err(Errno::NOSYS),
        }
    }

    fn forget(&self, pairs: &[u8]) {
        let word = |bytes: &[u8]| bytes.try_into().map(u64::from_ne_bytes).unwrap_or_default();
        let pairs = pairs.as_chunks::<16>().0;
        let mut nodes = self.nodes();
        for pair in pairs {
            let (node, count) = pair.split_at(8);
            nodes.forget(word(node), word(count));
        }
        drop(nodes);
        for pair in pairs.iter().take_while(|_| self.events.any()) {
            self.cease_if_returned(word(&pair[..8]));
        }
    }
}

/// Writes the header and the body of a reply; returns the number of bytes.
fn finish(unique: u64, answer: Answer, writable: &Segments<'_>) -> usize {
    let (error, len, body) = match answer {
        Ok(Reply::None | Reply::Waits(_)) => return 0,
        Ok(Reply::Data(len)) => (0, len, Body::default()),
        Ok(Reply::Body(body)) => (0, body.0.len(), body),
        Err(error) => (error.raw_os_error(), 0, Body::default()),
    };
    // A reply that the guest left too little room for is cut; its loss.
    writable.fill(&reply::header(unique, error, len));
    writable.fill_at(reply::HEADER, &body.0);
    (reply::HEADER + len).min(writable.len())
}
