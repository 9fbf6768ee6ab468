//! Profile names.

use std::{fmt, str::FromStr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest profile name in bytes. Socket paths, which contain it, are short (unix(7)).
const MAX_NAME: usize = 40;

/// The one name that would make a profile's directory that of the guest images.
pub(super) const IMAGE: &str = "image";

/// A text that is not a profile name.
#[derive(Debug, thiserror::Error)]
pub enum InvalidName {
    /// Other characters, or too many.
    #[error(
        "a profile name has 1 to {MAX_NAME} characters from a-z, 0-9, `-` and `_`, and starts with a letter or digit"
    )]
    Grammar,
    /// A name that has another use.
    #[error("`{IMAGE}` cannot be a profile name, because the directory of that name has the guest images; use another")]
    Reserved,
}

/// The name of a profile: one engine with its own VM, disk, settings and sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "String", into = "String")]
pub struct ProfileName(String);

impl ProfileName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether it is the profile that is used without `--profile`.
    pub fn is_default(&self) -> bool {
        self.0 == "default"
    }

    /// The name of the profile's docker context.
    pub fn context(&self) -> String {
        if self.is_default() { "bulkhead".into() } else { format!("bulkhead-{}", self.0) }
    }

    /// The guest's host name.
    pub fn hostname(&self) -> String {
        // A host name has neither underscores nor a hyphen at its end (RFC 1123, 2.1).
        self.context().replace('_', "-").trim_end_matches('-').to_owned()
    }
}

impl Default for ProfileName {
    fn default() -> Self {
        Self("default".into())
    }
}

impl FromStr for ProfileName {
    type Err = InvalidName;

    fn from_str(name: &str) -> Result<Self, InvalidName> {
        // The name is a component of paths and a part of the docker context's: no `/`, no dot, no upper case, and no
        // leading `-` that would look like an option.
        let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        let first = name.bytes().next().is_some_and(word);
        let rest = name.bytes().all(|byte| word(byte) || byte == b'-' || byte == b'_');
        match first && rest && name.len() <= MAX_NAME {
            true if name == IMAGE => Err(InvalidName::Reserved),
            true => Ok(Self(name.to_owned())),
            false => Err(InvalidName::Grammar),
        }
    }
}

impl TryFrom<String> for ProfileName {
    type Error = InvalidName;

    fn try_from(name: String) -> Result<Self, InvalidName> {
        name.parse()
    }
}

impl From<ProfileName> for String {
    fn from(name: ProfileName) -> Self {
        name.0
    }
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for name in ["", ".", "..", "a/b", "-a", "_a", "A", "a.b", "a b", "ä", "a\0"] {
            assert!(name.parse::<ProfileName>().is_err(), "{name:?}");
        }
        assert!("x".repeat(MAX_NAME + 1).parse::<ProfileName>().is_err());
    }

    #[test]
    fn the_directory_of_the_guest_images_is_no_profile() {
        assert!(matches!("image".parse::<ProfileName>(), Err(InvalidName::Reserved)));
        assert!("images".parse::<ProfileName>().is_ok());
    }

    #[test]
    fn the_context_carries_the_profile_unless_it_is_the_default() {
        assert_eq!(ProfileName::default().context(), "bulkhead");
        assert_eq!("ci_1".parse::<ProfileName>().unwrap().context(), "bulkhead-ci_1");
        assert_eq!("ci_1".parse::<ProfileName>().unwrap().hostname(), "bulkhead-ci-1");
    }

    proptest! {
        #[test]
        fn the_grammar_is_accepted_and_kept(name in "[a-z0-9][a-z0-9_-]{0,39}") {
            prop_assume!(name != IMAGE);
            prop_assert_eq!(String::from(name.parse::<ProfileName>().unwrap()), name);
        }

        #[test]
        fn an_accepted_name_is_one_plain_path_component(name in any::<String>()) {
            if let Ok(name) = name.parse::<ProfileName>() {
                let components: Vec<_> = std::path::Path::new(name.as_str()).components().collect();
                prop_assert_eq!(components, vec![std::path::Component::Normal(name.as_str().as_ref())]);
            }
        }
    }
}
