//! Answers the kernel's requests.
//!
//! The caller is any process of a container that has the file open, with any offset, size and data. Permissions are
//! checked by the kernel; what it cannot know, such as a read-only container, is checked here.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use bulkhead_guest_common::registry::{Container, Registry};
use rustix::io::Errno;

use super::{
    reply::{self, Body},
    request::{self, Operation, Read, Request},
};
use crate::{
    files::{Node, Source},
    generated,
    hostname::Caller,
    loadavg::Loads,
    sysctls::Sysctls,
    tree::{self, Inode},
    watchdog::Work,
};

/// Maximum number of contents held for readers that take them in several parts. Beyond it they are generated for each
/// part: containers can open as many files as they like.
const MAX_SNAPSHOTS: usize = 256;

/// The server of the tree. Shared by all workers.
#[derive(Debug)]
pub(crate) struct Server {
    registry: Registry,
    sysctls: Sysctls,
    pub(crate) loads: Loads,
    /// Contents by handle, so that a reader with a small buffer does not see parts of two generations.
    snapshots: Mutex<BTreeMap<u64, Arc<str>>>,
    handles: AtomicU64,
}

type Answer = Result<Body, i32>;

impl Server {
    /// Creates a server of the containers in `registry`. Handles count up from `epoch`, so that they differ from those
    /// of earlier servers, whose files are still open.
    pub(crate) fn new(registry: Registry, epoch: u64) -> Self {
        Self {
            sysctls: Sysctls::new(registry.clone()),
            registry,
            loads: Loads::default(),
            snapshots: Mutex::default(),
            handles: AtomicU64::new(epoch),
        }
    }

