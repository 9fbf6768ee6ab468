//! The server under requests as the guest's kernel writes them, on real directories.

mod coherence;
mod device;
mod escapes;
mod events;
mod files;
mod frontend;
mod hidden;
mod kernel;
mod locks;
mod nested;
mod owners;
mod process;
mod properties;
mod races;
mod recovery;
mod reported;
mod shares;
mod special;
mod waiting;

use std::{
    ffi::OsStr,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Sender},
    },
    thread,
};

use bulkhead_ipc::sandbox;

use tempfile::TempDir;
use vm_memory::VolatileSlice;

use crate::{
    api::Share,
    buffers::{Buffers, Segments},
    fs::{Served, Server, State},
    fuse,
};

/// Opcodes.
const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const SETXATTR: u32 = 21;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const REMOVEXATTR: u32 = 24;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const INIT: u32 = 26;
const CREATE: u32 = 35;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;
const TMPFILE: u32 = 51;

/// User without privileges.
const NOBODY: u32 = 65_534;

/// Runs a test as a user without privileges, on a thread of its own: system calls change the ids of one thread only.
fn unprivileged(test: impl FnOnce() + Send + 'static) {
    let body = move || {
        // SAFETY: integers only, but for the empty list of groups. The thread ends with the test.
        unsafe {
            if libc::geteuid() == 0 {
                assert_eq!(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()), 0);
                assert_eq!(libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY), 0);
                assert_eq!(libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY), 0);
            }
            libc::umask(0);
        }
        test();
    };
    if let Err(panic) = thread::spawn(body).join() {
        std::panic::resume_unwind(panic);
    }
}

/// The ids of this thread.
fn own() -> (u32, u32) {
    (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())
}

/// Attributes in a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Attributes {
    number: u64,
    size: u64,
    mode: u32,
    links: u32,
    uid: u32,
    gid: u32,
    device: u32,
}

/// An entry of a directory in a reply: node (0 in a plain list), inode number, position behind it, type, name.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    node: u64,
    number: u64,
    next: u64,
    kind: u32,
    name: Vec<u8>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn attributes(bytes: &[u8]) -> Attributes {
    Attributes {
        number: u64_at(bytes, 0),
        size: u64_at(bytes, 8),
        mode: u32_at(bytes, 60),
        links: u32_at(bytes, 64),
        uid: u32_at(bytes, 68),
        gid: u32_at(bytes, 72),
        device: u32_at(bytes, 76),
    }
}

/// A body of 32-bit and 64-bit fields, and strings with their zeros.
#[derive(Default)]
struct Request(Vec<u8>);

impl Request {
    fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_ne_bytes());
        self
    }

    fn name(mut self, name: impl AsRef<OsStr>) -> Self {
        self.0.extend(name.as_ref().as_bytes());
        self.0.push(0);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }
}

fn body() -> Request {
    Request::default()
}

static UNIQUE: AtomicU64 = AtomicU64::new(1);

