//! The engine that most tests share.

use std::{
    io::Write,
    path::PathBuf,
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
    On,
    Off,
    /// The test does not care.
    Either,
}

/// What containers have to be there.
const SLEEPER: &str = "sleeper";

static HOME: OnceLock<Home> = OnceLock::new();
static TURN: Mutex<()> = Mutex::new(());

/// The home of the shared engine, whatever its state.
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
        Home::new()
    })
}

/// After the last test, also when tests failed.
extern "C" fn clean_up() {
    if let Some(home) = HOME.get() {
        let mut stop = home.command(program());
        let _ = stop.args(["stop", "--force"]).output();
        home.remove();
    }
}

/// The shared engine; one test at a time has it.
pub struct Engine {
    pub home: &'static Home,
    _turn: MutexGuard<'static, ()>,
}

/// The shared engine, running with isolation on or off and with the image `alpine`.
#[track_caller]
pub fn engine(isolation: Isolation) -> Engine {
    // A test that failed does not keep the next from trying.
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let engine = Engine { home: home(), _turn: turn };
    let mut status = if engine.home.path("state/bulkhead").exists() { engine.home.status() } else { Value::Null };
    let fits = |status: &Value| match isolation {
        Isolation::Either => true,
        _ => status["vm"]["enhancedContainerIsolation"] == (isolation == Isolation::On),
    };
    if status["state"] != "running" || !fits(&status) {
        engine.set(isolation);
        if status["state"] == "running" {
            engine.restart();
        } else {
            engine.start();
        }
        status = engine.home.status();
    }
    assert!(status["state"] == "running" && fits(&status), "{status}");
    if engine.get("/images/alpine:latest/json").0 != 200 {
        let tar = images().join("alpine.tar");
        engine.docker(&["load", "--quiet", "--input", tar.to_str().unwrap()]).ok();
    }
    engine
}

/// The folder of the test images.
pub fn images() -> PathBuf {
    std::env::var_os("BULKHEAD_TEST_IMAGES").expect("BULKHEAD_TEST_IMAGES names the folder with alpine.tar").into()
}

impl Engine {
    /// `bulkhead start` of an engine that does not run; returns when it answers.
    #[track_caller]
    pub fn start(&self) {
        let printed = self.home.bulkhead(&["start", "--timeout", "220"], START).ok();
        assert!(printed.contains("the engine is ready"), "{printed}");
        self.home.status();
    }

    #[track_caller]
    pub fn restart(&self) {
        let printed = self.home.bulkhead(&["restart", "--timeout", "220"], START).ok();
        assert!(printed.contains("the engine is ready again"), "{printed}");
    }

    /// Changes the setting; a restart makes it count.
    #[track_caller]
    pub fn set(&self, isolation: Isolation) {
        let value = if isolation == Isolation::Off { "false" } else { "true" };
        self.home.bulkhead(&["settings", "set", "enhancedContainerIsolation", value], COMMAND).ok();
    }

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
            // Who asked for `--rm` may have been quicker.
            assert!(matches!(status, 204 | 404 | 409), "{status} {body}");
        }
    }

    /// The name of a container that runs and does nothing.
    #[track_caller]
    pub fn sleeper(&self) -> &'static str {
        let (_, body) = self.get(&format!("/containers/{SLEEPER}/json"));
        let running = serde_json::from_str::<Value>(&body).is_ok_and(|it| it["State"]["Running"] == true);
        if !running {
            self.docker(&["rm", "--force", SLEEPER]);
            // As process 1 sleep would not end by SIGTERM, and each stop would take its whole time.
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

    /// What [`Engine::write_durably`] wrote.
    #[track_caller]
    pub fn read_back(&self, volume: &str) -> String {
        self.docker(&["run", "--rm", "-v", &format!("{volume}:/v"), "alpine", "cat", "/v/file"]).ok()
    }

    /// Whether a request through `docker.sock` is answered by the engine.
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

/// Writes bytes that are a function of their place, `length` of them.
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

/// A stream of bytes that no reordering, loss or repetition leaves as it is.
pub struct Pattern(u64);

impl Default for Pattern {
    fn default() -> Self {
        Self(0x9E37_79B9_7F4A_7C15)
    }
}

impl Pattern {
    pub const BLOCK: usize = 64 * 1024;

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
