//! The setting `timeZone`: the time zone of containers that mount the host's.

use std::str::FromStr;

/// Longest name in bytes.
const MAX_NAME: usize = 255;

/// A value of the setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Zone {
    /// The host's.
    #[default]
    OfHost,
    /// The one of this name in the time zone database, such as `Europe/Berlin`.
    Named(String),
}

/// A text that is not a value of the setting.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("must be {}", Zone::EXPECTED)]
pub struct InvalidZone;

impl Zone {
    /// The accepted form, as the end of "must be …".
    pub const EXPECTED: &'static str = "host, or a name of the time zone database such as Europe/Berlin";
}

impl FromStr for Zone {
    type Err = InvalidZone;

    fn from_str(text: &str) -> Result<Self, InvalidZone> {
        // The rules for names in the database's documentation (its file `theory.html`), and the digits of `Etc/GMT+5`.
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'+');
        // So no part is `..`, and the name leads to nothing outside of the database.
        let part = |part: &str| !part.is_empty() && part.bytes().all(allowed);
        match text {
            "host" => Ok(Self::OfHost),
            name if name.len() <= MAX_NAME && name.split('/').all(part) => Ok(Self::Named(name.to_owned())),
            _ => Err(InvalidZone),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_the_hosts_or_a_name_that_leads_nowhere_else() {
        assert_eq!("host".parse(), Ok(Zone::OfHost));
        for name in ["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+5", "America/Port-au-Prince"] {
            assert_eq!(name.parse(), Ok(Zone::Named(name.to_owned())));
        }
        for text in [
            "",
            "/",
            "/Europe/Berlin",
            "Europe/",
            "Europe//Berlin",
            "../localtime",
            "Europe/../Asia",
            "a\nb",
            "posixrules.bak",
        ] {
            assert_eq!(text.parse::<Zone>(), Err(InvalidZone), "{text:?}");
        }
        assert_eq!("x".repeat(256).parse::<Zone>(), Err(InvalidZone));
    }
}
