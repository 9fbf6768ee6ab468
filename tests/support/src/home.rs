//! XDG directories of a test, and the processes that run in them.

use std::{
    collections::BTreeSet,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    time::Duration,
};

use nix::fcntl::{Flock, FlockArg};
use serde_json::Value;

use crate::{
    autopsy,
    process::{COMMAND, Ran, poll, run},
    program,
};

/// Lines of each log in the report of a failure.
const LOG_LINES: usize = 40;

/// XDG directories below one of the test's, so that nothing of the user's is read or written.
#[derive(Debug)]
pub struct Directories(PathBuf);

impl Directories {
    /// Makes the directories in `root`.
    pub fn make(root: PathBuf) -> Self {
        let directories = Self(root);
        for name in ["config", "data", "state", "cache", "run", "docker"] {
            fs::create_dir(directories.path(name)).unwrap();
        }
        directories
    }

    /// The directory above them.
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// Path of `name` below the root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Path of a socket or lock of the default profile.
    pub fn runtime(&self, name: &str) -> PathBuf {
        self.path("run/bulkhead/default").join(name)
    }

    /// A command that finds these directories in its environment. The cache stays the user's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("DOCKER_CONFIG", self.path("docker"));
        for variable in [
            "DOCKER_HOST",
            "DOCKER_CONTEXT",
            "SSH_AUTH_SOCK",
            "BULKHEAD_KERNEL",
            "BULKHEAD_ROOTFS",
            "BULKHEAD_TRY_ANY_KVM",
        ] {
            command.env_remove(variable);
        }
        command
    }
}

/// A user's directories and the engine in them. The cache stays the real one: the guest image is there.
pub struct Home {
    directories: Directories,
    /// Processes that a status named once; the program's own may no longer.
    pids: Mutex<BTreeSet<u32>>,
}

impl Default for Home {
    fn default() -> Self {
        Self::new()
    }
}

impl Home {
    /// New, empty directories.
    pub fn new() -> Self {
        // Not in /tmp, which often is memory; short, because of the sockets.
        let directory = tempfile::Builder::new().prefix("bh").tempdir_in("/var/tmp").unwrap().keep();
        Self { directories: Directories::make(directory), pids: Mutex::default() }
    }

