//! The part of the control API that needs no VM: settings, logs, the check of a policy, the use of disk and memory.
//!
//! It works on files of the user and also answers where no backend is running: `bulkhead dashboard` shows the settings of
//! a stopped engine with it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use hyper::{StatusCode, body::Bytes};
use serde::Serialize;
use serde_json::Value;

use super::{
    api::{
        Accepts, LogLines, LogSource, MemoryUsage, PolicyCheck, Problem, SettingChange, SettingView, SettingsView,
        Status, Usage,
    },
    api_routes::{LINES, MAX_LINES, Route},
    disk, logs,
};
use crate::settings::{Definition, Kind, Paths, Policy, Settings, SettingsError, policy};
use bulkhead_ipc::report::chain;

/// A request that cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// A body that is not the route's.
    #[error("invalid body")]
    Body(#[source] serde_json::Error),
    /// A parameter of the query.
    #[error("invalid query `{0}`: must be source=console|backend and lines=1 to {MAX_LINES}")]
    Query(String),
    /// A log.
    #[error("cannot read {path}")]
    Log {
        /// The file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}

impl LocalError {
    /// The status code for it.
    fn code(&self) -> StatusCode {
        match self {
            Self::Settings(SettingsError::UnknownKey(_)) => StatusCode::NOT_FOUND,
            Self::Settings(SettingsError::Locked { .. }) => StatusCode::FORBIDDEN,
            Self::Settings(SettingsError::InvalidValue { .. }) | Self::Body(_) | Self::Query(_) => {
                StatusCode::BAD_REQUEST
            }
            Self::Settings(_) | Self::Log { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// A request for [`answer`].
#[derive(Clone, Debug, Default)]
pub struct LocalRequest {
    /// The name of a setting, or empty.
    pub key: String,
    /// The query, or empty.
    pub query: String,
    /// The body, which the caller has bounded.
    pub body: Bytes,
}

/// Answers a request that needs no VM; returns `None` for any other. Blocks: it reads files, and waits for others that
/// write the settings.
pub fn answer(paths: &Paths, status: &Status, route: Route, request: &LocalRequest) -> Option<(StatusCode, Bytes)> {
    let answer = match route {
        Route::Settings => settings(paths).map(|answer| line(&answer)),
        Route::Setting => setting(paths, &request.key).map(|answer| line(&answer)),
        Route::SetSetting => serde_json::from_slice(&request.body)
            .map_err(LocalError::Body)
            .and_then(|SettingChange { value }| change(paths, &request.key, Some(value)))
            .map(|answer| line(&answer)),
        Route::UnsetSetting => change(paths, &request.key, None).map(|answer| line(&answer)),
        Route::Logs => log_lines(paths, &request.query).map(|answer| line(&answer)),
        Route::ValidatePolicy => Ok(line(&check_policy(&request.body))),
        Route::Usage => Ok(line(&usage(paths, status))),
        _ => return None,
    };
    Some(match answer {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => (error.code(), line(&Problem { message: chain(&error) })),
    })
}

/// A message as a line.
fn line<T: Serialize>(value: &T) -> Bytes {
    // The messages have no maps with keys that are not texts, which alone could fail.
    let mut text = serde_json::to_vec(value).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

fn load(paths: &Paths) -> Result<Settings, LocalError> {
    // Under the policy of this moment, like the command line. A backend keeps the one that it has read, and shows it in
    // its status.
    Ok(Settings::load(&paths.settings())?.under(Policy::system()))
}

fn settings(paths: &Paths) -> Result<SettingsView, LocalError> {
    let settings = load(paths)?;
    Ok(SettingsView {
        settings: crate::settings::DEFINITIONS.iter().map(|definition| view(&settings, definition)).collect(),
        policy: settings.policy().facts().cloned(),
    })
}

fn setting(paths: &Paths, key: &str) -> Result<SettingView, LocalError> {
    let definition = Definition::find(key)?;
    Ok(view(&load(paths)?, definition))
}

fn change(paths: &Paths, key: &str, value: Option<Value>) -> Result<SettingView, LocalError> {
    Settings::update(paths, &Policy::system(), Definition::find(key)?, value)?;
    setting(paths, key)
}

fn view(settings: &Settings, definition: &Definition) -> SettingView {
    let accepts = match definition.kind {
        Kind::Bool { .. } => Accepts::Bool,
        Kind::Integer { min, max, .. } => Accepts::Integer { min, max },
        Kind::Choice { values } => Accepts::Choice { values: values.iter().map(ToString::to_string).collect() },
        Kind::Text { .. } => Accepts::Text,
        Kind::List { .. } => Accepts::List,
        Kind::Json { .. } => Accepts::Json,
    };
    SettingView {
        key: definition.key.into(),
        description: definition.description.into(),
        accepts,
        value: definition.concealed(&settings.get(definition)),
        default: definition.default_value(),
        origin: settings.origin(definition),
        locked_by: settings.policy().lock(definition).map(Path::to_owned),
    }
}

fn log_lines(paths: &Paths, query: &str) -> Result<LogLines, LocalError> {
    let (source, lines) = log_query(query).ok_or_else(|| LocalError::Query(query.chars().take(100).collect()))?;
    let path = match source {
        LogSource::Console => paths.console_log(),
        LogSource::Backend => paths.backend_log(),
    };
    let lines = logs::tail(&path, lines).map_err(|source| LocalError::Log { path, source })?;
    Ok(LogLines { source, lines })
}

/// Parses the query of the logs; returns `None` for an unknown or a wrong parameter.
fn log_query(query: &str) -> Option<(LogSource, usize)> {
    let (mut source, mut lines) = (LogSource::default(), LINES);
    for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
        match parameter.split_once('=')? {
            ("source", "console") => source = LogSource::Console,
            ("source", "backend") => source = LogSource::Backend,
            ("lines", number) => lines = number.parse().ok().filter(|lines| (1..=MAX_LINES).contains(lines))?,
            _ => return None,
        }
    }
    Some((source, lines))
}

fn check_policy(text: &[u8]) -> PolicyCheck {
    match policy::parse(text) {
        Ok(parsed) => PolicyCheck { valid: true, problem: None, unknown: parsed.unknown },
        Err(problem) => PolicyCheck { valid: false, problem: Some(chain(&problem)), unknown: Vec::new() },
    }
}

fn usage(paths: &Paths, status: &Status) -> Usage {
    let memory = status.vmm_pid.zip(status.vm.as_ref()).and_then(|(pid, vm)| {
        let text = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        Some(MemoryUsage { size_bytes: vm.memory_mib << 20, resident_bytes: shared_memory(&text)? << 10 })
    });
    Usage { disk: disk::usage(&paths.data_disk()), memory }
}

/// The resident shared memory of a process in KiB, from `/proc/PID/status` (proc_pid_status(5)). The guest's memory is a
/// memfd, and the vmm process has no other shared memory of any size.
fn shared_memory(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("RssShmem:"))?.trim().strip_suffix(" kB")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_parameters_of_the_document_are_accepted() {
        assert_eq!(log_query(""), Some((LogSource::Console, LINES)));
        assert_eq!(log_query("source=backend&lines=7"), Some((LogSource::Backend, 7)));
        for query in ["source=../x", "lines=0", "lines=2001", "lines=-1", "line=1", "source", "source=backend;lines=1"]
        {
            assert_eq!(log_query(query), None, "{query}");
        }
    }

    #[test]
    fn the_guests_memory_is_the_shared_part_of_the_process() {
        assert_eq!(shared_memory("VmRSS:\t 9 kB\nRssAnon:\t 1 kB\nRssShmem:\t  2048 kB\n"), Some(2048));
        assert_eq!(shared_memory("VmRSS:\t 9 kB\n"), None);
    }

    #[test]
    fn a_policy_is_checked_by_its_text() {
        assert_eq!(check_policy(b"{}"), PolicyCheck { valid: true, problem: None, unknown: Vec::new() });
        let check = check_policy(br#"{"enhancedContainerIsolation": {"locked": 1, "value": true}}"#);
        assert!(!check.valid && check.problem.unwrap().contains("enhancedContainerIsolation.locked"));
    }
}
