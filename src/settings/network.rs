//! What a VM's network device is connected to.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// The choices of the setting `network` and of `--net`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NetworkKind {
    /// The host's network, through our own process of this user.
    #[default]
    User,
    /// Nothing: there is no device.
    None,
    /// The host's network, through passt(1).
    Passt,
    /// An existing tap device of this name.
    Tap(String),
}

/// The text names no network.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("write {}", NetworkKind::EXPECTED)]
pub struct InvalidNetwork;

impl NetworkKind {
    /// What is accepted, as the end of "write …".
    pub const EXPECTED: &'static str = "user, none, passt or tap=NAME, with the name of an existing tap device";
}

/// What the kernel takes as an interface's name, and means literally: `%` is a number to be chosen.
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

impl FromStr for NetworkKind {
    type Err = InvalidNetwork;

    fn from_str(text: &str) -> Result<Self, InvalidNetwork> {
        match text {
            "user" => Ok(Self::User),
            "none" => Ok(Self::None),
            "passt" => Ok(Self::Passt),
            _ => match text.strip_prefix("tap=") {
                Some(name) if is_interface(name) => Ok(Self::Tap(name.to_owned())),
                _ => Err(InvalidNetwork),
            },
        }
    }
}

impl TryFrom<String> for NetworkKind {
    type Error = InvalidNetwork;

    fn try_from(text: String) -> Result<Self, InvalidNetwork> {
        text.parse()
    }
}

impl From<NetworkKind> for String {
    fn from(kind: NetworkKind) -> Self {
        kind.to_string()
    }
}

impl fmt::Display for NetworkKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::User => f.write_str("user"),
            Self::None => f.write_str("none"),
            Self::Passt => f.write_str("passt"),
            Self::Tap(name) => write!(f, "tap={name}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_the_kernel_would_change_or_refuse_are_refused() {
        for text in ["", "bridge", "User", "tap", "tap=", "tap=a/b", "tap=.", "tap=..", "tap=tap%d", "tap=a b", "tap=é"]
        {
            assert_eq!(text.parse::<NetworkKind>(), Err(InvalidNetwork), "{text}");
        }
        assert_eq!("tap=sixteen-letters-".parse::<NetworkKind>(), Err(InvalidNetwork));
        assert_eq!("tap=vm-0.1_a".parse(), Ok(NetworkKind::Tap("vm-0.1_a".into())));
    }

    proptest! {
        #[test]
        fn what_is_accepted_reads_back(text in "(user|none|passt|tap=[a-z%./ -]{0,17}|.{0,8})") {
            if let Ok(kind) = text.parse::<NetworkKind>() {
                prop_assert_eq!(kind.to_string(), text);
            }
        }
    }
}
