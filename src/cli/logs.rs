//! `bulkhead logs`.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::MetadataExt,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::ValueEnum;

use super::{CliError, print};
use crate::{backend::logs, settings::Paths};

/// Time between two reads of a followed file.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// Longest unfinished line that is kept while following, in bytes.
const MAX_UNFINISHED: usize = 64 * 1024;

/// A choice of logs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Source {
    /// Both logs.
    #[default]
    All,
    /// The guest's console.
    Console,
    /// The backend and the VM process.
    Backend,
}

/// Show the guest's console and the backend's log.
///
/// Control characters and terminal escape sequences are removed.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = "\
Examples:
  bulkhead logs -n 20
  bulkhead logs -f --source console")]
pub(super) struct Arguments {
    /// Keep printing new lines until interrupted.
    #[arg(short, long)]
    follow: bool,
    /// Number of lines to show from the end of each log.
    #[arg(short = 'n', long, default_value_t = 100, value_name = "N")]
    lines: usize,
    /// Log to show.
    #[arg(long, value_enum, default_value_t)]
    source: Source,
}

pub(super) fn run(paths: &Paths, arguments: Arguments) -> Result<ExitCode, CliError> {
    let all = [(Source::Backend, "backend", paths.backend_log()), (Source::Console, "console", paths.console_log())];
    let mut followers = Vec::new();
    for (source, name, path) in all {
        if arguments.source != Source::All && arguments.source != source {
            continue;
        }
        let prefix = if arguments.source == Source::All { format!("{name} | ") } else { String::new() };
        let mut follower = Follower { path, prefix, file: None, place: 0, inode: 0, unfinished: Vec::new() };
        // First to the end of the file, then the last lines: one written in between is shown twice rather than never.
        follower.skip().map_err(CliError::io("cannot read the log"))?;
        for line in logs::tail(&follower.path, arguments.lines).map_err(CliError::io("cannot read the log"))? {
            print(&format!("{}{line}", follower.prefix))?;
        }
        followers.push(follower);
    }
    // With `--follow` the files may still come.
    if !arguments.follow && followers.iter().all(|follower| follower.file.is_none()) {
        return Err(CliError::Failed(format!("profile `{}` has no logs; it has never been started", paths.name())));
    }
    if arguments.follow { follow(&mut followers) } else { Ok(ExitCode::SUCCESS) }
}

/// Prints new lines until the process is interrupted or its reader is gone.
fn follow(followers: &mut [Follower]) -> Result<ExitCode, CliError> {
    // Polled, which also works for files that do not exist yet or get replaced.
    loop {
        for follower in &mut *followers {
            for line in follower.read().map_err(CliError::io("cannot read the log"))? {
                print(&line)?;
            }
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

/// Reads the lines appended to a file, and continues with the new file after a rotation.
struct Follower {
    path: PathBuf,
    prefix: String,
    file: Option<File>,
    place: u64,
    inode: u64,
    unfinished: Vec<u8>,
}

impl Follower {
    fn reopen(&mut self) -> io::Result<()> {
        match File::open(&self.path) {
            Ok(file) => {
                // Opened again each time, because a rotation puts another file at this path. A file that shrank starts
                // over, too. Lines that were written to the old file since the last read are lost.
                let metadata = file.metadata()?;
                if metadata.ino() != self.inode || metadata.len() < self.place {
                    (self.place, self.inode) = (0, metadata.ino());
                    self.unfinished.clear();
                }
                self.file = Some(file);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Skips the present contents.
    fn skip(&mut self) -> io::Result<()> {
        self.reopen()?;
        if let Some(file) = &self.file {
            self.place = file.metadata()?.len();
        }
        Ok(())
    }

    fn read(&mut self) -> io::Result<Vec<String>> {
        self.reopen()?;
        let Some(file) = &mut self.file else { return Ok(Vec::new()) };
        file.seek(SeekFrom::Start(self.place))?;
        // At most 1 MiB at a time: a guest that floods its console must not make this process grow.
        let mut chunk = Vec::new();
        self.place += file.take(1 << 20).read_to_end(&mut chunk)? as u64;
        self.unfinished.extend_from_slice(&chunk);
        // The rest of the last line may still come. One without an end, which the guest can write, is shown in parts.
        let whole = match self.unfinished.iter().rposition(|byte| *byte == b'\n') {
            Some(end) => end + 1,
            None if self.unfinished.len() > MAX_UNFINISHED => self.unfinished.len(),
            None => 0,
        };
        let lines: Vec<u8> = self.unfinished.drain(..whole).collect();
        let lines = String::from_utf8_lossy(&lines);
        Ok(lines.lines().map(|line| format!("{}{}", self.prefix, logs::clean(line))).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    #[test]
    fn a_follower_shows_whole_lines_and_goes_on_after_a_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        fs::write(&path, "old\n").unwrap();
        let mut follower = Follower {
            path: path.clone(),
            prefix: "> ".into(),
            file: None,
            place: 0,
            inode: 0,
            unfinished: Vec::new(),
        };
        follower.skip().unwrap();
        let mut file = logs::append(&path).unwrap();
        write!(file, "one\ntw").unwrap();
        assert_eq!(follower.read().unwrap(), ["> one"]);
        writeln!(file, "o").unwrap();
        assert_eq!(follower.read().unwrap(), ["> two"]);
        logs::rotate(&path).unwrap();
        writeln!(logs::append(&path).unwrap(), "three").unwrap();
        assert_eq!(follower.read().unwrap(), ["> three"]);
    }
}
