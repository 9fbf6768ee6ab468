//! All rows, by what they are about.

mod contents;
mod names;
mod owners;
mod renames;

use rustix::io::Errno;

use crate::{
    Row,
    place::{Outcome, Place},
};

/// All parts of the table.
pub(crate) const ALL: &[&[Row]] = &[names::ROWS, renames::ROWS, owners::ROWS, contents::ROWS];

/// A call that succeeds.
const fn ok(name: &'static str, run: fn(&Place) -> Outcome) -> Row {
    Row { name, expected: Ok(()), run }
}

/// A call that fails.
const fn fails(name: &'static str, error: Errno, run: fn(&Place) -> Outcome) -> Row {
    Row { name, expected: Err(error), run }
}

/// A name that is one byte too long.
fn too_long() -> String {
    "n".repeat(256)
}

/// A path that is too long, of names that are not.
fn deep() -> String {
    "d/".repeat(2048)
}
