//! The program and a backend in XDG directories of a test.

use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Output, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value;
use support::{home::Directories, program};

/// XDG directories of one test.
pub struct Home {
    directories: Directories,
    /// Removes them when it is dropped.
    _root: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        let root = tempfile::Builder::new().prefix("bh").tempdir().unwrap();
        Self { directories: Directories::make(root.path().to_owned()), _root: root }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directories.path(name)
    }

    pub fn runtime(&self, name: &str) -> PathBuf {
        self.directories.runtime(name)
    }

    /// A command with this home's environment, in which there is no guest image.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = self.directories.command(program);
        command.env("HOME", self.directories.root()).env("XDG_CACHE_HOME", self.path("cache")).stdin(Stdio::null());
        command
    }

    pub fn bulkhead(&self, arguments: &[&str]) -> Output {
        self.command(program()).args(arguments).output().unwrap()
    }

    /// Starts a backend in the foreground and returns once it listens.
    pub fn backend(&self) -> Backend {
        Self::listening(self.command(program()).arg("backend"))
    }

    /// Starts a command that is or becomes a backend and returns once that listens.
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

    /// Sends bytes and returns the whole answer.
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

/// A backend; killed when a test ends before it was stopped.
pub struct Backend {
    pub child: Child,
}

impl Backend {
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        exit_of(&mut self.child, "the backend")
    }
}

/// Waits until a process ends by itself.
#[track_caller]
pub fn exit_of(child: &mut Child, what: &str) -> ExitStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "{what} does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The message of a command that failed with `code`: one line, which begins with `error:`.
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
