//! Which containers may have the engine's socket: the policy's `dockerSocketMount`, and a setting of the same form.

use bulkhead_protocol::{SocketCommands, SocketExceptions};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::maybe::Maybe;

/// Longest text, in bytes: with all else that the guest is told it fits into one message.
const MAX_TEXT: usize = 16 * 1024;

/// Longest name of an image or a command, in bytes.
const MAX_WORD: usize = 512;

/// Exceptions for the engine's socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SocketMount {
    /// Whose containers may have it.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub image_list: Maybe<ImageList>,
    /// What may be asked through it.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub command_list: Maybe<CommandList>,
}

/// Images whose containers may have the engine's socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ImageList {
    /// `name[:tag]`, with `*` for any tag, `name@digest`, `sha256:…` for the image of this id, or `*` for all.
    #[serde(default)]
    pub images: Vec<String>,
    /// Whether local images built from these may have it, too.
    #[serde(default = "allowed")]
    pub allow_derived_images: bool,
}

fn allowed() -> bool {
    true
}

/// Commands that are refused, or the only ones that are not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CommandList {
    /// What becomes of the commands.
    #[serde(default, rename = "type")]
    pub kind: ListKind,
    /// Names as in `docker --help`, or groups such as `image*`.
    pub commands: Vec<String>,
}

/// What becomes of the commands of a list.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ListKind {
    /// They are refused.
    #[default]
    Deny,
    /// All others are refused.
    Allow,
}

/// What a text says; `None` when it says nothing that holds. No text is no exception.
pub(super) fn parse(text: &str) -> Option<SocketMount> {
    if text.trim().is_empty() {
        return Some(SocketMount::default());
    }
    if text.len() > MAX_TEXT || !text.trim_start().starts_with('{') {
        return None;
    }
    let mut unknown = false;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let mount: SocketMount = serde_ignored::deserialize(&mut deserializer, |_| unknown = true).ok()?;
    deserializer.end().ok()?;
    (!unknown && check(&mount).is_ok()).then_some(mount)
}

/// A part of exceptions that cannot hold.
#[derive(Debug)]
pub(super) struct Misfit {
    /// Its path below `dockerSocketMount`, such as `.imageList.images[0]`.
    pub(super) place: String,
    /// The remedy.
    pub(super) problem: &'static str,
}

/// Checks that exceptions can hold, for a policy or a setting.
pub(super) fn check(exceptions: &SocketMount) -> Result<(), Misfit> {
    let misfit = |place: String, problem| Err(Misfit { place, problem });
    let word = |text: &str| (1..=MAX_WORD).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic());
    let images = exceptions.image_list.get().map(|list| list.images.as_slice()).unwrap_or_default();
    if let Some(at) = images.iter().position(|image| !word(image)) {
        return misfit(format!(".imageList.images[{at}]"), "write name[:tag], name@digest or *");
    }
    if serde_json::to_string(exceptions).map_or(true, |text| text.len() > MAX_TEXT) {
        return misfit(String::new(), "it is longer than 16 KiB");
    }
    let commands = exceptions.command_list.get().map(|list| list.commands.as_slice()).unwrap_or_default();
    let command = |text: &String| {
        let name = text.strip_suffix('*').unwrap_or(text);
        word(name) && name.bytes().all(|byte| byte.is_ascii_lowercase())
    };
    if let Some(at) = commands.iter().position(|text| !command(text)) {
        let place = format!(".commandList.commands[{at}]");
        return misfit(place, "write a name as in `docker --help`, or a group such as image*");
    }
    Ok(())
}

/// The same for the guest.
pub(super) fn exceptions(mount: &SocketMount) -> SocketExceptions {
    let images = mount.image_list.get();
    SocketExceptions {
        images: images.map(|list| list.images.clone()).unwrap_or_default(),
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
