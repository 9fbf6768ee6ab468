//! A registry on this machine: Debian's docker-registry.

use std::{
    fs,
    net::{SocketAddr, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

/// A registry that serves until it is dropped.
pub struct Registry(Child);

impl Registry {
    /// Starts a registry that keeps its images in `directory`; returns when it listens. `http` is appended to that
    /// section of its configuration, indented.
    pub fn serve(directory: &Path, address: SocketAddr, http: &str) -> Self {
        let configuration = directory.join("config.yml");
        let storage = directory.join("storage");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n{http}",
            storage.display()
        );
        fs::write(&configuration, text).unwrap();
        let registry = Command::new("docker-registry")
            .arg("serve")
            .arg(&configuration)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("the Debian package docker-registry is needed");
        let registry = Self(registry);
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "the registry does not listen");
            thread::sleep(Duration::from_millis(100));
        }
        registry
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
