//! Requests that were under way when a process was killed, and that its successor gets once more.
//!
//! Each queue has one request at a time, whose id is kept before it is served. One that comes again may have had its
//! effect already. Most can be served twice; those that cannot are looked at here: what they were to make is there
//! since they began, what they were to remove or move is gone, or is where they were to move it.

use std::{
    ffi::CStr,
    sync::atomic::Ordering,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bulkhead_queue::segments;
use rustix::{
    fs::{AtFlags, FallocateFlags, OFlags, RenameFlags, Statx, fsync, unlinkat},
    io::{Errno, ReadWriteFlags},
};
use vm_memory::VolatileSlice;

use super::{
    Answer, Place, Reply, Server, attributes,
    data::write_flags,
    done,
    nodes::Key,
    resolve::{self, Directory},
};
use crate::{
    buffers::Buffers,
    fuse::{
        reply::{Body, MAX_WRITE},
        request::{self, Header, Operation, Write},
    },
    sys,
};

/// Words of a request that is kept: its id, opcode, node, time of its start, and three that depend on it.
const UNIQUE: usize = 0;
const OPCODE: usize = 1;
const NODE: usize = 2;
const STARTED: usize = 3;
const NOTE: usize = 4;

/// Time by which a new file's time may be before that of the clock: the file system's ticks.
const TICK: Duration = Duration::from_millis(20);

/// A request that may have been served before.
struct Earlier {
    /// Time of its start in nanoseconds since 1970.
    started: u64,
    note: [u64; 3],
}

impl Server {
    /// Answers a request, and if an earlier process may have carried it out, without doing it twice.
    pub(super) fn answer_once(
        &self,
        queue: usize,
        header: &Header,
        operation: Operation<'_>,
        buffers: &Buffers<'_>,
    ) -> Answer {
        if let Some(earlier) = self.begin(queue, header) {
            if let Some(answer) = self.before_again(header, operation, buffers, &earlier) {
                return answer;
            }
            return after_again(operation, self.answer(queue, header, operation, buffers));
        }
        if let Some(note) = self.note(header.node, operation) {
            for (at, word) in note.into_iter().enumerate() {
                self.state.request(queue, NOTE + at).store(word, Ordering::Release);
            }
        }
        self.answer(queue, header, operation, buffers)
    }

    /// Keeps the id of a request; returns what is known of it if it was kept already.
    fn begin(&self, queue: usize, header: &Header) -> Option<Earlier> {
        let word = |at| self.state.request(queue, at);
        let get = |at| word(at).load(Ordering::Acquire);
        let set = |at, value| word(at).store(value, Ordering::Release);
        let opcode = header.opcode.into();
        if header.unique != 0 && [get(UNIQUE), get(OPCODE), get(NODE)] == [header.unique, opcode, header.node] {
            return Some(Earlier { started: get(STARTED), note: [0, 1, 2].map(|at| get(NOTE + at)) });
        }
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(TICK);
        set(UNIQUE, 0);
        set(OPCODE, opcode);
        set(NODE, header.node);
        set(STARTED, now.as_nanos() as u64);
        for at in 0..3 {
            set(NOTE + at, 0);
        }
        set(UNIQUE, header.unique);
        None
    }

    /// The state before a request by which a successor sees whether it was carried out.
    fn note(&self, node: u64, operation: Operation<'_>) -> Option<[u64; 3]> {
        match operation {
            Operation::Rename { name, .. } => {
                let stat = self.stat_in(node, name)?.1;
                Some(identity(&stat))
            }
            Operation::Write(Write { handle, flags, .. }) if flags & libc::O_APPEND.cast_unsigned() != 0 => {
                Some([self.size(handle, node)?, 1, 0])
            }
            Operation::Allocate { handle, mode, .. } if moves_data(mode) => Some([self.size(handle, node)?, 1, 0]),
            _ => None,
        }
    }

    fn size(&self, handle: u64, node: u64) -> Option<u64> {
        Some(resolve::stat(&self.file(handle, node).ok()?.fd).ok()?.stx_size)
    }

    fn stat_in(&self, parent: u64, name: &CStr) -> Option<(Directory, Statx)> {
        resolve::check(name).ok()?;
        let Ok(Place::Host(directory)) = self.place(parent) else { return None };
        let stat = resolve::stat_name(&*directory.fd, name).ok()?;
        Some((directory, stat))
    }

    /// The answer to a request that was carried out, if it is known without asking the host to do it again.
    fn before_again(
        &self,
        header: &Header,
        operation: Operation<'_>,
        buffers: &Buffers<'_>,
        earlier: &Earlier,
    ) -> Option<Answer> {
        let node = header.node;
        match operation {
            // Nodes that are returned once too little stay; those that are returned twice might be needed.
            Operation::Forget(_) | Operation::BatchForget(_) => Some(Ok(Reply::None)),
            Operation::Create { name, .. }
            | Operation::MakeNode { name, .. }
            | Operation::MakeDirectory { name, .. }
            | Operation::Symlink { name, .. } => {
                self.remove_remains(node, name, earlier);
                None
            }
            Operation::Link { node: of, name } => {
                self.remove_link(of, node, name);
                None
            }
            Operation::Rename { name, to, new, flags } => {
                let moved = self.stat_in(to, new).filter(|(_, stat)| earlier.note == identity(stat))?;
                let exchanged = RenameFlags::from_bits_retain(flags).contains(RenameFlags::EXCHANGE);
                // A rename between two names of one file does nothing.
                if !exchanged && self.stat_in(node, name).is_some_and(|(_, stat)| earlier.note == identity(&stat)) {
                    return None;
                }
                self.renamed(&moved.0, (node, name), (to, new));
                if let Some((directory, _)) = self.stat_in(node, name).filter(|_| exchanged) {
                    self.renamed(&directory, (to, new), (node, name));
                }
                Some(Ok(done()))
            }
            Operation::Write(write) if earlier.note[1] != 0 => self.append_rest(node, &write, buffers, earlier.note[0]),
            Operation::Allocate { handle, length, mode, .. } if earlier.note[1] != 0 => {
                let expected = match FallocateFlags::from_bits_retain(mode) {
                    mode if mode.contains(FallocateFlags::INSERT_RANGE) => earlier.note[0].checked_add(length),
                    _ => earlier.note[0].checked_sub(length),
                };
                (self.size(handle, node) == expected).then(|| Ok(done()))
            }
            _ => None,
        }
    }

    /// Removes a new file, directory or link without contents, so that it is made again as a whole.
    fn remove_remains(&self, parent: u64, name: &CStr, earlier: &Earlier) {
        let Some((directory, stat)) = self.stat_in(parent, name) else { return };
        let since = |time: (i64, u32)| {
            let nanoseconds = u64::try_from(time.0).unwrap_or_default().saturating_mul(1_000_000_000);
            nanoseconds.saturating_add(time.1.into()) >= earlier.started
        };
        let key = attributes::key(directory.share, &stat);
        let born = if key.born == (0, 0) { attributes::stamp(&stat) } else { key.born };
        let flags = match attributes::kind(&stat) {
            // The host refuses to remove one with contents.
            libc::S_IFDIR => AtFlags::REMOVEDIR,
            libc::S_IFREG if stat.stx_size > 0 || stat.stx_nlink > 1 => return,
            _ => AtFlags::empty(),
        };
        let read_only = self.tree.shares[directory.share].read_only;
        if since(born) && !read_only && self.check_not_taken(&directory, name, Errno::BUSY).is_ok() {
            let _ = self.change_names(&[&directory], || unlinkat(&*directory.fd, name, flags));
        }
    }

    /// Removes a name that was given to a file which has others.
    fn remove_link(&self, of: u64, parent: u64, name: &CStr) {
        let (Some((directory, stat)), Ok(target)) = (self.stat_in(parent, name), self.writable_target(of, None)) else {
            return;
        };
        let same = attributes::key(target.share, &stat) == attributes::key(target.share, &target.stat);
        if same && stat.stx_nlink > 1 && self.check_not_taken(&directory, name, Errno::BUSY).is_ok() {
            let _ = self.change_names(&[&directory], || unlinkat(&*directory.fd, name, AtFlags::empty()));
        }
    }

    /// Appends what a write to the end of a file has not written yet: the file had `size` bytes when it began.
    ///
    /// `None` if other data is there, so that nothing of it was written, or another program was faster.
    fn append_rest(&self, node: u64, write: &Write, buffers: &Buffers<'_>, size: u64) -> Option<Answer> {
        let file = self.file(write.handle, node).ok().filter(|file| file.writes)?;
        let len = write.size.min(MAX_WRITE) as usize;
        let (mut wanted, mut found) = (vec![0; len], vec![0; len]);
        let part = |skip, most| buffers.readable.part(request::HEADER + request::WRITE + skip, most);
        segments::copy_out(&part(0, len), &mut wanted);
        // The guest's descriptor may be for writing only.
        let reader = self.open_target(&self.target(node, None).ok()?, OFlags::RDONLY).ok()?;
        let written = sys::read_at(&reader, &[VolatileSlice::from(&mut found[..])], size).ok()?;
        if written == 0 || found[..written] != wanted[..written] {
            return None;
        }
        let rest = part(written, len - written);
        let flags = write_flags(write.flags);
        let more = if written < len { sys::write_at(&file.fd, &rest, size, flags).unwrap_or_default() } else { 0 };
        if flags.contains(ReadWriteFlags::DSYNC) && fsync(&file.fd).is_err() {
            // The part that the earlier process wrote may not be on the disk.
            return Some(Err(Errno::IO));
        }
        Some(Ok(Body::size((written + more) as u32).into()))
    }
}

/// The answer to a request that failed because it was carried out before.
fn after_again(operation: Operation<'_>, answer: Answer) -> Answer {
    match (operation, answer) {
        (Operation::Unlink(_) | Operation::RemoveDirectory(_), Err(Errno::NOENT))
        | (Operation::RemoveXattr(_), Err(Errno::NODATA))
        | (Operation::SetXattr { .. }, Err(Errno::EXIST)) => Ok(done()),
        (_, answer) => answer,
    }
}

/// The identity of a file, as it is noted.
fn identity(stat: &Statx) -> [u64; 3] {
    let Key { device, inode, born, .. } = attributes::key(0, stat);
    [device, inode, born.0.cast_unsigned() << 30 ^ u64::from(born.1)]
}

/// True if data changes its place in the file.
fn moves_data(mode: u32) -> bool {
    FallocateFlags::from_bits_retain(mode).intersects(FallocateFlags::COLLAPSE_RANGE | FallocateFlags::INSERT_RANGE)
}