    /// Answers requests until the connection is gone.
    ///
    /// # Errors
    /// If the descriptor cannot be read for another reason.
    pub(crate) fn serve(&self, device: &OwnedFd, work: &Work) -> io::Result<()> {
        let mut buffer = vec![0; request::BUFFER];
        loop {
            let length = match rustix::io::read(device.as_fd(), &mut buffer) {
                Ok(length) => length,
                // The mount is gone or was aborted.
                Err(Errno::NODEV) => return Ok(()),
                // ENOENT: the caller was killed in the meantime.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            };
            let _busy = work.begin();
            let Some(request) = request::parse(&buffer[..length]) else { continue };
            // A request that panics must not take the worker down: the kernel would send it to the next server again,
            // and one container could stop the files of all.
            let answer = catch_unwind(AssertUnwindSafe(|| self.answer(&request))).unwrap_or(Some(Err(libc::EIO)));
            if let Some(answer) = answer {
                // ENOENT: the caller is gone and needs no reply.
                let _ = rustix::io::write(device.as_fd(), &reply::answer(request.unique, answer));
            }
        }
    }

    /// Answers a request; `None` if the kernel expects no reply.
    pub(crate) fn answer(&self, request: &Request<'_>) -> Option<Answer> {
        let inode = Inode::of(request.node);
        Some(match &request.operation {
            Operation::Silent => return None,
            Operation::Init { major: 7, minor, flags } => Ok(Body::init(*minor, *flags)),
            // The only major version there is.
            Operation::Init { .. } => Err(libc::EPROTO),
            Operation::Lookup(name) => self.lookup(inode, name),
            Operation::SetAttributes { ownership: true } => Err(libc::EPERM),
            Operation::GetAttributes | Operation::SetAttributes { ownership: false } => self.attributes(inode),
            Operation::Open { flags } => self.open(inode, *flags),
            Operation::Read(read) => self.read(inode, *read, request.pid),
            Operation::Write { offset, data } => self.write(inode, *offset, data, request.pid),
            Operation::Release { handle } => {
                self.snapshots().remove(handle);
                Ok(Body::default())
            }
            Operation::OpenDirectory => Ok(Body::open(0)),
            Operation::ReadDirectory(read) => self.list(inode, *read),
            Operation::Acknowledge => Ok(Body::default()),
            Operation::Statistics => Ok(Body::statistics()),
            Operation::Unknown => Err(libc::ENOSYS),
        })
    }

    fn snapshots(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<str>>> {
        self.snapshots.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn container(&self, slot: u64) -> Result<Container, i32> {
        self.registry.get(slot).ok_or(libc::ENOENT)
    }

    fn node(&self, inode: Option<Inode>) -> Result<(Container, &'static Node), i32> {
        match inode {
            Some(Inode::Node(slot, node)) => Ok((self.container(slot)?, node)),
            Some(_) => Err(libc::EISDIR),
            None => Err(libc::ENOENT),
        }
    }

    fn lookup(&self, inode: Option<Inode>, name: &[u8]) -> Answer {
        let (found, owner) = match inode {
            Some(Inode::Root) => {
                let slot = tree::slot(name).ok_or(libc::ENOENT)?;
                (Inode::Container(slot), self.container(slot)?.owner)
            }
            Some(Inode::Container(slot)) => {
                let node = tree::node(name).ok_or(libc::ENOENT)?;
                (Inode::Node(slot, node), self.container(slot)?.owner)
            }
            Some(Inode::Node(..)) => return Err(libc::ENOTDIR),
            None => return Err(libc::ENOENT),
        };
        Ok(Body::entry(found.number(), found.attributes(owner), found.is_lasting()))
    }

    fn attributes(&self, inode: Option<Inode>) -> Answer {
        let inode = inode.ok_or(libc::ENOENT)?;
        let owner = match inode {
            Inode::Root => 0,
            Inode::Container(slot) | Inode::Node(slot, _) => self.container(slot)?.owner,
        };
        Ok(Body::attribute(inode.number(), inode.attributes(owner), inode.is_lasting()))
    }

    fn open(&self, inode: Option<Inode>, flags: u32) -> Answer {
        let (container, node) = self.node(inode)?;
        let reads = flags.cast_signed() & libc::O_ACCMODE == libc::O_RDONLY;
        // Root of the container may open it for writing whatever the mode says; an error of open(2) is clearer than one
        // of write(2).
        if !reads && matches!(node.source, Source::Generated(_)) {
            return Err(libc::EACCES);
        }
        // crun makes /proc/sys read-only with a bind that does not reach the files mounted there.
        if !reads && container.read_only {
            return Err(libc::EROFS);
        }
        Ok(Body::open(self.handles.fetch_add(1, Ordering::Relaxed)))
    }

    fn read(&self, inode: Option<Inode>, read: Read, thread: u32) -> Answer {
        let (container, node) = self.node(inode)?;
        // sendfile(2) and splice(2) fill the page cache and would show old contents. With EINVAL programs read instead.
        if !read.direct {
            return Err(libc::EINVAL);
        }
        // Not held between reads either: the kernel's file has the same races.
        if node.source == Source::Hostname {
            let caller = Caller { container: &container, thread };
            return caller.read(node, read.offset, read.size as usize).map(Body).map_err(|error| errno(&error));
        }
        // A read from the start is a new look at the file, as programs do that keep it open and rewind.
        let known = if read.offset == 0 { None } else { self.snapshots().get(&read.handle).cloned() };
        let contents = match known {
            Some(contents) => contents,
            None => self.contents(&container, node).map_err(|error| errno(&error))?.into(),
        };
        let offset = usize::try_from(read.offset).unwrap_or(usize::MAX).min(contents.len());
        // The size is a program's and may be longer than what is left.
        let part = contents.as_bytes()[offset..].get(..read.size as usize).unwrap_or(&contents.as_bytes()[offset..]);
        let body = Body(part.to_vec());
        // Most readers take all at once, and nothing is held for them. `Release` drops what is held; the handles of an
        // earlier server are simply not found.
        if offset == 0 && part.len() < contents.len() {
            let mut snapshots = self.snapshots();
            if snapshots.len() < MAX_SNAPSHOTS || snapshots.contains_key(&read.handle) {
                snapshots.insert(read.handle, contents);
            }
        }
        Ok(body)
    }

    fn contents(&self, container: &Container, node: &Node) -> io::Result<String> {
        match node.source {
            Source::Generated(file) => generated::generate(file, container, &self.loads),
            Source::Sysctl(_) => self.sysctls.get(container.slot, node).map(|text| text + "\n"),
            // Read in the caller's namespace, by `read`.
            Source::Hostname => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn write(&self, inode: Option<Inode>, offset: u64, data: &[u8], thread: u32) -> Answer {
        let (container, node) = self.node(inode)?;
        let written = match node.source {
            Source::Generated(_) => return Err(libc::EACCES),
            Source::Hostname => Caller { container: &container, thread }.write(node, offset, data),
            // A value comes with one write(2): a second part, at an offset, would be judged as a value of its own.
            Source::Sysctl(_) if offset != 0 => return Err(libc::EINVAL),
            Source::Sysctl(rule) => self.sysctls.set(container.slot, node, rule, data).map(|()| data.len()),
        };
        written.map(|length| Body::written(length as u32)).map_err(|error| errno(&error))
    }

    fn list(&self, inode: Option<Inode>, read: Read) -> Answer {
        let entries: Vec<(Inode, String)> = match inode {
            Some(Inode::Root) => {
                let mut slots: Vec<_> = self.registry.all().into_iter().map(|one| one.slot).collect();
                slots.sort_unstable();
                slots.into_iter().map(|slot| (Inode::Container(slot), slot.to_string())).collect()
            }
            Some(Inode::Container(slot)) => {
                self.container(slot)?;
                crate::files::NODES.iter().map(|node| (Inode::Node(slot, node), node.file_name())).collect()
            }
            Some(Inode::Node(..)) => return Err(libc::ENOTDIR),
            None => return Err(libc::ENOENT),
        };
        // The offset of an entry is the number of those before it. Containers that come and go between two parts of a
        // listing may be missed in it; nothing depends on a listing of the top directory.
        let first = usize::try_from(read.offset).unwrap_or(usize::MAX);
        let mut body = Body::default();
        let size = (read.size as usize).min(request::BUFFER);
        for (place, (inode, name)) in entries.iter().enumerate().skip(first) {
            let kind = (inode.attributes(0).mode & libc::S_IFMT) >> 12;
            if !body.directory_entry(inode.number(), place as u64 + 1, kind, name, size) {
                break;
            }
        }
        Ok(body)
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::request::testing, *};
    use crate::testing::container;

    struct Fixture {
        _dir: tempfile::TempDir,
        server: Server,
        slot: u64,
    }

    fn fixture() -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::open(dir.path()).unwrap();
        let slot = registry.enter(container("a")).unwrap();
        Fixture { _dir: dir, server: Server::new(registry, 0), slot }
    }

    impl Fixture {
        fn node(&self, path: &str) -> u64 {
            let node = crate::files::NODES.iter().find(|node| node.path == path).unwrap();
            Inode::Node(self.slot, node).number()
        }

        fn ask(&self, node: u64, operation: Operation<'_>) -> Answer {
            self.server.answer(&Request { unique: 1, node, pid: 1, operation }).unwrap()
        }

        fn read(&self, node: u64, offset: u64, size: u32) -> String {
            let read = Operation::Read(Read { handle: 5, offset, size, direct: true });
            String::from_utf8(self.ask(node, read).unwrap().0).unwrap()
        }
    }

    #[test]
    fn a_value_is_read_back_as_it_was_written() {
        let fixture = fixture();
        let node = fixture.node("/proc/sys/kernel/panic");
        let written = fixture.ask(node, Operation::Write { offset: 0, data: b"42\n" });
        assert_eq!(written, Ok(Body::written(3)));
        assert_eq!(fixture.read(node, 0, 4096), "42\n");
        assert_eq!(fixture.read(node, 3, 4096), "");
        assert_eq!(fixture.ask(node, Operation::Write { offset: 0, data: b"x" }), Err(libc::EINVAL));
        assert_eq!(fixture.ask(node, Operation::Write { offset: 1, data: b"1" }), Err(libc::EINVAL));
    }

    #[test]
    fn what_is_generated_is_not_opened_for_writing() {
        let fixture = fixture();
        let node = fixture.node("/proc/uptime");
        assert_eq!(fixture.ask(node, Operation::Open { flags: libc::O_RDWR.cast_unsigned() }), Err(libc::EACCES));
        assert!(fixture.ask(node, Operation::Open { flags: 0 }).is_ok());
        assert_eq!(fixture.ask(node, Operation::Write { offset: 0, data: b"1" }), Err(libc::EACCES));
    }

    #[test]
    fn a_container_whose_sysctls_are_read_only_can_not_open_them_for_writing() {
        let fixture = fixture();
        let slot = fixture.server.registry.enter(Container { read_only: true, ..container("b") }).unwrap();
        let node = Inode::Node(slot, tree::node(b"proc+sys+kernel+panic").unwrap()).number();
        for flags in [libc::O_WRONLY, libc::O_RDWR | libc::O_TRUNC] {
            let flags = flags.cast_unsigned();
            assert_eq!(fixture.ask(node, Operation::Open { flags }), Err(libc::EROFS));
        }
        assert!(fixture.ask(node, Operation::Open { flags: 0 }).is_ok());
    }

    #[test]
    fn small_reads_get_parts_of_one_content() {
        let fixture = fixture();
        let node = fixture.node("/proc/uptime");
        let mut text = fixture.read(node, 0, 3);
        std::thread::sleep(std::time::Duration::from_millis(30));
        text += &fixture.read(node, 3, 100);
        let words: Vec<_> = text.split_ascii_whitespace().collect();
        assert_eq!(words[0], words[1]);
        assert_eq!(fixture.server.snapshots().len(), 1);
        fixture.ask(node, Operation::Release { handle: 5 }).unwrap();
        assert_eq!(fixture.server.snapshots().len(), 0);
    }

    #[test]
    fn nothing_comes_out_of_the_kernels_cache() {
        let fixture = fixture();
        let read = Operation::Read(Read { handle: 5, offset: 0, size: 4096, direct: false });
        assert_eq!(fixture.ask(fixture.node("/proc/uptime"), read), Err(libc::EINVAL));
    }

    #[test]
    fn names_are_for_those_in_the_container_and_never_those_of_the_vm() {
        let fixture = fixture();
        let node = fixture.node("/proc/sys/kernel/hostname");
        let read = Operation::Read(Read { handle: 5, offset: 0, size: 4096, direct: true });
        let write = Operation::Write { offset: 0, data: b"x" };
        // This process has the VM's name, 0 stands for a thread that is not visible, and no thread has the last number.
        for (pid, errno) in [(std::process::id(), libc::EPERM), (0, libc::EIO), (u32::MAX, libc::EIO)] {
            for operation in [&read, &write] {
                let request = Request { unique: 1, node, pid, operation: operation.clone() };
                assert_eq!(fixture.server.answer(&request).unwrap(), Err(errno), "{pid}");
            }
        }
    }

    #[test]
    fn nothing_is_there_for_a_container_that_is_gone() {
        let fixture = fixture();
        let node = fixture.node("/proc/uptime");
        fixture.server.registry.remove(fixture.slot);
        assert_eq!(fixture.ask(node, Operation::GetAttributes), Err(libc::ENOENT));
        assert_eq!(fixture.ask(1, Operation::Lookup(b"1")), Err(libc::ENOENT));
        assert_eq!(fixture.ask(node, Operation::Open { flags: 0 }), Err(libc::ENOENT));
    }

    #[test]
    fn a_directory_is_listed_in_parts_without_gap_or_overlap() {
        let fixture = fixture();
        let directory = Inode::Container(fixture.slot).number();
        let (mut offset, mut seen) = (0, 0);
        loop {
            let read = Operation::ReadDirectory(Read { handle: 0, offset, size: 100, direct: false });
            let body = fixture.ask(directory, read).unwrap().0;
            let mut rest = &body[..];
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                offset = u64::from_ne_bytes(rest[8..16].try_into().unwrap());
                let length = u32::from_ne_bytes(rest[16..20].try_into().unwrap()) as usize;
                rest = &rest[24 + length.next_multiple_of(8)..];
                seen += 1;
                assert_eq!(offset, seen);
            }
        }
        assert_eq!(seen, crate::files::NODES.len() as u64);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn whatever_is_asked_is_answered_without_a_panic(
            opcode in 0_u32..50,
            node in prop_oneof![0_u64..3, 256_u64..300, any::<u64>()],
            body in proptest::collection::vec(any::<u8>(), 0..120),
        ) {
            let fixture = fixture();
            // No test may raise a value of the machine that runs it.
            prop_assume!(opcode != 16);
            let bytes = testing::bytes(opcode, node, &body);
            if let Some(request) = request::parse(&bytes)
                && let Some(Ok(body)) = fixture.server.answer(&request)
            {
                prop_assert!(body.0.len() <= 512 * 1024);
            }
        }
    }
}
