//! The docker context of a profile, in the store of the docker command (`docker/cli`, `cli/context/store`):
//! `<docker config>/contexts/meta/<SHA-256 of the name>/meta.json`. The current context is never changed.
//!
//! Backends of several profiles and docker commands may use the store at the same time, so a context is written whole
//! and only one of ours is ever changed or removed.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{hex::hex, settings::ProfileName};

/// Key in the metadata that marks a context as ours; the docker command keeps keys that it does not know.
const PROFILE_KEY: &str = "io.bulkhead.profile";

/// Reason that a context could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// There is no home directory.
    #[error("neither DOCKER_CONFIG nor HOME is set")]
    NoHome,
    /// The context is not ours.
    #[error("the docker context `{0}` was not created by Bulkhead and is left alone; use DOCKER_HOST instead")]
    Foreign(String),
    /// A file or directory of the store.
    #[error("cannot use {path}")]
    Io {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A context, which may not exist yet.
#[derive(Clone, Debug)]
pub struct DockerContext {
    name: String,
    profile: String,
    host: String,
    config: PathBuf,
}

impl DockerContext {
    /// Returns the context of a profile whose engine is at `host`.
    pub fn new(profile: &ProfileName, host: &str) -> Result<Self, ContextError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        // The docker command looks in the same places, in this order.
        let config = variable("DOCKER_CONFIG")
            .or_else(|| variable("HOME").map(|home| home.join(".docker")))
            .ok_or(ContextError::NoHome)?;
        Ok(Self::in_directory(profile, host, config))
    }

    fn in_directory(profile: &ProfileName, host: &str, config: PathBuf) -> Self {
        Self { name: profile.context(), profile: profile.to_string(), host: host.to_owned(), config }
    }

    /// The context's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn directory(&self) -> PathBuf {
        self.config.join("contexts/meta").join(hex(&Sha256::digest(self.name.as_bytes())))
    }

    /// Makes the context or brings ours up to date.
    pub fn create(&self) -> Result<(), ContextError> {
        let directory = self.directory();
        // A user's own context of this name may lead to another engine.
        if self.owner()?.is_some_and(|ours| !ours) {
            return Err(ContextError::Foreign(self.name.clone()));
        }
        let metadata = json!({
            "Name": self.name,
            "Metadata": {
                "Description": format!("Bulkhead engine, profile {}", self.profile),
                PROFILE_KEY: self.profile,
            },
            "Endpoints": { "docker": { "Host": self.host, "SkipTLSVerify": false } },
        });
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |source| ContextError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(io_error(&directory))?;
        // rename(2) is atomic: a docker command that reads meanwhile sees the old or the new file whole.
        let new = directory.join(".meta.json.new");
        fs::write(&new, metadata.to_string()).map_err(io_error(&new))?;
        fs::rename(&new, directory.join("meta.json")).map_err(io_error(&directory))
    }

    /// Returns whether the context exists and is ours.
    pub fn exists(&self) -> Result<bool, ContextError> {
        Ok(self.owner()? == Some(true))
    }

    /// Removes the context if it is ours and not the current one.
    pub fn remove(&self) -> Result<(), ContextError> {
        // The docker command fails altogether when its current context is missing. Left behind, it leads to the engine
        // again after the next start.
        if self.owner()? != Some(true) || self.is_current() {
            return Ok(());
        }
        let directory = self.directory();
        fs::remove_dir_all(&directory).map_err(|source| ContextError::Io { path: directory, source })
    }

    /// Returns whether the context of this name is ours, or `None` if it does not exist.
    fn owner(&self) -> Result<Option<bool>, ContextError> {
        let path = self.directory().join("meta.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ContextError::Io { path, source }),
        };
        // A file that is not JSON is not ours.
        let metadata: Value = serde_json::from_slice(&text).unwrap_or_default();
        Ok(Some(metadata["Metadata"][PROFILE_KEY] == self.profile.as_str()))
    }

    /// Returns whether `docker context use` has selected it.
    fn is_current(&self) -> bool {
        let config = fs::read(self.config.join("config.json")).unwrap_or_default();
        let config: Value = serde_json::from_slice(&config).unwrap_or_default();
        config["currentContext"] == self.name.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(directory: &Path) -> DockerContext {
        DockerContext::in_directory(&ProfileName::default(), "unix:///run/docker.sock", directory.to_owned())
    }

    #[test]
    fn the_directory_is_named_after_the_digest_of_the_name() {
        let directory = context(Path::new("/d")).directory();
        // printf bulkhead | sha256sum
        assert_eq!(directory, Path::new("/d/contexts/meta").join(hex(&Sha256::digest("bulkhead"))));
        assert_eq!(hex(&Sha256::digest("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn a_context_of_ours_is_made_renewed_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let context = context(directory.path());
        context.create().unwrap();
        context.create().unwrap();
        assert!(context.directory().join("meta.json").exists());
        context.remove().unwrap();
        assert!(!context.directory().exists());
        context.remove().unwrap();
    }

    #[test]
    fn a_foreign_context_of_the_same_name_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let context = context(directory.path());
        fs::create_dir_all(context.directory()).unwrap();
        let foreign = r#"{"Name":"bulkhead","Metadata":{},"Endpoints":{"docker":{"Host":"tcp://elsewhere"}}}"#;
        let path = context.directory().join("meta.json");
        fs::write(&path, foreign).unwrap();
        assert!(matches!(context.create(), Err(ContextError::Foreign(_))));
        context.remove().unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), foreign);
    }

    #[test]
    fn the_current_context_stays_so_that_the_docker_command_keeps_working() {
        let directory = tempfile::tempdir().unwrap();
        let context = context(directory.path());
        context.create().unwrap();
        fs::write(directory.path().join("config.json"), r#"{"currentContext": "bulkhead"}"#).unwrap();
        context.remove().unwrap();
        assert!(context.directory().exists());
    }
}
