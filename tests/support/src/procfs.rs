//! The service as init runs it: makes the mount, listens, holds the descriptors, and starts processes on them.

use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{fs::DirBuilderExt, net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
};

use bulkhead_guest_common::{
    namespace::Identity,
    process::Process,
    registry::{Container, Registry},
};
use bulkhead_procfs::{mount, seccomp_notify::KEPT_LISTENERS};

/// Mount point of fusectl.
const CONTROL: &str = "/sys/fs/fuse/connections";

/// The service, which ends with its owner.
pub struct Service {
    program: PathBuf,
    state: PathBuf,
    connection: OwnedFd,
    socket: UnixListener,
    /// Descriptors that one process has stored for the next, with their names.
    pub kept: Vec<(String, OwnedFd)>,
    /// The running process.
    pub process: Option<Child>,
}

impl Service {
    /// Starts `program` with its files in `state`, where the tree is mounted as well.
    pub fn new(program: &Path, state: &Path) -> Self {
        Registry::open(state).unwrap();
        let tree = tree(state);
        DirBuilder::new().recursive(true).mode(0o711).create(&tree).unwrap();
        mount::mount_control(Path::new(CONTROL)).unwrap();
        let connection = mount::mount(&tree).unwrap();
        let socket = UnixListener::bind(state.join("mounts")).unwrap();
        let (program, state) = (program.to_owned(), state.to_owned());
        let mut service = Self { program, state, connection, socket, kept: Vec::new(), process: None };
        service.start();
        service
    }

    /// Starts a process.
    pub fn start(&mut self) {
        let (connection, socket) = (self.connection.as_raw_fd(), self.socket.as_raw_fd());
        let kept = || self.kept.iter().map(|(name, descriptor)| (name, descriptor.as_raw_fd()));
        let numbers: Vec<RawFd> = kept().map(|(_, number)| number).chain([connection, socket]).collect();
        let names: Vec<_> = kept().map(|(name, number)| format!("{name}={number}")).collect();
        let mut command = Command::new(&self.program);
        command
            .args([format!("--device={connection}"), format!("--listener={socket}")])
            .arg(format!("--state={}", self.state.display()))
            .env(KEPT_LISTENERS, names.join(","));
        // SAFETY: between fork and exec this makes system calls that take plain integers.
        unsafe {
            command.pre_exec(move || {
                for number in &numbers {
                    if libc::fcntl(*number, libc::F_SETFD, 0) != 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        self.process = Some(command.spawn().unwrap());
    }

    /// Kills the running process.
    pub fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            let _ = process.kill();
            let _ = process.wait();
        }
    }

    /// Aborts the connection: all requests fail, pending and later ones.
    pub fn abort(&self) -> io::Result<()> {
        mount::abort(&tree(&self.state), Path::new(CONTROL))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.abort();
        self.kill();
    }
}

/// A container that lives as long as this process, in its user namespace.
pub fn container(id: &str) -> Container {
    Container {
        slot: 0,
        id: id.to_owned(),
        state_root: "/nowhere".into(),
        owner: 0,
        user_namespace: Identity::of(File::open("/proc/self/ns/user").unwrap()).unwrap(),
        cgroup: None,
        read_only: false,
        creator: Process::find(std::process::id()).unwrap(),
    }
}

/// Mount point of the tree.
fn tree(state: &Path) -> PathBuf {
    state.join("fs")
}