/// Builds a request with its header.
fn request(opcode: u32, node: u64, (uid, gid): (u32, u32), body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((40 + body.len() as u32).to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    // Each request has an id of its own.
    bytes.extend(UNIQUE.fetch_add(1, Ordering::Relaxed).to_ne_bytes());
    bytes.extend(node.to_ne_bytes());
    for word in [uid, gid, 1, 0] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(body);
    bytes
}

/// Lets the server answer these bytes into a buffer of this size, both in two parts; returns what it wrote.
fn exchange(server: &Server, request: &[u8], room: usize) -> Vec<u8> {
    let (mut request, mut reply) = (request.to_vec(), vec![0; room]);
    let middle = (request.len() / 2, room / 3);
    let (first, second) = request.split_at_mut(middle.0);
    let (third, fourth) = reply.split_at_mut(middle.1);
    let buffers = Buffers {
        readable: Segments::of(vec![VolatileSlice::from(first), VolatileSlice::from(second)]),
        writable: Segments::of(vec![VolatileSlice::from(third), VolatileSlice::from(fourth)]),
    };
    let written = match server.serve(0, &buffers) {
        Served::Done(written) => written,
        Served::Waits(wait) => {
            while wait.outcome().is_none() {
                // The server's filter has no call to sleep.
                nix::poll::poll(&mut [], 1_u8).unwrap();
            }
            let answer = server.finish_wait(&wait);
            buffers.writable.fill(&answer);
            answer.len()
        }
    };
    reply.truncate(written);
    reply
}

/// A server of shares below a temporary directory, and the guest's kernel.
///
/// The server has a thread of its own that is confined as the process is.
struct Guest {
    server: Sender<(Vec<u8>, usize, Sender<Vec<u8>>)>,
    directory: TempDir,
    caller: (u32, u32),
    /// Paths that the guest may not find.
    hidden: Vec<PathBuf>,
    /// Memory that each server leaves to its successor.
    state: Arc<State>,
    /// The request that was sent last, and the room for its reply.
    last: Mutex<(Vec<u8>, usize)>,
    /// The host keeps the locks.
    locks: bool,
    /// The server, for what does not come as a reply.
    serving: Option<Arc<Server>>,
}

impl Guest {
    /// A guest of one share, the temporary directory itself.
    fn new() -> Self {
        Self::with(&[("", false)])
    }

    /// A guest of these shares, which are made below the temporary directory.
    fn with(shares: &[(&str, bool)]) -> Self {
        Self::with_locks(shares, false)
    }

    fn with_locks(shares: &[(&str, bool)], locks: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = State::own().unwrap();
        let mut guest = Self {
            server: mpsc::channel().0,
            directory,
            caller: own(),
            hidden: Vec::new(),
            state,
            last: Mutex::default(),
            locks,
            serving: None,
        };
        for (path, _) in shares {
            std::fs::create_dir_all(guest.path(path)).unwrap();
        }
        guest.restart(shares, 1);
        guest
    }

    /// Replaces the server by a successor that knows nothing of it.
    fn restart(&mut self, shares: &[(&str, bool)], epoch: u32) {
        self.state = State::own().unwrap();
        let shares: Vec<_> = shares.iter().map(|(path, read_only)| self.share(path, *read_only)).collect();
        let (server, failed) = Server::new(&shares, &self.hidden, 4096, epoch, &self.state, self.locks);
        assert!(failed.is_empty(), "{failed:?}");
        self.serve_with(server);
    }

    /// Replaces the server by a successor that has what it left.
    fn replace(&mut self, shares: &[(&str, bool)]) {
        let shares: Vec<_> = shares.iter().map(|(path, read_only)| self.share(path, *read_only)).collect();
        self.serve_with(Server::new(&shares, &self.hidden, 4096, 77, &self.state, self.locks).0);
    }

    /// Lets a server answer from now on.
    fn serve_with(&mut self, server: Server) {
        let (ask, questions) = mpsc::channel::<(Vec<u8>, usize, Sender<Vec<u8>>)>();
        let server = Arc::new(server);
        self.serving = Some(Arc::clone(&server));
        let locks = self.locks;
        thread::spawn(move || {
            sandbox::confine_share(&server.shared(), locks).unwrap();
            server.start_lock_threads(|| Ok(sandbox::confine_share_thread(true)?)).unwrap();
            sandbox::confine_share_thread(locks).unwrap();
            while let Ok((request, room, reply)) = questions.recv() {
                reply.send(exchange(&server, &request, room)).unwrap();
            }
        });
        self.server = ask;
    }

    /// Another server of the same directories.
    fn serve(&self, shares: &[(&str, bool)], epoch: u32) -> Server {
        let shares: Vec<_> = shares.iter().map(|(path, read_only)| self.share(path, *read_only)).collect();
        let (server, failed) = Server::new(&shares, &self.hidden, 4096, epoch, &State::own().unwrap(), self.locks);
        assert!(failed.is_empty(), "{failed:?}");
        server
    }

    fn share(&self, path: &str, read_only: bool) -> Share {
        Share { path: self.path(path), read_only }
    }

    /// A path on the host.
    fn path(&self, path: &str) -> PathBuf {
        if path.is_empty() { self.directory.path().to_owned() } else { self.directory.path().join(path) }
    }

    fn call(&self, opcode: u32, node: u64, body: Request) -> Result<Vec<u8>, i32> {
        self.call_with(opcode, node, body, 1 << 16)
    }

    fn call_with(&self, opcode: u32, node: u64, body: Request, room: usize) -> Result<Vec<u8>, i32> {
        *self.last.lock().unwrap() = (request(opcode, node, self.caller, &body.0), room);
        self.again()
    }

    /// Sends the last request once more, as the vmm does if it was not answered.
    fn again(&self) -> Result<Vec<u8>, i32> {
        let (answer, reply) = mpsc::channel();
        let (request, room) = self.last.lock().unwrap().clone();
        let unique = u64_at(&request, 8);
        self.server.send((request, room, answer)).unwrap();
        let reply = reply.recv().unwrap();
        if reply.is_empty() {
            return Ok(reply);
        }
        assert_eq!(u32_at(&reply, 0) as usize, reply.len());
        assert_eq!(u64_at(&reply, 8), unique);
        match u32_at(&reply, 4).cast_signed() {
            0 => Ok(reply[16..].to_vec()),
            error => {
                assert_eq!(reply.len(), 16);
                Err(-error)
            }
        }
    }

    fn lookup(&self, parent: u64, name: impl AsRef<OsStr>) -> Result<(u64, Attributes), i32> {
        self.call(LOOKUP, parent, body().name(name)).map(|reply| entry(&reply))
    }

    /// The node of a path below the temporary directory.
    fn node(&self, path: &str) -> u64 {
        self.find(&self.path(path)).unwrap().0
    }

    /// The node of an absolute path.
    fn find(&self, path: &Path) -> Result<(u64, Attributes), i32> {
        let mut found = (fuse::ROOT, self.attributes(fuse::ROOT)?);
        for name in path.components().skip(1) {
            found = self.lookup(found.0, name)?;
        }
        Ok(found)
    }

    fn attributes(&self, node: u64) -> Result<Attributes, i32> {
        self.call(GETATTR, node, body().u32(0).u32(0).u64(0)).map(|reply| attributes(&reply[16..]))
    }

    /// Sets attributes: bits of `FATTR_*`, handle, size, mode, owner.
    fn set(
        &self,
        node: u64,
        valid: u32,
        handle: u64,
        size: u64,
        mode: u32,
        owner: (u32, u32),
    ) -> Result<Attributes, i32> {
        let head = body().u32(valid).u32(0).u64(handle).u64(size).u64(0).u64(1).u64(2).u64(0);
        let whole = head.u32(3).u32(4).u32(0).u32(mode).u32(0).u32(owner.0).u32(owner.1).u32(0);
        self.call(SETATTR, node, whole).map(|reply| attributes(&reply[16..]))
    }

    fn chmod(&self, node: u64, mode: u32) -> Result<Attributes, i32> {
        self.set(node, 1, 0, 0, mode, (0, 0))
    }

    fn chown(&self, node: u64, uid: u32, gid: u32) -> Result<Attributes, i32> {
        self.set(node, 1 << 1 | 1 << 2 | 1 << 11, 0, 0, 0, (uid, gid))
    }

    /// Creates a file; returns node, handle and attributes.
    fn create(
        &self,
        parent: u64,
        name: impl AsRef<OsStr>,
        flags: i32,
        mode: u32,
    ) -> Result<(u64, u64, Attributes), i32> {
        let whole = body().u32(flags.cast_unsigned()).u32(libc::S_IFREG | mode).u32(0).u32(0).name(name);
        let reply = self.call(CREATE, parent, whole)?;
        let (node, attributes) = entry(&reply);
        Ok((node, u64_at(&reply, 128), attributes))
    }

    fn mkdir(&self, parent: u64, name: impl AsRef<OsStr>, mode: u32) -> Result<(u64, Attributes), i32> {
        self.call(MKDIR, parent, body().u32(mode).u32(0).name(name)).map(|reply| entry(&reply))
    }

    fn mknod(&self, parent: u64, name: &str, mode: u32, device: u32) -> Result<(u64, Attributes), i32> {
        self.call(MKNOD, parent, body().u32(mode).u32(device).u32(0).u32(0).name(name)).map(|reply| entry(&reply))
    }

    fn open(&self, node: u64, flags: i32) -> Result<u64, i32> {
        self.call(OPEN, node, body().u32(flags.cast_unsigned()).u32(0)).map(|reply| u64_at(&reply, 0))
    }

    fn read(&self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let whole = body().u64(handle).u64(offset).u32(size).u32(0).u64(0).u32(0).u32(0);
        self.call_with(READ, node, whole, 16 + size as usize)
    }

    fn write(&self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        self.write_with(node, handle, offset, data, 0, 0)
    }

    fn write_with(&self, node: u64, handle: u64, offset: u64, data: &[u8], flags: i32, kill: u32) -> Result<u32, i32> {
        let head = body().u64(handle).u64(offset).u32(data.len() as u32).u32(kill).u64(0);
        let whole = head.u32(flags.cast_unsigned()).u32(0).bytes(data);
        self.call(WRITE, node, whole).map(|reply| u32_at(&reply, 0))
    }

    fn rename(&self, from: (u64, &str), to: (u64, &str), flags: u32) -> Result<(), i32> {
        self.call(RENAME2, from.0, body().u64(to.0).u32(flags).u32(0).name(from.1).name(to.1)).map(drop)
    }

    fn remove(&self, opcode: u32, parent: u64, name: impl AsRef<OsStr>) -> Result<(), i32> {
        self.call(opcode, parent, body().name(name)).map(drop)
    }

    /// Lists a directory, in replies of at most `room` bytes.
    fn list(&self, node: u64, plus: bool, room: usize) -> Result<Vec<Entry>, i32> {
        let handle = u64_at(&self.call(OPENDIR, node, body().u32(0).u32(0))?, 0);
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let offset = entries.last().map_or(0, |entry| entry.next);
            let whole = body().u64(handle).u64(offset).u32(room as u32).u32(0).u64(0).u32(0).u32(0);
            let reply = self.call_with(if plus { READDIRPLUS } else { READDIR }, node, whole, 16 + room)?;
            assert!(reply.len() <= room);
            if reply.is_empty() {
                return Ok(entries);
            }
            let mut rest = &reply[..];
            while !rest.is_empty() {
                let found = if plus { u64_at(rest, 0) } else { 0 };
                rest = if plus { &rest[128..] } else { rest };
                let len = u32_at(rest, 16) as usize;
                entries.push(Entry {
                    node: found,
                    number: u64_at(rest, 0),
                    next: u64_at(rest, 8),
                    kind: u32_at(rest, 20),
                    name: rest[24..24 + len].to_vec(),
                });
                rest = &rest[(24 + len).next_multiple_of(8)..];
            }
        }
    }

    fn names(&self, node: u64) -> Vec<String> {
        let entries = self.list(node, true, 4096).unwrap();
        let mut names: Vec<_> = entries.iter().map(|entry| String::from_utf8_lossy(&entry.name).into_owned()).collect();
        names.retain(|name| name != "." && name != "..");
        names.sort();
        names
    }
}

fn entry(reply: &[u8]) -> (u64, Attributes) {
    (u64_at(reply, 0), attributes(&reply[40..]))
}
