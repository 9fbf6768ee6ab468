//! Sizes on the command line: `8G`, `8GiB`, `512M`.

use std::{fmt, str::FromStr};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// A text that is not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum InvalidSize {
    /// Without a number, or without a known unit.
    #[error("must be a whole number with a unit, such as 512M, 8G or 1T (powers of 1024; 8GiB is the same as 8G)")]
    Syntax,
    /// More bytes than 64 bits count.
    #[error("the size is too large")]
    TooLarge,
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// From bytes.
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// In MiB, rounded down.
    pub const fn mib(self) -> u64 {
        self.0 / MIB
    }

    /// In GiB, rounded up.
    pub const fn gib_ceil(self) -> u64 {
        self.0.div_ceil(GIB)
    }
}

impl FromStr for Size {
    type Err = InvalidSize;

    fn from_str(text: &str) -> Result<Self, InvalidSize> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(InvalidSize::Syntax);
        }
        // A bare number is refused: docker takes it as bytes, other tools as MiB.
        // All units are powers of 1024, as docker takes them for `--memory`.
        let factor = match unit.to_ascii_lowercase().as_str() {
            "k" | "kb" | "kib" => 1 << 10,
            "m" | "mb" | "mib" => MIB,
            "g" | "gb" | "gib" => GIB,
            "t" | "tb" | "tib" => 1 << 40,
            _ => return Err(InvalidSize::Syntax),
        };
        let number: u64 = number.parse().map_err(|_| InvalidSize::TooLarge)?;
        number.checked_mul(factor).map(Self).ok_or(InvalidSize::TooLarge)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            bytes if bytes >= GIB && bytes.is_multiple_of(GIB) => write!(f, "{} GiB", bytes / GIB),
            // From here on a fraction of a GiB does not matter to a reader.
            bytes if bytes >= 10 * GIB => write!(f, "{} GiB", bytes / GIB),
            bytes => write!(f, "{} MiB", bytes / MIB),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_short_and_the_long_unit_mean_the_same() {
        for text in ["8G", "8g", "8GiB", "8gb", "8192M", "8192MiB"] {
            assert_eq!(text.parse(), Ok(Size(8 * GIB)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "G", "8", "-8G", "8 G", "1.5G", "8Gi", "8GG", "0x8G", "８G"] {
            assert_eq!(text.parse::<Size>(), Err(InvalidSize::Syntax), "{text}");
        }
        for text in ["99999999999999999999G", "18014398509481984T"] {
            assert_eq!(text.parse::<Size>(), Err(InvalidSize::TooLarge), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in any::<String>()) {
            let _ = text.parse::<Size>();
        }

        #[test]
        fn a_number_of_mib_reads_back(mib in 0_u64..1 << 40) {
            prop_assert_eq!(format!("{mib}M").parse::<Size>().unwrap().mib(), mib);
        }
    }
}
