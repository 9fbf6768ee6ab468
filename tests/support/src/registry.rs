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
    /// Serves what is pushed from `folder`, where `http` is the indented rest of its configuration; returns when it
    /// listens.
    pub fn serve(folder: &Path, address: SocketAddr, http: &str) -> Self {
        let configuration = folder.join("config.yml");
        let storage = folder.join("storage");
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
