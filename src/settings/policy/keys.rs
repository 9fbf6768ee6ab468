//! The table of the policy's keys: the path of each in the file, its value, the setting that it decides, its effect.
//!
//! A new key needs a field of [`AdminSettings`] (`document.rs`) and a row of [`KEYS`]. Everything else that is done key
//! by key comes from the rows: the rules under which settings stand, the checks of values, the names that a misspelt
//! key is compared with, and the lines of `bulkhead policy show`.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::{
    document::{AdminSettings, AllowedDirectory, HttpProxy, ProxyMode, Setting},
    invalid::Invalid,
};
use crate::settings::{
    definition::{
        BLOCK_LOAD, CONTAINERS_PROXY, DAEMON_OPTIONS, Definition, ISOLATION, PORT_BINDING, PROXY_EXCLUDE, PROXY_HTTP,
        PROXY_HTTPS, PROXY_MODE, SHARES, SOCKET_MOUNT, SUBNET,
    },
    error::SettingsError,
    maybe::Maybe,
};

/// The policy's decision about one setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// The value.
    pub value: Value,
    /// Nobody can set another value; otherwise this one is a default.
    pub locked: bool,
}

/// A line of `policy show`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// Path of the key.
    pub key: String,
    /// The value, without passwords.
    pub value: Value,
    /// The state of its lock; `None` for a key without a lock.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub locked: Option<bool>,
    /// It has an effect.
    pub enforced: bool,
    /// The missing feature that leaves it without an effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub missing: Option<&'static str>,
    /// The reason in the file itself that leaves it without an effect.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overruled: Option<&'static str>,
}

/// A key of the file.
struct Key {
    path: &'static str,
    entry: fn(&AdminSettings) -> Option<Entry>,
    target: Target,
    effect: fn(&AdminSettings) -> Effect,
}

/// A key's value in one file.
struct Entry {
    /// `null` for a key that is left out of an object that is there: it has no line, but may decide its setting.
    value: Value,
    locked: Option<bool>,
    /// The end of the value's path, behind the key's own.
    end: &'static str,
}

