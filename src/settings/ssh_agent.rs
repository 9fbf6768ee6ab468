//! The setting `sshAgent`: the ssh-agent of the host that containers may mount.

use std::{
    path::{Path, PathBuf},
    str::FromStr,
};

/// A value of the setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SshAgent {
    /// The one in the environment of the command that starts the VM (`SSH_AUTH_SOCK`), if there is one.
    #[default]
    OfEnvironment,
    /// None.
    Off,
    /// The one that listens on this socket, an absolute path.
    At(PathBuf),
}

/// A text that is not a value of the setting.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be {}", SshAgent::EXPECTED)]
pub struct InvalidSshAgent;

impl SshAgent {
    /// The accepted form, as the end of "must be …".
    pub const EXPECTED: &'static str = "auto, off, or the absolute path of an ssh-agent's socket";
}

impl FromStr for SshAgent {
    type Err = InvalidSshAgent;

    fn from_str(text: &str) -> Result<Self, InvalidSshAgent> {
        match text {
            "auto" => Ok(Self::OfEnvironment),
            "off" => Ok(Self::Off),
            path if Path::new(path).is_absolute() && !path.chars().any(char::is_control) => {
                Ok(Self::At(PathBuf::from(path)))
            }
            _ => Err(InvalidSshAgent),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_a_word_or_an_absolute_path() {
        assert_eq!("auto".parse(), Ok(SshAgent::default()));
        assert_eq!("off".parse(), Ok(SshAgent::Off));
        assert_eq!("/run/user/1000/keyring/ssh".parse(), Ok(SshAgent::At("/run/user/1000/keyring/ssh".into())));
        for text in ["", "on", "agent.sock", "./agent", "~/agent", "/a\nb"] {
            assert_eq!(text.parse::<SshAgent>(), Err(InvalidSshAgent), "{text:?}");
        }
    }
}
