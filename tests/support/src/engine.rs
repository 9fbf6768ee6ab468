//! The engine that the tests of a suite share.
//!
//! A boot costs half a minute in the emulated machine, more than most tests, so a test asks for an engine that runs
//! with certain settings, and the engine restarts only when it runs with others. Tests run in the order of their names,
//! which is why those that need the same settings have names beside each other.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs,
    io::Write,
    path::PathBuf,
    process::Command,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use serde_json::Value;

use crate::{
    client,
    home::Home,
    process::{COMMAND, Ran, run},
    program,
};

/// Time for a start; the emulated machine needs half a minute.
pub const START: Duration = Duration::from_secs(240);

/// Time for a stop, containers included.
pub const STOP: Duration = Duration::from_secs(120);

/// Enhanced Container Isolation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// On, with no other setting.
    On,
    /// Off, with no other setting.
    Off,
    /// The test holds for any settings.
    Either,
}

/// The setting behind [`Isolation`].
pub const ISOLATION: &str = "enhancedContainerIsolation";

/// Name of the container that only runs.
const SLEEPER: &str = "sleeper";

static HOME: OnceLock<Home> = OnceLock::new();
static TURN: Mutex<()> = Mutex::new(());

/// The settings as they are in the home, and those that the engine was last started with.
static SETTINGS: Mutex<[BTreeMap<String, String>; 2]> = Mutex::new([BTreeMap::new(), BTreeMap::new()]);

fn lock_settings() -> MutexGuard<'static, [BTreeMap<String, String>; 2]> {
    SETTINGS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The home of the shared engine, in any state.
pub fn home() -> &'static Home {
    HOME.get_or_init(|| {
        std::panic::set_hook(Box::new({
            let usual = std::panic::take_hook();
            move |info| {
                usual(info);
                if let Some(home) = HOME.get() {
                    eprintln!("{}", home.autopsy());
                }
            }
        }));
        // SAFETY: the function takes nothing, returns nothing and does not unwind.
        unsafe { libc::atexit(clean_up) };
        let home = Home::new();
        if let Some(disk) = std::env::var_os("BULKHEAD_TEST_DISK").filter(|disk| !disk.is_empty()) {
            unpack_disk(&home, &disk);
        }
        if let Some(cpus) = std::env::var("BULKHEAD_TEST_CPUS").ok().filter(|cpus| !cpus.is_empty()) {
            home.bulkhead(&["settings", "set", "cpus", &cpus], COMMAND).ok();
        }
        home
    })
}

/// Gives the profile a data disk that has the suite's images on it, see tests/disk/build.
fn unpack_disk(home: &Home, disk: &OsStr) {
    let directory = home.path("data/bulkhead/default");
    fs::create_dir_all(&directory).unwrap();
    let mut tar = Command::new("tar");
    tar.args(["--sparse", "--no-same-owner", "-xf"]).arg(disk).arg("-C").arg(directory);
    run(tar, COMMAND * 2).ok();
}

/// Runs after the last test, also when tests failed.
extern "C" fn clean_up() {
    if let Some(home) = HOME.get() {
        let mut stop = home.command(program());
        let _ = stop.args(["stop", "--force"]).output();
        home.remove();
    }
}

/// The shared engine; one test at a time has it.
pub struct Engine {
    /// The home that it runs in.
    pub home: &'static Home,
    _turn: MutexGuard<'static, ()>,
}

/// The shared engine as the last test left it.
pub fn turn() -> Engine {
    let failed = TURN.is_poisoned();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let engine = Engine { home: home(), _turn: turn };
    if failed {
        // A test that failed does not keep the next from trying. Its engine may hang, and would fail every test after
        // it: the next one starts another, on the same disk.
        TURN.clear_poison();
        if engine.status()["state"] == "running" {
            engine.home.bulkhead(&["stop", "--force"], COMMAND).ok();
        }
    }
    engine
}

