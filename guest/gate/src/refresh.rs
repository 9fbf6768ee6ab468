//! Makes dockerd and an isolated container see each other's files.
//!
//! The isolating runtime gives a container an overlay of its own over the writable layer that dockerd has mounted as
//! well. Both show the same data, but each overlay caches names. Before a request that makes dockerd read a container's
//! files, and after one that changed them, the gate has the runtime drop both caches (`sysbox-runc refresh ID`).

use std::{path::Path, process::Stdio, time::Duration};

use bulkhead_protocol::{gate::CONFIGURATION, is_container_id};
use hyper::Method;
use tokio::{
    process::Command,
    time::{Instant, timeout_at},
};

use crate::{
    dockerd::{Dockerd, encode_segment},
    rules::Isolation,
};

const RUNTIME: &str = "/usr/bin/sysbox-runc";
/// Time after which a request goes on without a refresh: stale names are better than a client that hangs.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(10);

/// A request that reads or changes a container's files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileRefresh {
    /// ID, name or prefix as the client gave it.
    container: String,
    changes: bool,
}

/// A container that was refreshed before a request.
#[derive(Debug)]
pub struct RefreshedContainer {
    /// The full ID.
    id: String,
    /// The request changes files, so the container's side has to be refreshed afterwards.
    pub changed: bool,
}

impl FileRefresh {
    /// Returns the refresh that a request with these path segments (without version) needs, if any.
    pub fn of(isolation: Isolation, method: &Method, segments: &[String]) -> Option<Self> {
        // Without isolation container and dockerd use the same overlay.
        if isolation == Isolation::Off {
            return None;
        }
        // The name of a linked container has a slash in it.
        let [containers, container @ .., what] = segments else { return None };
        let touches = matches!(
            (method.as_str(), what.as_str()),
            // docker cp out, stat and in; docker export and diff; docker exec, because dockerd reads the container's
            // /etc/passwd for `--user NAME`.
            ("GET" | "HEAD" | "PUT", "archive") | ("GET", "export" | "changes") | ("POST", "exec")
        );
        (containers == "containers" && !container.is_empty() && touches)
            .then(|| Self { container: container.join("/"), changes: *method == Method::PUT })
    }

    /// Finds the container and refreshes both sides, before the request goes on. `None` for a container that does not
    /// exist; dockerd reports that. `id` is the container's full ID, if it is known.
    pub async fn before_request(self, upstream: &Path, id: Option<String>) -> Option<RefreshedContainer> {
        // One deadline for the question and the command together.
        let deadline = Instant::now() + REFRESH_TIMEOUT;
        let id = match id {
            Some(id) => id,
            None => timeout_at(deadline, full_id(upstream, &self.container)).await.ok().flatten()?,
        };
        let files = RefreshedContainer { id, changed: self.changes };
        files.refresh_until(deadline).await;
        Some(files)
    }
}

impl RefreshedContainer {
    /// Refreshes both sides again, after the request.
    pub async fn after_request(&self) {
        self.refresh_until(Instant::now() + REFRESH_TIMEOUT).await;
    }

    async fn refresh_until(&self, deadline: Instant) {
        // The ID is 64 hex digits, never an option. The runtime needs nothing of the gate's configuration, which can
        // hold passwords.
        let command =
            Command::new(RUNTIME).args(["refresh", &self.id]).env_remove(CONFIGURATION).stdin(Stdio::null()).status();
        let Ok(ended) = timeout_at(deadline, command).await else { return };
        let failure = match ended {
            Ok(status) if status.success() => return,
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        eprintln!("files of container {} may look stale: `{RUNTIME} refresh` failed: {failure}", self.id);
    }
}

/// Returns the full ID for an ID, a name or a prefix of an ID.
async fn full_id(upstream: &Path, container: &str) -> Option<String> {
    if is_container_id(container) {
        return Some(container.to_owned());
    }
    // The client chose the text: as one encoded segment it cannot reach another route of dockerd.
    let path = format!("/containers/{}/json", encode_segment(container));
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
            (Method::POST, "containers/exec/exec"),
        ] {
            let container = path.split('/').nth(1).unwrap().to_owned();
            assert_eq!(touch(method, path), Some(FileRefresh { container, changes: false }), "{path}");
        }
        assert!(touch(Method::PUT, "containers/x/archive").unwrap().changes);
        assert_eq!(touch(Method::GET, "containers/parent/alias/export").unwrap().container, "parent/alias");
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
