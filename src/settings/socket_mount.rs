//! Exceptions for containers that need the engine's socket: `dockerSocketMount`, a key of the policy and a setting.
//!
//! Both have the same form, in the policy as an object and in the setting as the text of one. The guest's gate decides
//! by these lists; here they are only checked and passed on. The doc comments of the types appear in
//! `docs/admin-settings.schema.json`.

use bulkhead_protocol::{SocketCommands, SocketExceptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{kinds::same_kinds, maybe::Maybe};

/// Longest text, in bytes. All of the guest's configuration has to fit into one message.
const MAX_TEXT: usize = 16 * 1024;

/// Longest name of an image or a command, in bytes.
const MAX_WORD: usize = 512;

/// Exceptions for containers that need the Docker socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SocketMount {
    /// Images whose containers may use the socket.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub image_list: Maybe<ImageList>,
    /// Commands that these containers may or may not use.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub command_list: Maybe<CommandList>,
}

/// Images whose containers may use the Docker socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageList {
    /// `name[:tag]` with `*` for any tag, `name@digest`, `sha256:…` for the image with this ID, or `*` for all images.
    #[serde(default)]
    pub images: Vec<String>,
    /// Local images built from these may use it, too.
    #[serde(default = "allowed")]
    pub allow_derived_images: bool,
}

fn allowed() -> bool {
    true
}

/// A list of refused or allowed commands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandList {
    /// Meaning of the list.
    #[serde(default, rename = "type")]
    pub kind: ListKind,
    /// Names as in `docker --help`, or groups such as `image*`.
    pub commands: Vec<String>,
}

/// Meaning of a list of commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ListKind {
    /// The listed commands are refused.
    #[default]
    Deny,
    /// Only the listed commands are allowed.
    Allow,
}

/// Parses the text of the setting; `None` for one that is not valid. An empty text has no exceptions.
pub(super) fn parse(text: &str) -> Option<SocketMount> {
    if text.trim().is_empty() {
        return Some(SocketMount::default());
    }
    if text.len() > MAX_TEXT {
        return None;
    }
    // Unlike in a policy, an unknown key is an error: the setting has no warnings, and a misspelt `allowDerivedImages`
    // would allow more than its author wanted.
    let mut unknown = false;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let mount: SocketMount = serde_ignored::deserialize(&mut deserializer, |_| unknown = true).ok()?;
    deserializer.end().ok()?;
    same_kinds(&serde_json::to_value(&mount).ok()?, &serde_json::from_str(text).ok()?).ok()?;
    (!unknown && check(&mount).is_ok()).then_some(mount)
}

/// A part of the exceptions that cannot be applied.
#[derive(Debug)]
pub(super) struct Misfit {
    /// Its path below `dockerSocketMount`, such as `.imageList.images[0]`.
    pub(super) place: String,
    /// The remedy.
    pub(super) problem: &'static str,
}

/// Checks that exceptions can be applied, for a policy or a setting.
pub(super) fn check(exceptions: &SocketMount) -> Result<(), Misfit> {
    let misfit = |place: String, problem| Err(Misfit { place, problem });
    let word = |text: &str| (1..=MAX_WORD).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    let images = exceptions.image_list.get().map(|list| list.images.as_slice()).unwrap_or_default();
    if let Some(at) = images.iter().position(|image| !word(image)) {
        return misfit(format!(".imageList.images[{at}]"), "must be name[:tag], name@digest or *");
    }
    // Measured as the guest gets it; a policy file may have more white space.
    if serde_json::to_string(exceptions).map_or(true, |text| text.len() > MAX_TEXT) {
        return misfit(String::new(), "longer than 16 KiB");
    }
    let commands = exceptions.command_list.get().map(|list| list.commands.as_slice()).unwrap_or_default();
    // The gate knows the commands. A name that it does not know is accepted here and matches no request.
    let command = |text: &String| {
        let name = text.strip_suffix('*').unwrap_or(text);
        word(name) && name.bytes().all(|byte| byte.is_ascii_lowercase())
    };
    if let Some(at) = commands.iter().position(|text| !command(text)) {
        let place = format!(".commandList.commands[{at}]");
        return misfit(place, "must be a command name as in `docker --help`, or a group such as image*");
    }
    Ok(())
}

/// The exceptions in the form that the guest gets.
pub(super) fn exceptions(mount: &SocketMount) -> SocketExceptions {
    let images = mount.image_list.get();
    SocketExceptions {
        images: images.map(|list| list.images.clone()).unwrap_or_default(),
        // Without a list of images nothing is allowed, and so is nothing built from it.
        derived: images.is_some_and(|list| list.allow_derived_images),
        commands: mount
            .command_list
            .get()
            .map(|list| SocketCommands { allow: list.kind == ListKind::Allow, commands: list.commands.clone() }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_docker_documents_is_taken_with_its_defaults() {
        let text = r#"{"imageList": {"images": ["docker:cli", "testcontainers/*:*"]},
                       "commandList": {"commands": ["push", "image*"]}}"#;
        let read = exceptions(&parse(text).unwrap());
        assert_eq!(read.images, ["docker:cli", "testcontainers/*:*"]);
        assert!(read.derived, "images that are built from these are allowed unless it says otherwise");
        assert_eq!(
            read.commands,
            Some(SocketCommands { allow: false, commands: vec!["push".into(), "image*".into()] })
        );
        let text = r#"{"imageList": {"images": ["*"], "allowDerivedImages": false}, "commandList": {"type": "allow", "commands": ["ps"]}}"#;
        let read = exceptions(&parse(text).unwrap());
        assert!(!read.derived && read.commands.is_some_and(|list| list.allow));
    }

    #[test]
    fn nothing_allows_nobody() {
        for text in ["", " \n", "{}"] {
            assert_eq!(exceptions(&parse(text).unwrap()), SocketExceptions::default(), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_understood_in_full_is_not_taken() {
        for text in [
            "[]",
            "null",
            r#"[{"images": ["*"]}]"#,
            r#"{"imageList": [["*"]]}"#,
            r#"{"commandList": ["deny", ["push"]]}"#,
            r#"{"commandList": {"type": {"deny": null}, "commands": ["push"]}}"#,
            r#"{"imageList": {"images": ["a"]}, "imageList": {"images": ["b"]}}"#,
            "{} {}",
            r#"{"imagelist": {"images": ["*"]}}"#,
            r#"{"imageList": {"images": ["a b"]}}"#,
            r#"{"imageList": {"images": ["*"], "allowDerived": false}}"#,
            r#"{"imageList": null}"#,
            r#"{"commandList": {"type": "maybe", "commands": []}}"#,
            r#"{"commandList": {"commands": ["--push"]}}"#,
        ] {
            assert!(parse(text).is_none(), "{text}");
        }
        let long = format!(r#"{{"imageList": {{"images": [{}"a"]}}}}"#, "\"aaaaaaaa\",".repeat(MAX_TEXT / 10));
        assert!(parse(&long).is_none());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in ".{0,80}") {
            let _ = parse(&text);
        }
    }
}