/// The shared engine, running with isolation on or off and with the image `alpine`.
#[track_caller]
pub fn engine(isolation: Isolation) -> Engine {
    match isolation {
        Isolation::On => engine_with(&[(ISOLATION, "true")]),
        Isolation::Off => engine_with(&[(ISOLATION, "false")]),
        Isolation::Either => {
            let engine = turn();
            if engine.status()["state"] != "running" {
                engine.start();
            }
            engine.need_image("alpine:latest", "alpine.tar");
            engine
        }
    }
}

/// The shared engine, running with exactly these settings and with the image `alpine`.
#[track_caller]
pub fn engine_with(settings: &[(&str, &str)]) -> Engine {
    let engine = turn();
    engine.run_with(settings);
    engine.need_image("alpine:latest", "alpine.tar");
    engine
}

/// The directory of the test images.
pub fn images() -> PathBuf {
    std::env::var_os("BULKHEAD_TEST_IMAGES").expect("BULKHEAD_TEST_IMAGES names the directory with alpine.tar").into()
}

impl Engine {
    /// The status, or null before the first start: `bulkhead status` would make the profile.
    #[track_caller]
    fn status(&self) -> Value {
        if self.home.path("state/bulkhead").exists() { self.home.status() } else { Value::Null }
    }

    /// Restarts or starts the engine unless it runs with these settings.
    #[track_caller]
    pub fn run_with(&self, settings: &[(&str, &str)]) {
        self.write_settings(settings);
        let fits = {
            let [written, in_force] = &*lock_settings();
            written == in_force
        };
        let mut status = self.status();
        if status["state"] != "running" || !fits {
            if status["state"] == "running" {
                self.restart();
            } else {
                self.start();
            }
            status = self.home.status();
        }
        let isolation = settings.iter().find(|(key, _)| *key == ISOLATION).is_none_or(|(_, value)| *value == "true");
        assert!(status["state"] == "running" && status["vm"][ISOLATION] == isolation, "{status}");
    }

    /// `bulkhead start` of an engine that does not run; returns when it answers.
    #[track_caller]
    pub fn start(&self) {
        let printed = self.home.bulkhead(&["start", "--timeout", "220"], START).ok();
        assert!(printed.contains("the engine is ready"), "{printed}");
        self.note_start();
        self.home.status();
    }

    /// `bulkhead restart`; returns when the engine answers.
    #[track_caller]
    pub fn restart(&self) {
        let printed = self.home.bulkhead(&["restart", "--timeout", "220"], START).ok();
        assert!(printed.contains("the engine is ready again"), "{printed}");
        self.note_start();
    }

    /// Notes that the engine was started with the settings as they are, by other means than [`Engine::start`] and
    /// [`Engine::restart`].
    pub fn note_start(&self) {
        let [written, in_force] = &mut *lock_settings();
        in_force.clone_from(written);
    }

    /// Makes these the only settings; a restart puts them into force.
    #[track_caller]
    pub fn write_settings(&self, settings: &[(&str, &str)]) {
        let wanted: BTreeMap<_, _> =
            settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let [written, _] = &mut *lock_settings();
        for key in written.keys().filter(|key| !wanted.contains_key(*key)) {
            self.home.bulkhead(&["settings", "unset", key], COMMAND).ok();
        }
        for (key, value) in wanted.iter().filter(|(key, value)| written.get(*key) != Some(value)) {
            self.home.bulkhead(&["settings", "set", key, value], COMMAND).ok();
        }
        *written = wanted;
    }

    /// Loads an image of `tests/images` unless it is there.
    #[track_caller]
    pub fn need_image(&self, name: &str, file: &str) {
        if self.get(&format!("/images/{name}/json")).0 != 200 {
            let tar = images().join(file);
            // The largest have 200 MB, which cross the emulated machine slowly.
            run(self.home.docker_command(&["load", "--quiet", "--input", tar.to_str().unwrap()]), COMMAND * 5).ok();
        }
    }

    /// A docker command.
    #[track_caller]
    pub fn docker(&self, arguments: &[&str]) -> Ran {
        self.home.docker(arguments)
    }

