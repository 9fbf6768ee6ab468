//! From the bytes of a policy file to what it says. Nothing that is doubtful is read as less than it may mean.

use serde_json::Value;

use super::document::{AdminSettings, HttpProxy};
use crate::settings::{
    DAEMON_OPTIONS, Definition, PROXY_EXCLUDE, PROXY_HTTP, PROXY_HTTPS, SUBNET,
    socket_mount::{self, SocketMount},
};

/// The version of the format that this program knows.
const VERSION: u32 = 2;

/// Longest name of an image or a command, in bytes.
const LONGEST: usize = 512;

/// Why the bytes are no policy.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Invalid {
    /// Not JSON.
    #[error("{0}")]
    Syntax(String),
    /// A key whose value cannot be.
    #[error("{key}: {problem}")]
    Key {
        /// Its path, such as `linuxVM.vpnkitCIDR.value`.
        key: String,
        /// What is wrong.
        problem: String,
    },
}

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The keys that are known.
    pub document: AdminSettings,
    /// Paths of keys that are not.
    pub unknown: Vec<String>,
}

/// Names that a key can have at the top, to tell a misspelt one from one of another version.
const TOP: [&str; 9] = [
    "configurationFileVersion",
    "enhancedContainerIsolation",
    "linuxVM",
    "proxy",
    "containersProxy",
    "filesharingAllowedDirectories",
    "blockDockerLoad",
    "exposeDockerAPIOnTCP2375",
    "portBindingBehavior",
];

/// Names below `linuxVM`.
const LINUX_VM: [&str; 2] = ["linuxVM.dockerDaemonOptions", "linuxVM.vpnkitCIDR"];

/// Reads a policy file.
pub fn parse(text: &[u8]) -> Result<Parsed, Invalid> {
    if text.starts_with(b"\xef\xbb\xbf") {
        return Err(Invalid::Syntax("it begins with a byte order mark; write UTF-8 without one".to_owned()));
    }
    let syntax = |error: serde_json::Error| Invalid::Syntax(error.to_string());
    let raw: Value = serde_json::from_slice(text).map_err(syntax)?;
    let mut unknown = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let mut ignored = |path: serde_ignored::Path<'_>| unknown.push(printable(&path.to_string()));
    let document: AdminSettings =
        serde_path_to_error::deserialize(serde_ignored::Deserializer::new(&mut deserializer, &mut ignored)).map_err(
            |error| match error.path().to_string() {
                path if path == "." => syntax(error.into_inner()),
                path => key(&printable(&path), error.into_inner()),
            },
        )?;
    for path in &unknown {
        if let Some(known) = TOP.into_iter().chain(LINUX_VM).find(|known| known.eq_ignore_ascii_case(path)) {
            return Err(key(path, format!("there is no such key; write {known}")));
        }
    }
    let shown = serde_json::to_value(&document).map_err(syntax)?;
    same_kinds(&shown, &raw, "")?;
    check(&document)?;
    Ok(Parsed { document, unknown })
}

fn key(path: &str, problem: impl ToString) -> Invalid {
    Invalid::Key { key: path.to_owned(), problem: problem.to_string() }
}

