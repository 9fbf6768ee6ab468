//! Formats errors and panics on one line.

use std::{error::Error, panic::PanicHookInfo, thread};

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

/// Returns the thread, the place and the text of a panic.
pub fn panic(info: &PanicHookInfo<'_>) -> String {
    let thread = thread::current();
    let place = info.location().map_or_else(|| "an unknown place".to_owned(), ToString::to_string);
    let text = info.payload_as_str().unwrap_or("a panic without a text");
    format!("the thread `{}` panicked at {place}: {text}", thread.name().unwrap_or("unnamed"))
}
