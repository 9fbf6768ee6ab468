//! The setting `network`: the other end of a VM's network device.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// A value of the setting `network` and of `--net`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum NetworkKind {
    /// User-mode networking: our own process turns connections into sockets of this user.
    #[default]
    User,
    /// No network device.
    None,
    /// User-mode networking by passt(1).
    Passt,
    /// An existing tap device of this name.
    Tap(String),
}

/// A text that is not a kind of network.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be {}", NetworkKind::EXPECTED)]
pub struct InvalidNetwork;

impl NetworkKind {
    /// The accepted form, as the end of "must be …".
    pub const EXPECTED: &'static str = "user, none, passt or tap=NAME with the name of an existing tap device";
    /// The same as a regular expression of JSON Schema.
    pub const PATTERN: &'static str = r"^(user|none|passt|tap=(?!\.{1,2}$)[A-Za-z0-9._-]{1,15})$";
}

/// Accepts an interface name that the kernel takes literally (`dev_valid_name` of `net/core/dev.c`): at most 15 bytes
/// (`IFNAMSIZ`), and no `%`, with which it would choose a number itself.
fn is_interface(name: &str) -> bool {
    // Stricter than the kernel, which also takes other printable characters: the name goes into messages and paths of
    // sysfs.
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
            // The name is checked by its form only: the device may be created before the VM is started, or on another
            // host.
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