    /// A docker command with standard input.
    #[track_caller]
    pub fn docker_with(&self, arguments: &[&str], input: &[u8]) -> Ran {
        crate::process::run_with(self.home.docker_command(arguments), input, COMMAND)
    }

    /// One request to the engine.
    #[track_caller]
    pub fn get(&self, path: &str) -> (u16, String) {
        client::ask(&self.home.docker_socket(), "GET", path).unwrap()
    }

    /// The ids of all containers.
    #[track_caller]
    pub fn containers(&self) -> Vec<String> {
        let (status, body) = self.get("/containers/json?all=1");
        assert_eq!(status, 200, "{body}");
        let containers: Vec<Value> = serde_json::from_str(&body).unwrap();
        containers.iter().map(|container| container["Id"].as_str().unwrap().to_owned()).collect()
    }

    /// Removes all containers.
    #[track_caller]
    pub fn remove_containers(&self) {
        for id in self.containers() {
            let path = format!("/containers/{id}?force=1");
            let (status, body) = client::ask(&self.home.docker_socket(), "DELETE", &path).unwrap();
            // With `--rm` the engine removes it, too, and may be first.
            assert!(matches!(status, 204 | 404 | 409), "{status} {body}");
        }
    }

    /// Name of a container that only runs; starts it where it does not.
    #[track_caller]
    pub fn sleeper(&self) -> &'static str {
        let (_, body) = self.get(&format!("/containers/{SLEEPER}/json"));
        let running = serde_json::from_str::<Value>(&body).is_ok_and(|it| it["State"]["Running"] == true);
        if !running {
            self.docker(&["rm", "--force", SLEEPER]);
            // As process 1 sleep would ignore SIGTERM, and each stop would last until its timeout.
            self.docker(&["run", "--detach", "--init", "--name", SLEEPER, "alpine", "sleep", "3600"]).ok();
        }
        SLEEPER
    }

    /// Writes to a volume and returns once it is on the disk.
    #[track_caller]
    pub fn write_durably(&self, volume: &str, text: &str) {
        let mount = format!("{volume}:/v");
        let arguments = ["run", "--rm", "-i", "-v", &mount, "alpine", "dd", "of=/v/file", "conv=fsync"];
        self.docker_with(&arguments, text.as_bytes()).ok();
    }

    /// Reads the text that [`Engine::write_durably`] wrote.
    #[track_caller]
    pub fn read_back(&self, volume: &str) -> String {
        self.docker(&["run", "--rm", "-v", &format!("{volume}:/v"), "alpine", "cat", "/v/file"]).ok()
    }

    /// Panics unless the engine answers through `docker.sock`.
    #[track_caller]
    pub fn assert_answers(&self) {
        assert_eq!(self.get("/_ping"), (200, "OK".into()));
    }
}

/// Runs a shell line with the engine's environment.
#[track_caller]
pub fn shell(home: &Home, line: &str, limit: Duration) -> Ran {
    let mut command = home.command("bash");
    command.args(["-ec", line]);
    run(command, limit)
}

/// Writes the first `length` bytes of the [`Pattern`].
pub fn write_pattern(output: &mut dyn Write, length: usize) -> std::io::Result<()> {
    let mut pattern = Pattern::default();
    let mut left = length;
    while left > 0 {
        let block = pattern.next_block();
        let part = block.len().min(left);
        output.write_all(&block[..part])?;
        left -= part;
    }
    Ok(())
}

/// A stream of bytes in which reordering, loss and repetition show: each block differs from all others.
pub struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Pattern {
    /// Bytes of a block.
    pub const BLOCK: usize = 64 * 1024;

    /// The next block of the stream.
    pub fn next_block(&mut self) -> Vec<u8> {
        let mut block = Vec::with_capacity(Self::BLOCK);
        while block.len() < Self::BLOCK {
            // xorshift64 (Marsaglia 2003).
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            block.extend(self.0.to_le_bytes());
        }
        block
    }
}
