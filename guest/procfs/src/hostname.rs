//! `/proc/sys/kernel/hostname` and `domainname`: the kernel's own files, read and written where the one who asks is.
//!
//! The kernel keeps the names in UTS namespaces but lets only the VM's root write these files. The warden is that root:
//! it enters the UTS namespace of the thread that asks, as the kernel takes that thread's, too. A container inside of a
//! container has a name of its own in this way.
//!
//! The thread can't end or change its namespace meanwhile: it waits for the answer, and the kernel lets not even a signal
//! take it out of that once a request was read (`request_wait_answer` in `fs/fuse/dev.c`). Where it is must still be in
//! the container: an open file may have been handed to somebody else. To write takes what sethostname(2) takes; the mode
//! of the file alone would let those do it whom an inner engine has given read-only sysctls and a name to share.

use std::{
    fs::File,
    io,
    os::{fd::AsFd, unix::fs::FileExt},
    thread,
};

use bulkhead_guest_common::{
    bounded,
    namespace::{self, Identity},
    process::Status,
    registry::Container,
};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::files::Node;

/// Longer than a name and the line's end.
const ROOM: usize = 128;

/// Longest text about a thread that is read, in bytes; most of it are groups.
const MAX_STATUS: u64 = 1 << 20;

/// Enough for a thread that makes four system calls.
const STACK: usize = 64 * 1024;

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'a> {
    /// The container whose file it is.
    pub(crate) container: &'a Container,
    /// The thread, as the VM numbers it; 0 for one that it can't see.
    pub(crate) thread: u32,
}

impl Caller<'_> {
    /// Reads a part of a name's file.
    ///
    /// # Errors
    /// `EPERM` for one who is not in the container, `EIO` for one who can't be found.
    pub(crate) fn read(self, node: &Node, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut buffer = [0; ROOM];
        let room = &mut buffer[..size.min(ROOM)];
        let length = at(&self.home()?, || File::open(node.path)?.read_at(room, offset))?;
        Ok(buffer[..length].to_vec())
    }

    /// Writes a part of a name, which the kernel cuts at a line's end and at 64 bytes; returns how much it took.
    ///
    /// # Errors
    /// As for reading, and `EPERM` for one who may not call sethostname(2).
    pub(crate) fn write(self, node: &Node, offset: u64, data: &[u8]) -> io::Result<usize> {
        let home = self.home()?;
        if !self.administers(&home)? {
            return Err(refused());
        }
        at(&home, || File::options().write(true).open(node.path)?.write_at(data, offset))
    }

    /// The caller's UTS namespace, if it is of the container.
    fn home(self) -> io::Result<File> {
        let home = self.open("ns/uts")?;
        let vm = Identity::of(File::open("/proc/self/ns/uts")?)?;
        let is_inside = || namespace::is_within(home.as_fd(), self.container.user_namespace);
        if Identity::of(&home)? != vm && is_inside()? { Ok(home) } else { Err(refused()) }
    }

    /// Whether the caller has `CAP_SYS_ADMIN` where a namespace belongs.
    fn administers(self, home: &File) -> io::Result<bool> {
        let text = bounded::read(self.open("status")?, MAX_STATUS)?;
        let has_capability = Status::read(&text).is_some_and(|status| status.is_administrator());
        Ok(has_capability && namespace::is_within(home.as_fd(), Identity::of(self.open("ns/user")?)?)?)
    }

    /// A file about the caller.
    fn open(self, name: &str) -> io::Result<File> {
        File::open(format!("/proc/{}/{name}", self.thread)).map_err(|_| io::Error::from_raw_os_error(libc::EIO))
    }
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}

/// Runs something in a thread that has entered a UTS namespace and ends after it.
fn at<T: Send>(home: &File, run: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let enter_and_run = || {
        move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::HostNameAndNISDomainName))?;
        run()
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name("name".into()).stack_size(STACK).spawn_scoped(scope, enter_and_run)?;
        thread.join().map_err(|_| io::Error::from_raw_os_error(libc::EIO))?
    })
}
