//! XDG folders of their own, the program and a backend in them.

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;

/// XDG folders of their own for one test.
pub struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        let home = Self { folder: tempfile::Builder::new().prefix("bh").tempdir().unwrap() };
        for name in ["config", "data", "state", "cache", "run", "docker"] {
            fs::create_dir(home.path(name)).unwrap();
        }
        home
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn runtime(&self, name: &str) -> PathBuf {
        self.path("run/bulkhead/default").join(name)
    }

    /// A command with this home's environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("HOME", self.folder.path())
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("XDG_DATA_HOME", self.path("data"))
            .env("XDG_STATE_HOME", self.path("state"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .env("XDG_RUNTIME_DIR", self.path("run"))
            .env("DOCKER_CONFIG", self.path("docker"))
            .env_remove("DOCKER_HOST")
            .env_remove("DOCKER_CONTEXT")
            .env_remove("BULKHEAD_KERNEL")
            .env_remove("BULKHEAD_ROOTFS")
            .env_remove("BULKHEAD_TRY_ANY_KVM")
            .stdin(Stdio::null());
        command
    }

    pub fn bulkhead(&self, arguments: &[&str]) -> Output {
        self.command(program()).args(arguments).output().unwrap()
    }

    /// A backend in the foreground that listens.
    pub fn backend(&self) -> Backend {
        Self::listening(self.command(program()).arg("backend"))
    }

    /// The backend that a command becomes, once it listens.
    pub fn listening(command: &mut Command) -> Backend {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("{\"ready\":"), "{line}");
        Backend { child }
    }

    pub fn status(&self) -> Value {
        let output = self.bulkhead(&["status", "--format", "json"]);
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn control(&self) -> UnixStream {
        let stream = UnixStream::connect(self.runtime("control.sock")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends bytes and returns all that comes back.
    pub fn ask(&self, bytes: &[u8]) -> String {
        let mut stream = self.control();
        // A server that has seen enough may close before it has read all.
        let _ = stream.write_all(bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub fn post(&self, path: &str, body: &str) -> String {
        self.ask(
            format!(
                "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                body.len()
            )
            .as_bytes(),
        )
    }
}

pub fn program() -> &'static str {
    env!("CARGO_BIN_EXE_bulkhead")
}

/// Killed when a test ends before it was stopped.
pub struct Backend {
    pub child: Child,
}

impl Backend {
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the backend does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One line that begins with `error:`, and the exit status.
#[track_caller]
pub fn refused(output: &Output, code: i32) -> String {
    let message = String::from_utf8(output.stderr.clone()).unwrap();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(message.starts_with("error: ") && message.trim_end().lines().count() == 1, "{message}");
    message
}

pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
