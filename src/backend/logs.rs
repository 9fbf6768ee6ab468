//! Log files: rotation, and reading them without trusting the guest, which writes most of their lines.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Number of the console's last lines that are shown with a failure.
pub const CONSOLE_LINES: usize = 20;

/// Longest end of a file that is searched for its last lines, in bytes.
const MAX_TAIL: u64 = 256 * 1024;

/// Longest line that is shown, in bytes.
const MAX_LINE: usize = 2000;

/// Returns the path of the rotated file.
pub fn previous(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Keeps the file as `<path>.1` and creates an empty one.
pub fn rotate(path: &Path) -> io::Result<()> {
    match fs::rename(path, previous(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => append(path).map(drop),
    }
}

/// Opens a log for appending; only its owner may read it.
pub fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Returns the last `lines` lines of a file, cleaned; none of a missing file.
pub fn tail(path: &Path, lines: usize) -> io::Result<Vec<String>> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    // The console's log may have many MiB, and a guest decides how long its lines are.
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(MAX_TAIL)))?;
    let mut bytes = Vec::new();
    file.take(MAX_TAIL).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<String> = text.lines().map(clean).collect();
    Ok(all[all.len().saturating_sub(lines)..].to_vec())
}

/// Returns a line without anything that a terminal would act on.
///
/// The guest decides what is in it: an escape sequence could hide a message, rename the window or, in some terminals,
/// type a command.
pub fn clean(line: &str) -> String {
    let mut characters = line.chars().peekable();
    let mut text = String::new();
    while let Some(character) = characters.next() {
        if character == '\u{1b}' && characters.peek() == Some(&'[') {
            characters.next();
            // A control sequence is skipped whole, or its parameters would remain as text. It ends with its first byte
            // from @ to ~ (ECMA-48, 5.4). Of any other sequence only the escape character goes, which makes it
            // harmless.
            while characters.next_if(|next| ('\u{20}'..'\u{40}').contains(next)).is_some() {}
            characters.next_if(|next| ('\u{40}'..'\u{7f}').contains(next));
        } else if character == '\t' || !character.is_control() {
            text.push(character);
        }
        if text.len() >= MAX_LINE {
            break;
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn colours_and_control_characters_are_gone() {
        assert_eq!(clean("\u{1b}[1;31mred\u{1b}[0m\tand\u{7}\u{1b}]0;title\r"), "red\tand]0;title");
    }

    #[test]
    fn the_last_lines_are_returned_in_order() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "a\nb\nc\nd").unwrap();
        assert_eq!(tail(file.path(), 2).unwrap(), ["c", "d"]);
        assert_eq!(tail(file.path(), 9).unwrap().len(), 4);
        assert!(tail(Path::new("/nowhere/at/all"), 2).unwrap().is_empty());
    }

    #[test]
    fn rotation_keeps_one_old_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("console.log");
        rotate(&path).unwrap();
        fs::write(&path, "one").unwrap();
        rotate(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "");
        assert_eq!(fs::read_to_string(previous(&path)).unwrap(), "one");
    }

    proptest! {
        #[test]
        fn no_line_keeps_a_control_character(line in any::<String>()) {
            prop_assert!(clean(&line).chars().all(|character| character == '\t' || !character.is_control()));
        }
    }
}
