//! Translates errors of crun into runc's words, where callers of the engine go by the words.
//!
//! The docker CLI exits with 127 or 126 if the error of `docker run` contains "no such file or directory" or
//! "permission denied", as Go writes them. The C library starts both with a capital letter, and crun has words of its
//! own for some. Untranslated, they would make the CLI exit with 125.

use std::{
    fs::File,
    io::{Seek, SeekFrom},
    path::Path,
};

use bulkhead_guest_common::bounded;
use serde_json::Value;

/// The number of bytes at a log's end that are read; crun's error is its last line.
const MAX_TAIL: u64 = 16 * 1024;

/// The reasons that callers look for: the C library's text, and Go's.
const REASONS: [(&str, &str); 2] =
    [("No such file or directory", "no such file or directory"), ("Permission denied", "permission denied")];

/// The last error of a JSON log in runc's words; `None` when crun's own are good enough.
pub(crate) fn of_log(path: &Path) -> Option<String> {
    let mut log = File::open(path).ok()?;
    let end = log.seek(SeekFrom::End(0)).ok()?;
    // Earlier commands have written to the same log, so only its end is of interest.
    log.seek(SeekFrom::Start(end.saturating_sub(MAX_TAIL))).ok()?;
    let tail = bounded::read(log, MAX_TAIL).ok()?;
    // The first line of the tail can be cut off; it is not JSON then, and is skipped.
    let mut lines = tail.rsplit(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let last = lines.find(|line| line["level"] == "error")?;
    translate(last["msg"].as_str()?)
}

/// Translates a message; `None` when it contains none of the reasons.
fn translate(message: &str) -> Option<String> {
    // The longer forms first: they end in a reason as well.
    let known = |(reason, word): (&str, &str)| message.contains(reason).then(|| message.replace(reason, word));
    command(message).or_else(|| REASONS.into_iter().find_map(known))
}

/// Translates the message about a command that does not exist or may not be executed, as crun words it.
fn command(message: &str) -> Option<String> {
    let cut = |before, after| message.split_once(before).and_then(|(_, rest): (_, &str)| rest.split_once(after));
    let reason =
        |command: &str, reason: &str| format!("unable to start container process: exec: {command:?}: {reason}");
    if let Some((name, rest)) = cut("executable file `", "` not found") {
        // Go looks up a bare name in the PATH, and stats a path; the two have different texts.
        return Some(if rest.starts_with(" in $PATH") {
            reason(name, "executable file not found in $PATH")
        } else {
            reason(name, &format!("stat {name}: no such file or directory"))
        });
    }
    let (name, _) = cut("the path `", "` exists but it is not executable")?;
    Some(reason(name, "permission denied"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_command_that_is_not_there_is_told_as_runc_tells_it() {
        assert_eq!(
            translate("executable file `nosuch` not found in $PATH: No such file or directory").unwrap(),
            "unable to start container process: exec: \"nosuch\": executable file not found in $PATH"
        );
        assert_eq!(
            translate("executable file `/nosuch` not found: No such file or directory").unwrap(),
            "unable to start container process: exec: \"/nosuch\": stat /nosuch: no such file or directory"
        );
    }

    #[test]
    fn a_command_that_may_not_be_run_is_told_with_gos_reason() {
        let message = "open executable: Permission denied";
        assert_eq!(translate(message).unwrap(), "open executable: permission denied");
        assert_eq!(
            translate("the path `/etc/passwd` exists but it is not executable: Operation not permitted").unwrap(),
            "unable to start container process: exec: \"/etc/passwd\": permission denied"
        );
        assert_eq!(translate("unknown version specified"), None);
    }

    #[test]
    fn the_last_error_of_the_log_counts() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            of_log(file.path())
        };
        let line = |level: &str, message: &str| format!("{}\n", serde_json::json!({ "level": level, "msg": message }));
        let denied = line("error", "exec: Permission denied");
        assert_eq!(log(&format!("{}{denied}", line("error", "else"))).unwrap(), "exec: permission denied");
        assert_eq!(log(&format!("{denied}{}", line("error", "else"))), None);
        assert_eq!(log(&format!("{denied}{}cut off", line("warning", "else"))).unwrap(), "exec: permission denied");
        assert_eq!(log(&format!("{denied}{}", "x".repeat(MAX_TAIL as usize))), None);
        assert_eq!(log(""), None);
    }

    proptest! {
        #[test]
        fn no_message_panics_or_keeps_the_reason(message in "(executable file `)?[a-z` ]{0,9}(` not found)?( in \\$PATH)?(: No such file or directory|: Permission denied)?") {
            let translated = translate(&message).unwrap_or(message);
            prop_assert!(REASONS.iter().all(|(reason, _)| !translated.contains(reason)));
        }
    }
}
