//! From the bytes of a policy file to what it says. Nothing that is doubtful is read as less than it may mean.

use serde_json::Value;

use super::{document::AdminSettings, invalid::Invalid, keys};
use crate::settings::socket_mount;

/// The version of the format that this program knows.
const VERSION: u32 = 2;

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The keys that are known.
    pub document: AdminSettings,
    /// Paths of keys that are not.
    pub unknown: Vec<String>,
}

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
                path => Invalid::key(&printable(&path), error.into_inner()),
            },
        )?;
    for path in &unknown {
        if let Some(known) = keys::names().find(|known| known.eq_ignore_ascii_case(path)) {
            return Err(Invalid::key(path, format!("there is no such key; write {known}")));
        }
    }
    let shown = serde_json::to_value(&document).map_err(syntax)?;
    same_kinds(&shown, &raw, "")?;
    check(&document)?;
    Ok(Parsed { document, unknown })
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
    Err(Invalid::key(if path.is_empty() { "the file" } else { path }, format!("write {kind}")))
}

fn check(document: &AdminSettings) -> Result<(), Invalid> {
    if document.configuration_file_version.get().is_some_and(|version| *version != VERSION) {
        return Err(Invalid::key("configurationFileVersion", format!("this program knows version {VERSION}")));
    }
    if let Some(exceptions) =
        document.enhanced_container_isolation.get().and_then(|isolation| isolation.docker_socket_mount.get())
    {
        const PATH: &str = "enhancedContainerIsolation.dockerSocketMount";
        socket_mount::check(exceptions)
            .map_err(|misfit| Invalid::key(&format!("{PATH}{}", misfit.place), misfit.problem))?;
    }
    keys::check(document)?;
    if let Some(proxy) = document.containers_proxy.get() {
        let transparent_ports = &proxy.transparent_ports;
        let port = |word: &str| word.trim().parse::<u16>().is_ok_and(|port| port != 0);
        if !(matches!(transparent_ports.as_str(), "" | "*") || transparent_ports.split(',').all(port)) {
            return Err(Invalid::key(
                "containersProxy.transparentPorts",
                "write `*`, or port numbers with commas between",
            ));
        }
    }
    for (at, folder) in document.filesharing_allowed_directories.get().into_iter().flatten().enumerate() {
        let name = folder.path.split('/').next().unwrap_or_default();
        let plain = !folder.path.chars().any(char::is_control) && folder.path.split('/').all(|part| part != "..");
        if !(plain && matches!(name, "" | "$HOME" | "$TMP" | "$TEMP") && !folder.path.is_empty()) {
            let path = format!("filesharingAllowedDirectories[{at}].path");
            return Err(Invalid::key(
                &path,
                "write an absolute path without `..`, or one that begins with $HOME, $TMP or $TEMP",
            ));
        }
    }
    Ok(())
}