/// A path holds what somebody wrote: no control character of it reaches a terminal or breaks a line of the log.
fn printable(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// serde takes a list for a struct and an object for a word; a file that is meant does not have them.
fn same_kinds(parsed: &Value, raw: &Value, path: &str) -> Result<(), Invalid> {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    let kind = match (parsed, raw) {
        (Value::Object(parsed), Value::Object(raw)) => {
            return parsed.iter().try_for_each(|(name, value)| match raw.get(name) {
                Some(raw) => same_kinds(value, raw, &below(name)),
                None => Ok(()),
            });
        }
        (Value::Array(parsed), Value::Array(raw)) => {
            return parsed
                .iter()
                .zip(raw)
                .enumerate()
                .try_for_each(|(at, (value, raw))| same_kinds(value, raw, &format!("{path}[{at}]")));
        }
        (Value::Object(_), _) => "an object",
        (Value::Array(_), _) => "a list",
        (Value::String(_), Value::String(_))
        | (Value::Bool(_), Value::Bool(_))
        | (Value::Number(_), Value::Number(_)) => {
            return Ok(());
        }
        _ => "a single value",
    };
    Err(key(if path.is_empty() { "the file" } else { path }, format!("write {kind}")))
}

fn check(document: &AdminSettings) -> Result<(), Invalid> {
    if document.configuration_file_version.get().is_some_and(|version| *version != VERSION) {
        return Err(key("configurationFileVersion", format!("this program knows version {VERSION}")));
    }
    if let Some(exceptions) =
        document.enhanced_container_isolation.get().and_then(|isolation| isolation.docker_socket_mount.get())
    {
        check_exceptions(exceptions)?;
    }
    if let Some(vm) = document.linux_vm.get() {
        if let Some(options) = vm.docker_daemon_options.get() {
            fits(&DAEMON_OPTIONS, "linuxVM.dockerDaemonOptions.value", options.value.as_str())?;
        }
        if let Some(network) = vm.vpnkit_cidr.get() {
            fits(&SUBNET, "linuxVM.vpnkitCIDR.value", network.value.as_str())?;
        }
    }
    if let Some(proxy) = document.proxy.get() {
        check_proxy("proxy", proxy)?;
    }
    if let Some(proxy) = document.containers_proxy.get() {
        check_proxy("containersProxy", &proxy.into())?;
        let transparent_ports = &proxy.transparent_ports;
        let port = |word: &str| word.trim().parse::<u16>().is_ok_and(|port| port != 0);
        if !(matches!(transparent_ports.as_str(), "" | "*") || transparent_ports.split(',').all(port)) {
            return Err(key("containersProxy.transparentPorts", "write `*`, or port numbers with commas between"));
        }
    }
    for (at, folder) in document.filesharing_allowed_directories.get().into_iter().flatten().enumerate() {
        let name = folder.path.split('/').next().unwrap_or_default();
        let plain = !folder.path.chars().any(char::is_control) && folder.path.split('/').all(|part| part != "..");
        if !(plain && matches!(name, "" | "$HOME" | "$TMP" | "$TEMP") && !folder.path.is_empty()) {
            let path = format!("filesharingAllowedDirectories[{at}].path");
            return Err(key(
                &path,
                "write an absolute path without `..`, or one that begins with $HOME, $TMP or $TEMP",
            ));
        }
    }
    Ok(())
}

/// Whether a setting takes a value; the message has no password.
fn fits(definition: &Definition, path: &str, value: impl Into<Value>) -> Result<(), Invalid> {
    match definition.check(&value.into()) {
        Ok(()) => Ok(()),
        Err(super::super::SettingsError::InvalidValue { expected, .. }) => Err(key(path, expected)),
        Err(error) => Err(key(path, error)),
    }
}

fn check_proxy(path: &str, proxy: &HttpProxy) -> Result<(), Invalid> {
    fits(&PROXY_HTTP, &format!("{path}.http"), proxy.http.as_str())?;
    fits(&PROXY_HTTPS, &format!("{path}.https"), proxy.https.as_str())?;
    fits(&PROXY_EXCLUDE, &format!("{path}.exclude"), proxy.exclude.clone())
}

/// Whether exceptions can hold, for a policy or a setting.
pub(in crate::settings) fn check_exceptions(exceptions: &SocketMount) -> Result<(), Invalid> {
    const PATH: &str = "enhancedContainerIsolation.dockerSocketMount";
    let word = |text: &str| (1..=LONGEST).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    let images = exceptions.image_list.get().map(|list| list.images.as_slice()).unwrap_or_default();
    if let Some(at) = images.iter().position(|image| !word(image)) {
        return Err(key(&format!("{PATH}.imageList.images[{at}]"), "write name[:tag], name@digest or *"));
    }
    if serde_json::to_string(exceptions).map_or(true, |text| text.len() > socket_mount::LONGEST) {
        return Err(key(PATH, "it is longer than 16 KiB"));
    }
    let commands = exceptions.command_list.get().map(|list| list.commands.as_slice()).unwrap_or_default();
    let command = |text: &String| {
        let name = text.strip_suffix('*').unwrap_or(text);
        word(name) && name.bytes().all(|byte| byte.is_ascii_lowercase())
    };
    if let Some(at) = commands.iter().position(|text| !command(text)) {
        let path = format!("{PATH}.commandList.commands[{at}]");
        return Err(key(&path, "write a name as in `docker --help`, or a group such as image*"));
    }
    Ok(())
}