    /// Path of `name` below the root.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directories.path(name)
    }

    /// Path of `name` in a directory beside the root, for what must not lie in the home.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directories.root().with_extension("beside").join(name)
    }

    /// Path of a socket or lock of the default profile.
    pub fn runtime(&self, name: &str) -> PathBuf {
        self.directories.runtime(name)
    }

    /// The engine's socket.
    pub fn docker_socket(&self) -> PathBuf {
        self.runtime("docker.sock")
    }

    /// The backend's socket.
    pub fn control_socket(&self) -> PathBuf {
        self.runtime("control.sock")
    }

    /// A command with this home's environment.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.directories.command(program)
    }

    /// Runs a verb of the program.
    #[track_caller]
    pub fn bulkhead(&self, arguments: &[&str], limit: Duration) -> Ran {
        let mut command = self.command(program());
        command.args(arguments);
        run(command, limit)
    }

    /// The docker command, through the context that Bulkhead made.
    pub fn docker_command(&self, arguments: &[&str]) -> Command {
        let mut command = self.command("docker");
        command.args(["--context", "bulkhead"]).args(arguments);
        command
    }

    /// Runs a docker command through that context.
    #[track_caller]
    pub fn docker(&self, arguments: &[&str]) -> Ran {
        run(self.docker_command(arguments), COMMAND)
    }

    /// `bulkhead status --format json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let text = self.bulkhead(&["status", "--format", "json"], COMMAND).ok();
        let status: Value = serde_json::from_str(&text).unwrap();
        let mut pids = self.pids.lock().unwrap();
        pids.extend(["backendPid", "vmmPid"].into_iter().filter_map(|key| pid(&status, key)));
        status
    }

    /// Processes of the program that still live: those that a status named and those whose environment names this home.
    pub fn processes(&self) -> Vec<u32> {
        let seen = self.pids.lock().unwrap();
        let name = Path::new(program()).file_name().unwrap().as_encoded_bytes();
        let mut ours = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            let read = |file: &str| fs::read(entry.path().join(file)).unwrap_or_default();
            let is_program = read("comm").trim_ascii_end() == name;
            let mentions = contains(&read("environ"), self.directories.root().as_os_str().as_encoded_bytes());
            if is_program && !is_zombie(&read("stat")) && (seen.contains(&pid) || mentions) {
                ours.push(pid);
            }
        }
        ours
    }

    /// Panics unless every process, socket, lock and docker context is gone. A backend that gave up its lock may need a
    /// moment to end.
    #[track_caller]
    pub fn assert_nothing_runs(&self) {
        let limit = Duration::from_secs(10);
        poll("the processes end", limit, || self.processes().is_empty().then_some(()));
        let runtime = fs::read_dir(self.path("run/bulkhead")).into_iter().flatten().flatten();
        let files: Vec<_> = runtime.map(|entry| entry.path()).collect();
        assert!(files.is_empty(), "left in the runtime directory: {files:?}");
        let contexts = fs::read_dir(self.path("docker/contexts/meta")).into_iter().flatten();
        assert_eq!(contexts.count(), 0, "a docker context is left");
        // A backend holds a lock on the directory of the data disk.
        if let Ok(directory) = fs::File::open(self.path("data/bulkhead/default")) {
            assert!(Flock::lock(directory, FlockArg::LockExclusiveNonblock).is_ok(), "the data's lock is held");
        }
        assert_eq!(self.status()["state"], "stopped");
    }

    /// The ends of both logs.
    pub fn logs(&self) -> String {
        let directory = self.path("state/bulkhead");
        let mut text = String::new();
        for profile in fs::read_dir(directory).into_iter().flatten().flatten() {
            for name in ["console.log", "backend.log"] {
                let path = profile.path().join(name);
                let lines = bulkhead::backend::logs::tail(&path, LOG_LINES).unwrap_or_default();
                text.extend(["--- ", &path.display().to_string(), "\n", &lines.join("\n"), "\n"]);
            }
        }
        text
    }

    /// The report of a failure: the logs, and the processes that may hang.
    pub fn autopsy(&self) -> String {
        let processes = self.processes();
        if processes.is_empty() {
            return self.logs();
        }
        self.logs() + &autopsy::report(&processes, &self.docker_socket(), &self.control_socket())
    }

    /// Removes the directories.
    pub fn remove(&self) {
        for directory in [self.directories.root(), &self.beside("")] {
            let _ = fs::remove_dir_all(directory);
        }
    }
}

/// A process id in a status.
pub fn pid(status: &Value, key: &str) -> Option<u32> {
    status[key].as_u64().and_then(|pid| pid.try_into().ok())
}

/// Returns whether the process runs; a zombie does not.
pub fn is_alive(pid: u32) -> bool {
    fs::read(format!("/proc/{pid}/stat")).is_ok_and(|stat| !is_zombie(&stat))
}

/// The state follows the name, which is in brackets and may have any byte in it (proc(5)).
fn is_zombie(stat: &[u8]) -> bool {
    let end = stat.iter().rposition(|byte| *byte == b')');
    end.is_none_or(|end| stat.get(end + 2).is_none_or(|state| matches!(state, b'Z' | b'X')))
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// A superblock that passes the checks of `bulkhead start` (`fs/erofs/erofs_fs.h`), and garbage behind it.
pub fn empty_erofs() -> Vec<u8> {
    let mut image = vec![0xA5; 1 << 20];
    image[1024..1152].fill(0);
    image[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
    image[1024 + 12] = 12;
    image
}

/// A home of one test: its processes end and its directories go when it is dropped.
pub struct OwnHome(pub Home);

impl std::ops::Deref for OwnHome {
    type Target = Home;

    fn deref(&self) -> &Home {
        &self.0
    }
}

impl Drop for OwnHome {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.autopsy());
        }
        let profiles = fs::read_dir(self.path("state/bulkhead")).into_iter().flatten().flatten();
        for profile in profiles.filter_map(|entry| entry.file_name().into_string().ok()) {
            let mut stop = self.command(program());
            let _ = stop.args(["--profile", &profile, "stop", "--force"]).output();
        }
        self.remove();
    }
}
