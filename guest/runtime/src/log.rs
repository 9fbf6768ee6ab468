//! The log of errors: the `--log` file in the format that containerd's shim reads, or stderr.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_guest_common::error::chain;

/// `--log-format`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Format {
    /// `time="…" level=error msg="…"`.
    #[default]
    Text,
    /// One JSON object a line with the keys `level`, `msg` and `time`.
    Json,
}

/// The log that the caller asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Log {
    /// `--log`; `None` is stderr.
    pub(crate) file: Option<PathBuf>,
    /// `--log-format`.
    pub(crate) format: Format,
}

impl Log {
    /// The log file, if its lines are JSON.
    pub(crate) fn json(&self) -> Option<&Path> {
        self.file.as_deref().filter(|_| matches!(self.format, Format::Json))
    }

    /// Reports an error with the chain of its causes.
    ///
    /// With a log file, stderr can be the container's own output, so nothing goes there.
    pub(crate) fn error(&self, error: &dyn std::error::Error) {
        let line = self.line(&chain(error), SystemTime::now());
        let written = match &self.file {
            None => Err(io::ErrorKind::Unsupported.into()),
            Some(path) => OpenOptions::new().create(true).append(true).open(path).and_then(|mut f| f.write_all(&line)),
        };
        // A log that cannot be written must not swallow the error.
        if written.is_err() {
            let _ = io::stderr().write_all(&line);
        }
    }

    fn line(&self, message: &str, now: SystemTime) -> Vec<u8> {
        let time = rfc3339(now);
        let mut line = match self.format {
            Format::Json => serde_json::json!({ "level": "error", "msg": message, "time": time }).to_string(),
            // For a user at a terminal.
            Format::Text if self.file.is_none() => message.to_owned(),
            // logrus' form, as runc writes it.
            Format::Text => format!("time=\"{time}\" level=error msg={message:?}"),
        };
        line.push('\n');
        line.into_bytes()
    }
}

/// UTC in RFC 3339, whole seconds; Howard Hinnant's days-to-civil algorithm.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1_460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn json_lines_carry_what_the_shim_looks_for() {
        let log = Log { file: Some("/x".into()), format: Format::Json };
        let line = log.line("can't \"do\"\nit", UNIX_EPOCH + Duration::from_hours(264_384));
        assert_eq!(line.last(), Some(&b'\n'));
        let value: serde_json::Value = serde_json::from_slice(&line).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "can't \"do\"\nit");
        assert_eq!(value["time"], "2000-02-29T00:00:00Z");
    }
}
