//! Lets dockerd and an isolated container see each other's files.
//!
//! The isolating runtime gives a container an overlay of its own over the writable layer that dockerd has mounted as
//! well, and each overlay remembers names. Before dockerd is asked to look into a container's files, and after it
//! changed them, the runtime is asked to make both forget (`sysbox-runc refresh ID`).

use std::{path::Path, process::Stdio, time::Duration};

use bulkhead_protocol::{gate::CONFIGURATION, is_container_id};
use hyper::Method;
use tokio::{
    process::Command,
    time::{Instant, timeout_at},
};

use crate::{
    dockerd::{Dockerd, segment},
    rules::Isolation,
};

const RUNTIME: &str = "/usr/bin/sysbox-runc";
/// The request goes on without a refresh after this long: stale names are better than a client that hangs.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(10);

/// A request that touches a container's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRefresh {
    /// Id, name or prefix as the client gave it.
    container: String,
    /// The files are changed.
    changes: bool,
}

/// The files of a container that a request touches.
#[derive(Debug)]
pub struct RefreshedContainer {
    /// The container's full id.
    id: String,
    /// The request changes them, so the container's side has to forget what it knows afterwards.
    pub change: bool,
}

impl FileRefresh {
    /// Whether a request with these path segments (without version) looks into or changes a container's files.
    pub fn of(isolation: Isolation, method: &Method, segments: &[String]) -> Option<Self> {
        if isolation == Isolation::Off {
            return None;
        }
        let [containers, container, what] = segments else { return None };
        let touches = matches!(
            (method.as_str(), what.as_str()),
            ("GET" | "HEAD" | "PUT", "archive") | ("GET", "export" | "changes") | ("POST", "exec")
        );
        (containers == "containers" && touches)
            .then(|| Self { container: container.clone(), changes: *method == Method::PUT })
    }

    /// Finds the container and makes both sides forget, before the request goes on. A container that does not exist is
    /// the engine's to complain about.
    pub async fn before_request(self, upstream: &Path) -> Option<RefreshedContainer> {
        let deadline = Instant::now() + REFRESH_TIMEOUT;
        let id = timeout_at(deadline, full_id(upstream, &self.container)).await.ok().flatten()?;
        let files = RefreshedContainer { id, change: self.changes };
        files.refresh_until(deadline).await;
        Some(files)
    }
}

impl RefreshedContainer {
    /// Makes both sides forget again, after the request.
    pub async fn after_request(&self) {
        self.refresh_until(Instant::now() + REFRESH_TIMEOUT).await;
    }

    async fn refresh_until(&self, deadline: Instant) {
        let command =
            Command::new(RUNTIME).args(["refresh", &self.id]).env_remove(CONFIGURATION).stdin(Stdio::null()).status();
        if let Ok(status) = timeout_at(deadline, command).await
            && !status.as_ref().is_ok_and(std::process::ExitStatus::success)
        {
            eprintln!("the files of container {} may look stale: {RUNTIME} refresh ended with {status:?}", self.id);
        }
    }
}

/// Asks the engine what a name or prefix stands for.
async fn full_id(upstream: &Path, container: &str) -> Option<String> {
    if is_container_id(container) {
        return Some(container.to_owned());
    }
    let path = format!("/containers/{}/json", segment(container));
    let description: serde_json::Value = Dockerd::new(upstream).get(&path).await.ok()?;
    description["Id"].as_str().filter(|id| is_container_id(id)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn touch(method: Method, path: &str) -> Option<FileRefresh> {
        let segments: Vec<_> = path.split('/').map(str::to_owned).collect();
        FileRefresh::of(Isolation::On, &method, &segments)
    }

    #[test]
    fn copying_out_diff_export_and_exec_refresh_before_and_copying_in_also_after() {
        for (method, path) in [
            (Method::GET, "containers/x/archive"),
            (Method::HEAD, "containers/x/archive"),
            (Method::GET, "containers/x/changes"),
            (Method::GET, "containers/x/export"),
            (Method::POST, "containers/x/exec"),
        ] {
            assert_eq!(touch(method, path), Some(FileRefresh { container: "x".into(), changes: false }), "{path}");
        }
        assert!(touch(Method::PUT, "containers/x/archive").unwrap().changes);
    }

    #[test]
    fn other_requests_cost_nothing() {
        for (method, path) in [
            (Method::POST, "containers/x/start"),
            (Method::GET, "containers/x/json"),
            (Method::POST, "exec/x/start"),
            (Method::GET, "images/x/changes"),
            (Method::GET, "containers/archive"),
        ] {
            assert_eq!(touch(method, path), None, "{path}");
        }
    }
}
