//! `/proc/sys/kernel/hostname` and `domainname`: the kernel's own files, read and written in the caller's UTS
//! namespace.
//!
//! The kernel keeps the names in UTS namespaces, but lets only root of the VM write these files. This service is root
//! of the VM: it enters the UTS namespace of the calling thread, which is also the one that the kernel would use. In
//! this way a container inside of a container has a name of its own.
//!
//! The caller is known by the thread id in the request. It cannot end or change its namespace in the meantime, because
//! it waits for the reply: once a request was read from the device, not even a signal interrupts that wait
//! (`request_wait_answer` in `fs/fuse/dev.c`).
//!
//! Two checks remain. The namespace must be of the container, since an open file can be passed to another one. And
//! writing requires what sethostname(2) requires: by the file's mode alone, root of an inner container that shares its
//! name and has read-only sysctls could write it.

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

/// Size of a read, in bytes: more than `__NEW_UTS_LEN` and a newline.
const NAME_BUFFER: usize = 128;

/// Maximum length of a thread's status that is read, in bytes; up to 65536 groups make it long.
const MAX_STATUS: u64 = 1 << 20;

/// Stack of a thread that makes four system calls, in bytes.
const STACK_SIZE: usize = 64 * 1024;

/// The process that sent a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'a> {
    /// The container whose file it is.
    pub(crate) container: &'a Container,
    /// Thread id in the VM's pid namespace; 0 if it has none there.
    pub(crate) thread: u32,
}

impl Caller<'_> {
    /// Reads a part of a name's file.
    ///
    /// # Errors
    /// `EPERM` when the caller is not in the container, `EIO` when it cannot be found.
    pub(crate) fn read(self, node: &Node, offset: u64, size: usize) -> io::Result<Vec<u8>> {
        let mut buffer = [0; NAME_BUFFER];
        let room = &mut buffer[..size.min(NAME_BUFFER)];
        let length = at(&self.home()?, || File::open(node.path)?.read_at(room, offset))?;
        Ok(buffer[..length].to_vec())
    }

    /// Writes a part of a name, which the kernel cuts at a newline and at 64 bytes. Returns the number of bytes taken.
    ///
    /// # Errors
    /// As for reading, and `EPERM` when the caller may not call sethostname(2).
    pub(crate) fn write(self, node: &Node, offset: u64, data: &[u8]) -> io::Result<usize> {
        // Opened once, so that both checks and the write are about the same namespace.
        let home = self.home()?;
        if !self.administers(&home)? {
            return Err(refused());
        }
        at(&home, || File::options().write(true).open(node.path)?.write_at(data, offset))
    }

    /// The caller's UTS namespace, if it is the container's or one inside of it.
    fn home(self) -> io::Result<File> {
        let home = self.open("ns/uts")?;
        // The VM's own namespace is refused by itself, whatever the registry says about the container.
        let vm = Identity::of(File::open("/proc/self/ns/uts")?)?;
        let is_inside = || namespace::is_within(home.as_fd(), self.container.user_namespace);
        if Identity::of(&home)? != vm && is_inside()? { Ok(home) } else { Err(refused()) }
    }

    /// Returns whether the caller has `CAP_SYS_ADMIN` over the user namespace that owns its UTS namespace.
    fn administers(self, home: &File) -> io::Result<bool> {
        let text = bounded::read(self.open("status")?, MAX_STATUS)?;
        // Its capabilities are those in its own user namespace, so that one must be the owner or an ancestor of it.
        let has_capability = Status::read(&text).is_some_and(|status| status.has_sys_admin());
        Ok(has_capability && namespace::is_within(home.as_fd(), Identity::of(self.open("ns/user")?)?)?)
    }

    /// Opens a file in the caller's directory of procfs.
    fn open(self, name: &str) -> io::Result<File> {
        File::open(format!("/proc/{}/{name}", self.thread)).map_err(|_| io::Error::from_raw_os_error(libc::EIO))
    }
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}

/// Runs something in a new thread that enters a UTS namespace first. A worker's thread could not be sure to get back.
fn at<T: Send>(home: &File, run: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let enter_and_run = || {
        move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::HostNameAndNISDomainName))?;
        run()
    };
    thread::scope(|scope| {
        let thread =
            thread::Builder::new().name("name".into()).stack_size(STACK_SIZE).spawn_scoped(scope, enter_and_run)?;
        thread.join().map_err(|_| io::Error::from_raw_os_error(libc::EIO))?
    })
}
