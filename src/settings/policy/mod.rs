//! What the administrator of this machine decides for everybody on it: `admin-settings.json`.
//!
//! A file that is there but cannot be read or understood means the strictest: isolation on and locked.

mod document;
mod file;
mod parse;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use self::document::{HttpProxy, ProxyMode};
pub(super) use self::parse::check_exceptions;
pub use self::{
    document::{AdminSettings, PortBinding, schema},
    file::{PolicySource, Untrusted},
    parse::{Invalid, Parsed, parse},
};
use super::{
    BLOCK_LOAD, CONTAINERS_PROXY, DAEMON_OPTIONS, Definition, ISOLATION, PORT_BINDING, PROXY_EXCLUDE, PROXY_HTTP,
    PROXY_HTTPS, PROXY_MODE, Proxy, SOCKET_MOUNT, SUBNET,
};
use crate::report::chain;

/// What a policy says of one setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The value.
    pub value: Value,
    /// Whether nobody can set another.
    pub locked: bool,
}

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

/// A line of `policy show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// Path of the key.
    pub key: String,
    /// The value, without passwords.
    pub value: Value,
    /// Whether it is locked; `None` where a key has no such thing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked: Option<bool>,
    /// Whether it has an effect.
    pub enforced: bool,
    /// What it has to wait for, without an effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<&'static str>,
    /// What else in the file takes its effect away.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overruled: Option<&'static str>,
}

