//! Parses and checks the bytes of a policy file.
//!
//! Anything doubtful is an error and not ignored, because ignoring it could weaken what the administrator meant. Only
//! keys that this version does not know at all are left to a warning.

use serde_json::Value;

use super::{
    document::{AdminSettings, AllowedDirectory, ContainersProxy},
    invalid::Invalid,
    keys,
};
use crate::settings::{same_kinds, shares, socket_mount};

/// The supported version of the file format.
const VERSION: u32 = 2;

/// Longest path of a key in a message, in characters.
const MAX_PATH: usize = 200;

/// A valid policy file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parsed {
    /// The known keys.
    pub document: AdminSettings,
    /// Paths of the other keys, which are ignored.
    pub unknown: Vec<String>,
}

/// Parses a policy file.
pub fn parse(text: &[u8]) -> Result<Parsed, Invalid> {
    if text.starts_with(b"\xef\xbb\xbf") {
        return Err(Invalid::Syntax("it starts with a byte order mark; save it as UTF-8 without one".to_owned()));
    }
    let syntax = |error: serde_json::Error| Invalid::Syntax(error.to_string());
    // First as any JSON: this finds text behind the end, which the deserializer below would not read, and nesting so
    // deep that it would exhaust the stack. The kinds of its values are compared later.
    let raw: Value = serde_json::from_slice(text).map_err(syntax)?;
    let mut unknown = Vec::new();
    // Then as a policy. A key that occurs twice is an error here; which one counts would depend on the reader.
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let mut ignored = |path: serde_ignored::Path<'_>| unknown.push(printable(&path.to_string()));
    let document: AdminSettings =
        serde_path_to_error::deserialize(serde_ignored::Deserializer::new(&mut deserializer, &mut ignored)).map_err(
            |error| match error.path().to_string() {
                // The whole file.
                path if path == "." => syntax(error.into_inner()),
                path => Invalid::key(&printable(&path), error.into_inner()),
            },
        )?;
    // An unknown key may be one of Docker Desktop's that has no meaning here. But one that differs from a known key
    // only in case is a mistake, and ignoring it would silently drop a rule.
    for path in &unknown {
        if let Some(known) = keys::names().find(|known| known.eq_ignore_ascii_case(path)) {
            return Err(Invalid::key(path, format!("unknown key; did you mean {known}?")));
        }
    }
    let shown = serde_json::to_value(&document).map_err(syntax)?;
    same_kinds(&shown, &raw).map_err(|other| {
        let path = if other.path.is_empty() { "the file" } else { &other.path };
        Invalid::key(path, format!("must be {}", other.expected))
    })?;
    check(&document)?;
    Ok(Parsed { document, unknown })
}

/// The path of a key for a message. Any user's file can be validated, so no control character of it may reach a
/// terminal or break a line of the log.
fn printable(text: &str) -> String {
    text.chars().take(MAX_PATH).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Checks values that have the right kind but could not be applied. Here, and not when they are used: a VM must not
/// start without a rule because its value turns out to be useless then.
fn check(document: &AdminSettings) -> Result<(), Invalid> {
    if document.configuration_file_version.get().is_some_and(|version| *version != VERSION) {
        return Err(Invalid::key("configurationFileVersion", format!("unsupported version; must be {VERSION}")));
    }
    if let Some(exceptions) =
        document.enhanced_container_isolation.get().and_then(|isolation| isolation.docker_socket_mount.get())
    {
        const PATH: &str = "enhancedContainerIsolation.dockerSocketMount";
        socket_mount::check(exceptions)
            .map_err(|misfit| Invalid::key(&format!("{PATH}{}", misfit.place), misfit.problem))?;
    }
    keys::check(document)?;
    document.containers_proxy.get().map_or(Ok(()), check_ports)?;
    document.filesharing_allowed_directories.get().map_or(Ok(()), |list| check_directories(list))
}

fn check_ports(proxy: &ContainersProxy) -> Result<(), Invalid> {
    let port = |word: &str| word.trim().parse::<u16>().is_ok_and(|port| port != 0);
    match proxy.transparent_ports.as_str() {
        "" | "*" => Ok(()),
        ports if ports.split(',').all(port) => Ok(()),
        _ => {
            let problem = "must be `*`, or port numbers separated by commas";
            Err(Invalid::key("containersProxy.transparentPorts", problem))
        }
    }
}

fn check_directories(list: &[AllowedDirectory]) -> Result<(), Invalid> {
    if let Some(at) = list.iter().position(|directory| !shares::is_path(&directory.path)) {
        return Err(Invalid::key(
            &format!("filesharingAllowedDirectories[{at}].path"),
            "must be an absolute path without `..`, or start with $HOME, $TMP or $TEMP",
        ));
    }
    // They are the default of a setting, which has its own limits.
    if shares::parse(&keys::shared_by_default(list)).is_none() {
        return Err(Invalid::key("filesharingAllowedDirectories", "too many directories are shared by default"));
    }
    Ok(())
}
