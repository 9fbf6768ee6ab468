//! Formats an error and its source chain on one line.

use std::error::Error;

/// Returns the error and all of its sources, joined by colons.
pub fn chain(error: &dyn Error) -> String {
    // An error's own text does not repeat its source, by convention of this program; so each appears once.
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