/// What comes of a key.
#[derive(Clone, Copy)]
enum Effect {
    /// It holds.
    Holds,
    /// Nothing, because something is not there yet.
    Missing(&'static str),
    /// Nothing, because of another key.
    Overruled(&'static str),
}

impl Line {
    fn new(key: &str, value: Value, locked: Option<bool>, effect: Effect) -> Self {
        let (missing, overruled) = match effect {
            Effect::Holds => (None, None),
            Effect::Missing(what) => (Some(what), None),
            Effect::Overruled(by) => (None, Some(by)),
        };
        Self { key: key.to_owned(), value, locked, enforced: matches!(effect, Effect::Holds), missing, overruled }
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
            Err(problem) => (Parsed::default(), Some(problem)),
        };
        let rules = if problem.is_some() { strictest() } else { rules(&parsed.document) };
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
        if self.facts.as_ref().is_some_and(|facts| facts.problem.is_some()) {
            return vec![Line::new(ISOLATION.key, true.into(), Some(true), Effect::Holds)];
        }
        lines(&self.parsed.document)
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

/// What a file that nobody can read means.
fn strictest() -> BTreeMap<&'static str, Rule> {
    let locked = |value: Value| Rule { value, locked: true };
    BTreeMap::from([(ISOLATION.key, locked(true.into())), (SOCKET_MOUNT.key, locked("".into()))])
}

fn rules(document: &AdminSettings) -> BTreeMap<&'static str, Rule> {
    let mut rules = BTreeMap::new();
    let mut rule = |definition: &Definition, value: Value, locked| {
        rules.insert(definition.key, Rule { value, locked });
    };
    if let Some(isolation) = document.enhanced_container_isolation.get() {
        rule(&ISOLATION, isolation.value.into(), isolation.locked);
        // One lock for both: isolation with anybody's exceptions would be another one.
        let exceptions = isolation.docker_socket_mount.get();
        if isolation.locked || exceptions.is_some() {
            let text = exceptions.map(|exceptions| value(exceptions).to_string()).unwrap_or_default();
            rule(&SOCKET_MOUNT, text.into(), isolation.locked);
        }
    }
    if let Some(vm) = document.linux_vm.get() {
        if let Some(options) = vm.docker_daemon_options.get() {
            rule(&DAEMON_OPTIONS, options.value.clone().into(), options.locked);
        }
        if let Some(network) = vm.vpnkit_cidr.get() {
            rule(&SUBNET, network.value.clone().into(), network.locked);
        }
    }
    if let Some(load) = document.block_docker_load.get() {
        rule(&BLOCK_LOAD, load.value.into(), load.locked);
    }
    if let Some(binding) = document.port_binding_behavior.get() {
        rule(&PORT_BINDING, value(&binding.value), binding.locked);
    }
    // One lock for the whole: otherwise half of a proxy could be another's.
    if let Some(proxy) = document.proxy.get() {
        rule(&PROXY_MODE, proxy.mode.as_str().into(), proxy.locked);
        rule(&PROXY_HTTP, proxy.http.clone().into(), proxy.locked);
        rule(&PROXY_HTTPS, proxy.https.clone().into(), proxy.locked);
        rule(&PROXY_EXCLUDE, proxy.exclude.clone().into(), proxy.locked);
    }
    if let Some(proxy) = document.containers_proxy.get() {
        rule(&CONTAINERS_PROXY, true.into(), proxy.locked);
    }
    rules
}

fn lines(document: &AdminSettings) -> Vec<Line> {
    use Effect::{Holds, Missing};

    let mut lines = Vec::new();
    let mut line = |key: &str, value, locked, effect| lines.push(Line::new(key, value, locked, effect));
    if let Some(isolation) = document.enhanced_container_isolation.get() {
        line("enhancedContainerIsolation", isolation.value.into(), Some(isolation.locked), Holds);
        if let Some(exceptions) = isolation.docker_socket_mount.get() {
            let locked = Some(isolation.locked);
            line("enhancedContainerIsolation.dockerSocketMount", value(exceptions), locked, Holds);
        }
    }
    if let Some(vm) = document.linux_vm.get() {
        if let Some(options) = vm.docker_daemon_options.get() {
            let shown = DAEMON_OPTIONS.concealed(&options.value.clone().into());
            line("linuxVM.dockerDaemonOptions", shown, Some(options.locked), Holds);
        }
        if let Some(network) = vm.vpnkit_cidr.get() {
            line("linuxVM.vpnkitCIDR", network.value.clone().into(), Some(network.locked), Holds);
        }
    }
    proxy_lines(document, &mut line);
    if let Some(folders) = document.filesharing_allowed_directories.get() {
        line("filesharingAllowedDirectories", value(folders), None, Missing("no folder of the host is shared"));
    }
    if let Some(setting) = document.block_docker_load.get() {
        line("blockDockerLoad", setting.value.into(), Some(setting.locked), Holds);
    }
    if let Some(setting) = document.expose_docker_api.get() {
        let missing = Missing("the engine never listens on TCP, whatever is set");
        line("exposeDockerAPIOnTCP2375", setting.value.into(), Some(setting.locked), missing);
    }
    if let Some(setting) = document.port_binding_behavior.get() {
        line("portBindingBehavior", value(&setting.value), Some(setting.locked), Holds);
    }
    lines
}

/// The lines of both proxies.
fn proxy_lines(document: &AdminSettings, line: &mut impl FnMut(&str, Value, Option<bool>, Effect)) {
    let containers = document.containers_proxy.get();
    let goes_before = containers.is_some_and(|proxy| proxy.mode == ProxyMode::Manual);
    let engine = document.proxy.get().map(|proxy| ("proxy", proxy.clone(), goes_before));
    let proxies = engine.into_iter().chain(containers.map(|proxy| ("containersProxy", proxy.into(), false)));
    for (key, proxy, overruled) in proxies {
        let HttpProxy { locked, mode, http, https, exclude, pac, embedded_pac } = proxy;
        let mut say = |name: &str, value: Value, effect| line(&format!("{key}.{name}"), value, Some(locked), effect);
        let of_mode = if overruled {
            Effect::Overruled("containersProxy goes before it while that is on")
        } else {
            Effect::Holds
        };
        let of_urls = if mode == ProxyMode::System { Effect::Overruled("the mode is system") } else { of_mode };
        say("mode", mode.as_str().into(), of_mode);
        say("http", PROXY_HTTP.concealed(&http.into()), of_urls);
        say("https", PROXY_HTTPS.concealed(&https.into()), of_urls);
        say("exclude", exclude.into(), of_urls);
        for (name, script) in [("pac", pac), ("embeddedPac", embedded_pac)] {
            if !script.is_empty() {
                say(name, "(set)".into(), Effect::Missing("no proxy auto-configuration is read"));
            }
        }
    }
    if let Some(proxy) = containers.filter(|proxy| !proxy.transparent_ports.is_empty()) {
        let missing = Effect::Missing("no traffic is led to the proxy, new containers are told of it instead");
        line("containersProxy.transparentPorts", proxy.transparent_ports.clone().into(), Some(proxy.locked), missing);
    }
}

fn value(of: &impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or_default()
}

#[cfg(test)]
mod tests;
