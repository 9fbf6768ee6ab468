//! The calls of POSIX and Linux on files, and their errors, as a table (`rows`) that runs in any directory: a disk of
//! this machine as reference, or a directory of the host in a container.
//!
//! Root runs it, in a directory that is root's. Rows about permissions switch to users of their own.

mod place;
mod rows;

use std::path::Path;

use rustix::io::Errno;

use place::Place;

/// A call under one condition.
struct Row {
    /// The call and the condition.
    name: &'static str,
    /// The result that POSIX and Linux document.
    expected: Result<(), Errno>,
    /// Makes the call in an empty directory of its own.
    run: fn(&Place) -> Result<(), Errno>,
}

/// Runs all rows below a directory; returns a line for each that differs, and the number of rows.
#[must_use]
pub fn run(directory: &Path) -> (Vec<String>, usize) {
    let mut differing = Vec::new();
    let mut rows = 0;
    for row in rows::ALL.iter().flat_map(|part| *part) {
        let place = match Place::new(directory, rows) {
            Ok(place) => place,
            Err(error) => return (vec![format!("cannot make a directory for the rows: {error}")], rows + 1),
        };
        rows += 1;
        let result = (row.run)(&place);
        if result != row.expected {
            differing.push(format!("{}: {result:?} instead of {:?}", row.name, row.expected));
        }
        if let Err(error) = place.remove() {
            differing.push(format!("{}: cannot be cleaned up: {error}", row.name));
        }
    }
    (differing, rows)
}
