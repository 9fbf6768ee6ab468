//! What the administrator of this machine decides for everybody on it: `admin-settings.json`.
//!
//! A file that is there but cannot be read or understood means the strictest: isolation on and locked.

mod document;
mod file;
mod invalid;
mod keys;
mod parse;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::document::ProxyMode;
pub use self::{
    document::{AdminSettings, PortBinding, schema},
    file::{PolicySource, Untrusted},
    invalid::Invalid,
    keys::{Line, Rule},
    parse::{Parsed, parse},
};
use super::{
    definition::{Definition, ISOLATION},
    proxy::Proxy,
};
use crate::report::chain;

/// Which policy a backend has, as `status` tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyFacts {
    /// The file.
    pub file: PathBuf,
    /// SHA-256 of its contents, when they could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Why it counts as the strictest there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl PolicyFacts {
    /// What a person has to know of a file that cannot be used.
    pub fn warning(&self) -> Option<String> {
        let problem = self.problem.as_ref()?;
        Some(format!(
            "the policy {} cannot be used: {problem}; until it is corrected Enhanced Container Isolation is on and \
             locked",
            self.file.display()
        ))
    }
}

/// What holds for everybody on this machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    facts: Option<PolicyFacts>,
    parsed: Parsed,
    rules: BTreeMap<&'static str, Rule>,
}

impl Policy {
    /// The policy of `source`; no policy when there is no file.
    pub fn read(source: &PolicySource) -> Self {
        let Some((file, text)) = source.find() else { return Self::default() };
        let digest = text.as_ref().ok().map(|text| digest(text));
        let parsed = text.map_err(|error| chain(&error)).and_then(|text| parse(&text).map_err(|error| chain(&error)));
        let (parsed, problem) = match parsed {
            Ok(parsed) => (parsed, None),
            Err(problem) => (Parsed { document: AdminSettings::strictest(), unknown: Vec::new() }, Some(problem)),
        };
        let rules = keys::rules(&parsed.document);
        Self { facts: Some(PolicyFacts { file: file.to_owned(), digest, problem }), parsed, rules }
    }

    /// This machine's policy.
    pub fn system() -> Self {
        Self::read(&PolicySource::system())
    }

    /// Which it is, if there is one.
    pub fn facts(&self) -> Option<&PolicyFacts> {
        self.facts.as_ref()
    }

    /// What it says of a setting.
    pub fn rule(&self, definition: &Definition) -> Option<&Rule> {
        self.rules.get(definition.key)
    }

    /// The file that locks a setting, if one does.
    pub fn lock(&self, definition: &Definition) -> Option<&Path> {
        let facts = self.facts.as_ref()?;
        self.rule(definition).filter(|rule| rule.locked).map(|_| facts.file.as_path())
    }

    /// The file that locks isolation on, if one does.
    pub fn isolation_lock(&self) -> Option<&Path> {
        self.lock(&ISOLATION).filter(|_| self.rule(&ISOLATION).is_some_and(|rule| rule.value == true))
    }

    /// The proxy that containers and pulls have while [`CONTAINERS_PROXY`] is on, if it is not the engine's.
    pub fn containers_proxy(&self) -> Option<Proxy> {
        let proxy = self.parsed.document.containers_proxy.get().filter(|proxy| proxy.mode == ProxyMode::Manual)?;
        // What is no URL was refused when the file was read.
        let url = |text: &str| text.parse().ok();
        Some(Proxy { http: url(&proxy.http), https: url(&proxy.https), exclude: proxy.exclude.clone() })
    }

    /// Paths of keys that are ignored.
    pub fn unknown(&self) -> &[String] {
        &self.parsed.unknown
    }

    /// Every key that the file has, and whether it has an effect.
    pub fn lines(&self) -> Vec<Line> {
        keys::lines(&self.parsed.document)
    }
}

/// Reads any file as a policy: paths of its unknown keys, or why it is none.
pub fn validate(path: &Path) -> Result<Vec<String>, String> {
    let text = file::read_any(path).map_err(|error| chain(&error))?;
    parse(&text).map(|parsed| parsed.unknown).map_err(|error| chain(&error))
}

fn digest(text: &[u8]) -> String {
    use std::fmt::Write;
    Sha256::digest(text).iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests;