/// The setting that a key decides.
enum Target {
    /// None.
    Nothing,
    /// This one, with the value as it is in the file.
    Sets(&'static Definition),
    /// This one, with a value that follows from the one in the file.
    SetsAs(&'static Definition, fn(&Value) -> Value),
    /// None, but the value is checked and concealed like one of this setting.
    Like(&'static Definition),
}

/// The consequence of a key.
#[derive(Clone, Copy)]
enum Effect {
    InForce,
    /// None, because a feature is missing.
    Missing(&'static str),
    /// None, because of another key.
    Overruled(&'static str),
}

use Target::{Like, Nothing, Sets, SetsAs};

/// All keys, in the order in which `policy show` prints them: path, value, the setting it decides, effect.
#[rustfmt::skip]
const KEYS: &[Key] = &[
    key("enhancedContainerIsolation", isolation, Sets(&ISOLATION), in_force),
    key("enhancedContainerIsolation.dockerSocketMount", socket_mount, SetsAs(&SOCKET_MOUNT, as_text), in_force),
    key("linuxVM.dockerDaemonOptions", |file| setting(&file.linux_vm.get()?.docker_daemon_options),
        Sets(&DAEMON_OPTIONS), in_force),
    key("linuxVM.vpnkitCIDR", |file| setting(&file.linux_vm.get()?.vpnkit_cidr), Sets(&SUBNET), in_force),
    key("proxy.mode", |file| of_engine(file, mode), Sets(&PROXY_MODE), engines_proxy),
    key("proxy.http", |file| of_engine(file, http), Sets(&PROXY_HTTP), engines_url),
    key("proxy.https", |file| of_engine(file, https), Sets(&PROXY_HTTPS), engines_url),
    key("proxy.exclude", |file| of_engine(file, exclude), Sets(&PROXY_EXCLUDE), engines_url),
    key("proxy.pac", |file| of_engine(file, pac), Nothing, no_pac),
    key("proxy.embeddedPac", |file| of_engine(file, embedded_pac), Nothing, no_pac),
    key("containersProxy.mode", |file| of_containers(file, mode), SetsAs(&CONTAINERS_PROXY, |_| true.into()), in_force),
    key("containersProxy.http", |file| of_containers(file, http), Like(&PROXY_HTTP), containers_url),
    key("containersProxy.https", |file| of_containers(file, https), Like(&PROXY_HTTPS), containers_url),
    key("containersProxy.exclude", |file| of_containers(file, exclude), Like(&PROXY_EXCLUDE), containers_url),
    key("containersProxy.pac", |file| of_containers(file, pac), Nothing, no_pac),
    key("containersProxy.embeddedPac", |file| of_containers(file, embedded_pac), Nothing, no_pac),
    key("containersProxy.transparentPorts", transparent_ports, Nothing, no_transparent_ports),
    key("filesharingAllowedDirectories", directories, SetsAs(&SHARES, default_shares), in_force),
    key("blockDockerLoad", |file| setting(&file.block_docker_load), Sets(&BLOCK_LOAD), in_force),
    key("exposeDockerAPIOnTCP2375", |file| setting(&file.expose_docker_api), Nothing, no_tcp),
    key("portBindingBehavior", |file| setting(&file.port_binding_behavior), Sets(&PORT_BINDING), in_force),
];

const fn key(
    path: &'static str,
    entry: fn(&AdminSettings) -> Option<Entry>,
    target: Target,
    effect: fn(&AdminSettings) -> Effect,
) -> Key {
    Key { path, entry, target, effect }
}

/// The rules of a file, by the names of the settings.
pub(super) fn rules(file: &AdminSettings) -> BTreeMap<&'static str, Rule> {
    let rule = |key: &Key| {
        let Entry { value, locked, .. } = (key.entry)(file)?;
        let (setting, value) = match key.target {
            Sets(setting) => (setting, value),
            SetsAs(setting, convert) => (setting, convert(&value)),
            Nothing | Like(_) => return None,
        };
        // A key without a lock, if it ever decides a setting, gives a default.
        Some((setting.key, Rule { value, locked: locked == Some(true) }))
    };
    KEYS.iter().filter_map(rule).collect()
}

/// A line for each key that the file has.
pub(super) fn lines(file: &AdminSettings) -> Vec<Line> {
    let line = |key: &Key| {
        let Entry { value, locked, .. } = (key.entry)(file).filter(|entry| !entry.value.is_null())?;
        let value = match key.target {
            // The text of a setting may hold passwords.
            Sets(setting) | Like(setting) => setting.concealed(&value),
            SetsAs(..) | Nothing => value,
        };
        let (missing, overruled) = match (key.effect)(file) {
            Effect::InForce => (None, None),
            Effect::Missing(feature) => (Some(feature), None),
            Effect::Overruled(by) => (None, Some(by)),
        };
        let enforced = missing.is_none() && overruled.is_none();
        Some(Line { key: key.path.to_owned(), value, locked, enforced, missing, overruled })
    };
    KEYS.iter().filter_map(line).collect()
}

/// Checks the values that have the form of a setting.
pub(super) fn check(file: &AdminSettings) -> Result<(), Invalid> {
    for key in KEYS {
        let (Sets(setting) | Like(setting), Some(entry)) = (&key.target, (key.entry)(file)) else { continue };
        let path = format!("{}{}", key.path, entry.end);
        setting.check(&entry.value).map_err(|error| match error {
            // Without the value, which may hold a password.
            SettingsError::InvalidValue { expected, .. } => Invalid::key(&path, expected),
            error => Invalid::key(&path, error),
        })?;
    }
    Ok(())
}

/// The keys that other keys of a file are compared with, to find a misspelt one.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    let of = |key: &'static Key| match key.path.split_once('.') {
        // The VM's keys are settings of their own, only grouped by another key.
        Some((group @ "linuxVM", _)) => [Some(group), Some(key.path)],
        Some((first, _)) => [Some(first), None],
        None => [Some(key.path), None],
    };
    std::iter::once("configurationFileVersion").chain(KEYS.iter().flat_map(of).flatten())
}

// The rest are the parts of the rows above. An entry is `None` if the object around its key is missing.

fn entry(value: impl Into<Value>, locked: bool) -> Entry {
    Entry { value: value.into(), locked: Some(locked), end: "" }
}

// In these the value is one of two keys of an object, so its path goes on.

fn setting<T: Serialize>(key: &Maybe<Setting<T>>) -> Option<Entry> {
    let setting = key.get()?;
    Some(Entry { end: ".value", ..entry(as_json(&setting.value), setting.locked) })
}

fn isolation(file: &AdminSettings) -> Option<Entry> {
    let isolation = file.enhanced_container_isolation.get()?;
    Some(Entry { end: ".value", ..entry(isolation.value, isolation.locked) })
}

fn socket_mount(file: &AdminSettings) -> Option<Entry> {
    let isolation = file.enhanced_container_isolation.get()?;
    let exceptions = isolation.docker_socket_mount.get();
    // A lock of isolation covers the exceptions, also where the policy has none: with exceptions of a user's own it
    // would not be the isolation that was locked.
    (isolation.locked || exceptions.is_some())
        .then(|| entry(exceptions.map(as_json).unwrap_or_default(), isolation.locked))
}

/// An object as the text that the setting of the same form holds; no object is an empty text.
fn as_text(object: &Value) -> Value {
    if object.is_null() { "".into() } else { object.to_string().into() }
}

// The keys of a proxy have one lock: under a lock each, half of a proxy could be the administrator's and half
// another's.

fn of_engine(file: &AdminSettings, value: fn(&HttpProxy) -> Value) -> Option<Entry> {
    file.proxy.get().map(|proxy| entry(value(proxy), proxy.locked))
}

fn of_containers(file: &AdminSettings, value: fn(&HttpProxy) -> Value) -> Option<Entry> {
    file.containers_proxy.get().map(|proxy| entry(value(&proxy.into()), proxy.locked))
}

fn mode(proxy: &HttpProxy) -> Value {
    proxy.mode.as_str().into()
}

fn http(proxy: &HttpProxy) -> Value {
    proxy.http.as_str().into()
}

fn https(proxy: &HttpProxy) -> Value {
    proxy.https.as_str().into()
}

fn exclude(proxy: &HttpProxy) -> Value {
    proxy.exclude.clone().into()
}

fn pac(proxy: &HttpProxy) -> Value {
    script(&proxy.pac)
}

fn embedded_pac(proxy: &HttpProxy) -> Value {
    script(&proxy.embedded_pac)
}

/// A proxy auto-configuration file or its URL, neither of which is shown: both may hold names and passwords.
fn script(text: &str) -> Value {
    if text.is_empty() { Value::Null } else { "(set)".into() }
}

fn transparent_ports(file: &AdminSettings) -> Option<Entry> {
    let proxy = file.containers_proxy.get().filter(|proxy| !proxy.transparent_ports.is_empty())?;
    Some(entry(proxy.transparent_ports.as_str(), proxy.locked))
}

fn directories(file: &AdminSettings) -> Option<Entry> {
    let directories = file.filesharing_allowed_directories.get()?;
    Some(Entry { value: as_json(directories), locked: None, end: "" })
}

/// The directories that are shared unless the user sets others. The list itself is a limit and not the value of a
/// setting, see `Policy::allowed_directories`.
pub(super) fn shared_by_default(allowed: &[AllowedDirectory]) -> Value {
    let shared = allowed.iter().filter(|directory| directory.shared_by_default);
    shared.map(|directory| json!({"path": directory.path, "readOnly": false})).collect()
}

fn default_shares(allowed: &Value) -> Value {
    // Made from such a list in `directories`.
    let allowed: Vec<AllowedDirectory> = serde_json::from_value(allowed.clone()).unwrap_or_default();
    shared_by_default(&allowed)
}

// Effects. A key without one must not look as if it protected anything, so `policy show` gives the reason in its last
// column.

fn in_force(_: &AdminSettings) -> Effect {
    Effect::InForce
}

fn engines_proxy(file: &AdminSettings) -> Effect {
    // `Settings::proxy` returns the containers' proxy before the engine's. In mode system it does not name a proxy at
    // all.
    match file.containers_proxy.get() {
        Some(proxy) if proxy.mode == ProxyMode::Manual => {
            Effect::Overruled("containersProxy takes precedence while it is on")
        }
        _ => Effect::InForce,
    }
}

fn engines_url(file: &AdminSettings) -> Effect {
    of_mode(file.proxy.get().map(|proxy| proxy.mode), engines_proxy(file))
}

fn containers_url(file: &AdminSettings) -> Effect {
    of_mode(file.containers_proxy.get().map(|proxy| proxy.mode), Effect::InForce)
}

fn of_mode(mode: Option<ProxyMode>, manual: Effect) -> Effect {
    if mode == Some(ProxyMode::System) { Effect::Overruled("the mode is system") } else { manual }
}

fn no_pac(_: &AdminSettings) -> Effect {
    Effect::Missing("proxy auto-configuration is not supported")
}

fn no_transparent_ports(_: &AdminSettings) -> Effect {
    Effect::Missing("traffic is not redirected; new containers get the proxy in their environment instead")
}

fn no_tcp(_: &AdminSettings) -> Effect {
    Effect::Missing("the engine never listens on TCP, whatever the value")
}

fn as_json(of: &impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::policy::schema;

    #[test]
    fn every_key_of_the_schema_has_a_row() {
        let schema: Value = serde_json::from_str(&schema()).unwrap();
        let names: Vec<_> = names().collect();
        for key in schema["properties"].as_object().unwrap().keys() {
            assert!(names.contains(&key.as_str()), "{key}");
        }
        for (group, definition) in
            [("linuxVM", "LinuxVm"), ("proxy", "HttpProxy"), ("containersProxy", "ContainersProxy")]
        {
            let keys = schema["$defs"][definition]["properties"].as_object().unwrap().keys();
            for path in keys.filter(|key| *key != "locked").map(|key| format!("{group}.{key}")) {
                assert!(KEYS.iter().any(|key| key.path == path), "{path}");
            }
        }
    }

    #[test]
    fn no_two_keys_decide_one_setting() {
        let targets = KEYS.iter().filter_map(|key| match key.target {
            Sets(setting) | SetsAs(setting, _) => Some(setting.key),
            Nothing | Like(_) => None,
        });
        let mut settings: Vec<_> = targets.collect();
        settings.sort_unstable();
        assert!(settings.windows(2).all(|pair| pair[0] != pair[1]), "{settings:?}");
    }
}
