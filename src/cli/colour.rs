//! Colours of single words on a terminal.
//!
//! There are none where the output goes elsewhere, where `NO_COLOR` is set or `TERM` is `dumb`; `CLICOLOR_FORCE` asks
//! for them everywhere (<https://no-color.org>, <https://bixense.com/clicolors>). The parser of the command line, which
//! prints help and its own errors, keeps the same rules.

use std::{fmt::Display, io};

use anstream::{AutoStream, ColorChoice, adapter::strip_str};
use anstyle::AnsiColor;

/// Meaning of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Warning,
    Bad,
}

/// A word for standard output.
pub(super) fn output(word: &str, tone: Tone) -> String {
    paint(word, tone, AutoStream::choice(&io::stdout()))
}

/// Prints a warning to standard error.
pub(super) fn warn(text: impl Display) {
    diagnose("warning", Tone::Warning, text);
}

/// Prints an error to standard error.
pub(super) fn fail(text: impl Display) {
    diagnose("error", Tone::Bad, text);
}

fn diagnose(word: &str, tone: Tone, text: impl Display) {
    eprintln!("{}: {text}", paint(word, tone, AutoStream::choice(&io::stderr())));
}

/// Number of characters of a text that are visible.
pub(super) fn width(text: &str) -> usize {
    strip_str(text).flat_map(str::chars).count()
}

fn paint(word: &str, tone: Tone, choice: ColorChoice) -> String {
    let style = match tone {
        Tone::Good => AnsiColor::Green.on_default(),
        Tone::Warning => AnsiColor::Yellow.on_default().bold(),
        Tone::Bad => AnsiColor::Red.on_default().bold(),
    };
    match choice {
        ColorChoice::Never | ColorChoice::Auto => word.to_owned(),
        ColorChoice::Always | ColorChoice::AlwaysAnsi => format!("{style}{word}{style:#}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_has_its_colour_only_where_colours_are_wanted_and_is_as_wide_in_any_case() {
        for tone in [Tone::Good, Tone::Warning, Tone::Bad] {
            let painted = paint("wörd", tone, ColorChoice::Always);
            assert!(painted.starts_with("\x1b[") && painted.ends_with("\x1b[0m"), "{painted:?}");
            assert_eq!((width(&painted), width("wörd")), (4, 4));
            assert_eq!(paint("wörd", tone, ColorChoice::Never), "wörd");
        }
    }
}
