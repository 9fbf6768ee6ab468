//! The warden, as init starts it.

use std::{
    fs::{self, DirBuilder},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::DirBuilderExt, net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
};

use bulkhead_warden::{mount, registry, traps};

/// The kernel's files about FUSE connections.
const CONTROL: &str = "/sys/fs/fuse/connections";

/// A warden that ends with its owner.
pub struct Warden {
    process: Child,
    /// What it serves, and where crun asks it to answer mounts; open here as init has them.
    _connection: OwnedFd,
    _socket: UnixListener,
}

impl Warden {
    /// Mounts the tree and starts `program`.
    pub fn start(program: &Path) -> Self {
        mount::mount_control(Path::new(CONTROL)).unwrap();
        DirBuilder::new().recursive(true).mode(0o711).create(registry::TREE).unwrap();
        let connection = mount::mount(Path::new(registry::TREE)).unwrap();
        let socket = UnixListener::bind(traps::SOCKET).unwrap();
        let descriptors = [connection.as_raw_fd(), socket.as_raw_fd()];
        let mut command = Command::new(program);
        command.args([format!("--device={}", descriptors[0]), format!("--listener={}", descriptors[1])]);
        // SAFETY: between fork and exec this makes system calls that take plain integers.
        unsafe {
            command.pre_exec(move || {
                for descriptor in descriptors {
                    if libc::fcntl(descriptor, libc::F_SETFD, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        Self { process: command.spawn().unwrap(), _connection: connection, _socket: socket }
    }

    /// Containers that it knows.
    pub fn entries() -> usize {
        let files = fs::read_dir(PathBuf::from(registry::STATE).join("containers")).into_iter().flatten().flatten();
        files.filter(|file| file.path().extension().is_some_and(|it| it == "json")).count()
    }

    /// Containers and `exec` sessions whose mounts it answers.
    pub fn listeners(&self) -> usize {
        let links = fs::read_dir(format!("/proc/{}/fd", self.process.id())).into_iter().flatten().flatten();
        let links = links.filter_map(|link| fs::read_link(link.path()).ok());
        links.filter(|link| link.to_string_lossy() == "anon_inode:seccomp notify").count()
    }

    /// Its memory in KiB.
    pub fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }
}

impl Drop for Warden {
    fn drop(&mut self) {
        let _ = mount::abort(Path::new(registry::TREE), Path::new(CONTROL));
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
