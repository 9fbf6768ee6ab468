//! The warden, as init starts it.

use std::{
    fs::{self, DirBuilder},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{fs::DirBuilderExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
};

use bulkhead_warden::{mount, registry};

/// The kernel's files about FUSE connections.
const CONTROL: &str = "/sys/fs/fuse/connections";

/// A warden that ends with its owner.
pub struct Warden {
    process: Child,
    /// What it serves; open here as init has it.
    _connection: OwnedFd,
}

impl Warden {
    /// Mounts the tree and starts `program`.
    pub fn start(program: &Path) -> Self {
        mount::mount_control(Path::new(CONTROL)).unwrap();
        DirBuilder::new().recursive(true).mode(0o711).create(registry::TREE).unwrap();
        let connection = mount::mount(Path::new(registry::TREE)).unwrap();
        let device = connection.as_raw_fd();
        let mut command = Command::new(program);
        command.arg(format!("--device={device}"));
        // SAFETY: between fork and exec this makes one system call that takes plain integers.
        unsafe {
            command.pre_exec(move || match libc::fcntl(device, libc::F_SETFD, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            });
        }
        Self { process: command.spawn().unwrap(), _connection: connection }
    }

    /// Containers that it knows.
    pub fn entries() -> usize {
        let files = fs::read_dir(PathBuf::from(registry::STATE).join("containers")).into_iter().flatten().flatten();
        files.filter(|file| file.path().extension().is_some_and(|it| it == "json")).count()
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
