//! The docker context of a profile, in the store of the docker command (`docker/cli`, `cli/context/store`):
//! `<docker config>/contexts/meta/<SHA-256 of the name>/meta.json`. The current context is never changed.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{hex::hex, settings::ProfileName};

/// Key in the metadata that says that a context is ours; the docker command keeps keys that it does not know.
const MARK: &str = "io.bulkhead.profile";

/// Why a context could not be made or removed.
#[derive(Debug, thiserror::Error)]
pub enum ContextError {
    /// No home folder.
    #[error("neither DOCKER_CONFIG nor HOME is set")]
    NoHome,
    /// Somebody else's.
    #[error("the docker context `{0}` belongs to somebody else and is left alone; use DOCKER_HOST instead")]
    Foreign(String),
    /// A file.
    #[error("cannot use {path}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// A context that exists or could.
#[derive(Clone, Debug)]
pub struct DockerContext {
    name: String,
    profile: String,
    host: String,
    config: PathBuf,
}

impl DockerContext {
    /// The context of a profile whose engine is at `host`.
    pub fn new(profile: &ProfileName, host: &str) -> Result<Self, ContextError> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let config = variable("DOCKER_CONFIG")
            .or_else(|| variable("HOME").map(|home| home.join(".docker")))
            .ok_or(ContextError::NoHome)?;
        Ok(Self::in_folder(profile, host, config))
    }

    fn in_folder(profile: &ProfileName, host: &str, config: PathBuf) -> Self {
        Self { name: profile.context(), profile: profile.to_string(), host: host.to_owned(), config }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn folder(&self) -> PathBuf {
        self.config.join("contexts/meta").join(hex(&Sha256::digest(self.name.as_bytes())))
    }

    /// Makes the context or brings ours up to date.
    pub fn create(&self) -> Result<(), ContextError> {
        let folder = self.folder();
        if self.owner()?.is_some_and(|ours| !ours) {
            return Err(ContextError::Foreign(self.name.clone()));
        }
        let metadata = json!({
            "Name": self.name,
            "Metadata": {
                "Description": format!("Bulkhead engine, profile {}", self.profile),
                MARK: self.profile,
            },
            "Endpoints": { "docker": { "Host": self.host, "SkipTLSVerify": false } },
        });
        let io_error = |path: &Path| {
            let path = path.to_owned();
            move |source| ContextError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(io_error(&folder))?;
        // A docker command that reads meanwhile sees the old or the new file whole.
        let new = folder.join(".meta.json.new");
        fs::write(&new, metadata.to_string()).map_err(io_error(&new))?;
        fs::rename(&new, folder.join("meta.json")).map_err(io_error(&folder))
    }

    /// Removes the context if it is ours; one that is in use stays, because the docker command fails without it.
    pub fn remove(&self) -> Result<(), ContextError> {
        if self.owner()? != Some(true) || self.is_current() {
            return Ok(());
        }
        let folder = self.folder();
        fs::remove_dir_all(&folder).map_err(|source| ContextError::Io { path: folder, source })
    }

    /// Whether the context that exists under the name is ours; `None` when there is none.
    fn owner(&self) -> Result<Option<bool>, ContextError> {
        let path = self.folder().join("meta.json");
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ContextError::Io { path, source }),
        };
        let metadata: Value = serde_json::from_slice(&text).unwrap_or_default();
        Ok(Some(metadata["Metadata"][MARK] == self.profile.as_str()))
    }

    fn is_current(&self) -> bool {
        let config = fs::read(self.config.join("config.json")).unwrap_or_default();
        let config: Value = serde_json::from_slice(&config).unwrap_or_default();
        config["currentContext"] == self.name.as_str()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(folder: &Path) -> DockerContext {
        DockerContext::in_folder(&ProfileName::default(), "unix:///run/docker.sock", folder.to_owned())
    }

    #[test]
    fn the_folder_is_named_after_the_digest_of_the_name() {
        let folder = context(Path::new("/d")).folder();
        // printf bulkhead | sha256sum
        assert_eq!(folder, Path::new("/d/contexts/meta").join(hex(&Sha256::digest("bulkhead"))));
        assert_eq!(hex(&Sha256::digest("")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    }

    #[test]
    fn a_context_of_ours_is_made_renewed_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let context = context(folder.path());
        context.create().unwrap();
        context.create().unwrap();
        assert!(context.folder().join("meta.json").exists());
        context.remove().unwrap();
        assert!(!context.folder().exists());
        context.remove().unwrap();
    }

    #[test]
    fn a_foreign_context_of_the_same_name_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let context = context(folder.path());
        fs::create_dir_all(context.folder()).unwrap();
        let foreign = r#"{"Name":"bulkhead","Metadata":{},"Endpoints":{"docker":{"Host":"tcp://elsewhere"}}}"#;
        let path = context.folder().join("meta.json");
        fs::write(&path, foreign).unwrap();
        assert!(matches!(context.create(), Err(ContextError::Foreign(_))));
        context.remove().unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), foreign);
    }

    #[test]
    fn the_current_context_stays_so_that_the_docker_command_keeps_working() {
        let folder = tempfile::tempdir().unwrap();
        let context = context(folder.path());
        context.create().unwrap();
        fs::write(folder.path().join("config.json"), r#"{"currentContext": "bulkhead"}"#).unwrap();
        context.remove().unwrap();
        assert!(context.folder().exists());
    }
}
