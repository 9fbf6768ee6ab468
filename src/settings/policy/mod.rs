//! The policy of the machine's administrator for all its users: `admin-settings.json`.
//!
//! | Step                                                    | File          |
//! |---------------------------------------------------------|---------------|
//! | find the file, and trust it by its owner and mode       | `file.rs`     |
//! | parse it, refuse anything doubtful                      | `parse.rs`    |
//! | the shape of the file, from which its schema is made    | `document.rs` |
//! | each key: the setting that it decides, its effect       | `keys.rs`     |
//!
//! From there a rule takes its way through `Settings::get` of the parent module, which prefers a locked value, into the
//! plan of a VM (`backend/plan.rs`). A change of a locked setting is refused by `locks.rs` of the parent module.
//!
//! A file that exists but cannot be used stands for the strictest policy: isolation on and locked. A backend reads the
//! file once, when it starts, and keeps its rules until it ends.

mod document;
mod file;
mod invalid;
mod keys;
mod parse;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
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
    shares::{AllowedDirectories, Places},
};
use crate::hex::hex;
use bulkhead_ipc::report::chain;

/// The identity of the policy that a backend has, as `status` reports it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PolicyFacts {
    /// The file.
    pub file: PathBuf,
    /// SHA-256 of its contents, when they could be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The reason why it cannot be used; the strictest policy stands in for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

impl PolicyFacts {
    /// The warning to users about a file that cannot be used.
    pub fn warning(&self) -> Option<String> {
        let problem = self.problem.as_ref()?;
        Some(format!(
            "the policy {} cannot be used: {problem}; until it is corrected, Enhanced Container Isolation is on and \
             locked",
            self.file.display()
        ))
    }
}

/// The rules for all users of a machine; none without a policy file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    facts: Option<PolicyFacts>,
    parsed: Parsed,
    rules: BTreeMap<&'static str, Rule>,
}

impl Policy {
    /// Reads the policy of `source`. Never fails: without a file there are no rules, and a file that cannot be used
    /// stands for the strictest ones.
    pub fn read(source: &PolicySource) -> Self {
        // Read once: contents and digest are of the same moment.
        let Some((file, text)) = source.find() else { return Self::default() };
        // The digest tells an edited file from the one that a backend has, also where both are unusable.
        let digest = text.as_ref().ok().map(|text| hex(&Sha256::digest(text)));
        let parsed = text.map_err(|error| chain(&error)).and_then(|text| parse(&text).map_err(|error| chain(&error)));
        // From here on there is no difference: the strictest rules go the same way as those of a valid file.
        let (parsed, problem) = match parsed {
            Ok(parsed) => (parsed, None),
            Err(problem) => (Parsed { document: AdminSettings::strictest(), unknown: Vec::new() }, Some(problem)),
        };
        let rules = keys::rules(&parsed.document);
        Self { facts: Some(PolicyFacts { file: file.to_owned(), digest, problem }), parsed, rules }
    }

    /// Reads this machine's policy.
    pub fn system() -> Self {
        Self::read(&PolicySource::system())
    }

    /// The identity of the policy, if there is one.
    pub fn facts(&self) -> Option<&PolicyFacts> {
        self.facts.as_ref()
    }

    /// The rule for a setting.
    pub fn rule(&self, definition: &Definition) -> Option<&Rule> {
        self.rules.get(definition.key)
    }

    /// The file that locks a setting.
    pub fn lock(&self, definition: &Definition) -> Option<&Path> {
        let facts = self.facts.as_ref()?;
        self.rule(definition).filter(|rule| rule.locked).map(|_| facts.file.as_path())
    }

    /// The file that locks isolation on.
    pub fn isolation_lock(&self) -> Option<&Path> {
        // A policy may lock it off as well; then there is nothing that another guest image could leave out.
        self.lock(&ISOLATION).filter(|_| self.rule(&ISOLATION).is_some_and(|rule| rule.value == true))
    }

    /// The proxy of containers and of pulls while the setting `containersProxy` is on; `None` for the engine's proxy.
    pub fn containers_proxy(&self) -> Option<Proxy> {
        // Read from the document and not from a rule: users cannot name this proxy, the setting only turns it on or
        // off.
        let proxy = self.parsed.document.containers_proxy.get().filter(|proxy| proxy.mode == ProxyMode::Manual)?;
        // Valid or empty: `parse` refuses anything else.
        let url = |text: &str| text.parse().ok();
        Some(Proxy { http: url(&proxy.http), https: url(&proxy.https), exclude: proxy.exclude.clone() })
    }

    /// The only directories that can be shared; `None` for any.
    pub fn allowed_directories(&self) -> Option<AllowedDirectories> {
        let list = self.parsed.document.filesharing_allowed_directories.get()?;
        let places = Places::from_account();
        // A path below a home that this user does not have allows nothing.
        let paths = list.iter().filter_map(|directory| places.resolve(&directory.path)).collect();
        Some(AllowedDirectories { paths, file: self.facts.as_ref()?.file.clone() })
    }

    /// Paths of keys that are ignored.
    pub fn unknown(&self) -> &[String] {
        &self.parsed.unknown
    }

    /// A line of `policy show` for each key of the file.
    pub fn lines(&self) -> Vec<Line> {
        keys::lines(&self.parsed.document)
    }
}

/// Reads any file as a policy; returns the paths of its unknown keys, or the reason why it is not valid.
pub fn validate(path: &Path) -> Result<Vec<String>, String> {
    let text = file::read_any(path).map_err(|error| chain(&error))?;
    parse(&text).map(|parsed| parsed.unknown).map_err(|error| chain(&error))
}

#[cfg(test)]
mod tests;
