//! `backend.log`: the lines of the backend and of its child processes, in a file of bounded size.
//!
//! One process writes to the file, so one place decides when it is renamed. The children's output comes through pipes:
//! a vmm or network process under the control of its guest can fill neither the disk nor the backend's memory, and
//! cannot keep the backend from its other work.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use nix::{fcntl::OFlag, unistd};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::sleep};
use tracing_subscriber::fmt::MakeWriter;

use super::logs;
use crate::log::{MAX_LINE, cut};

/// Size in bytes from which the file is kept as the previous one; both together have at most twice this size and a
/// line.
const MAX_LOG: u64 = 4 << 20;

/// Bytes of a child's output that are read at once.
const CHUNK: usize = 16 * 1024;

/// Pause after each chunk of a child's output. Its pipe holds four chunks meanwhile, and a child that writes more loses
/// lines.
const CHUNK_INTERVAL: Duration = Duration::from_millis(50);

/// The log of a backend. Clones write to the same file.
#[derive(Clone, Debug)]
pub struct LogFile(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    file: File,
    /// Bytes in the file.
    length: u64,
    limit: u64,
    /// Standard error of this process is the file.
    standard_error: bool,
}

impl LogFile {
    /// Opens the file for appending. With `standard_error`, that of this process follows the file when it is renamed.
    pub fn open(path: &Path, standard_error: bool) -> io::Result<Self> {
        Self::with_limit(path, standard_error, MAX_LOG)
    }

    fn with_limit(path: &Path, standard_error: bool, limit: u64) -> io::Result<Self> {
        let file = logs::append(path)?;
        let length = file.metadata()?.len();
        Ok(Self(Arc::new(Mutex::new(Inner { path: path.to_owned(), file, length, limit, standard_error }))))
    }

    /// Returns the write end of a pipe for the output of a child. Its lines are in the log with the child's `name`.
    pub fn child(&self, name: &'static str) -> io::Result<OwnedFd> {
        // A write to a full pipe fails instead of waiting: a child must not stand still when this process does.
        let (reader, writer) = unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let reader = pipe::Receiver::from_owned_fd(reader)?;
        tokio::spawn(copy(reader, self.clone(), name));
        Ok(writer)
    }

    fn append(&self, line: &[u8]) -> io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).append(line)
    }
}

impl Inner {
    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.length >= self.limit {
            // Lines are lost while it cannot be renamed: the bound holds in any case.
            logs::rotate(&self.path)?;
            self.file = logs::append(&self.path)?;
            self.length = 0;
            if self.standard_error {
                unistd::dup2_stderr(&self.file)?;
            }
        }
        let line = cut(line);
        self.file.write_all(&line)?;
        // Lines that a full disk did not take must not push out those that are there.
        self.length += line.len() as u64;
        Ok(())
    }
}

impl Write for &LogFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.append(line).map(|()| line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for LogFile {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

/// Copies a child's lines into the log until the last process that has the pipe is gone.
async fn copy(mut output: pipe::Receiver, log: LogFile, name: &str) {
    let (mut chunk, mut unfinished) = (vec![0; CHUNK], Vec::new());
    while let Ok(length @ 1..) = output.read(&mut chunk).await {
        for byte in &chunk[..length] {
            // A line without an end comes in parts.
            if *byte == b'\n' || unfinished.len() >= MAX_LINE / 2 {
                write(&log, name, &mut unfinished);
            }
            if *byte != b'\n' {
                unfinished.push(*byte);
            }
        }
        sleep(CHUNK_INTERVAL).await;
    }
    write(&log, name, &mut unfinished);
}

fn write(log: &LogFile, name: &str, line: &mut Vec<u8>) {
    if !line.is_empty() {
        let text = logs::clean(&String::from_utf8_lossy(line));
        // A full disk must not end the backend.
        let _ = log.append(format!("{name}: {text}\n").as_bytes());
        line.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn lines(path: &Path) -> Vec<String> {
        fs::read_to_string(path).unwrap_or_default().lines().map(ToOwned::to_owned).collect()
    }

    /// Waits until the log has this line.
    async fn line(path: &Path, wanted: &str) -> bool {
        for _ in 0..500 {
            if lines(path).iter().any(|line| line == wanted) {
                return true;
            }
            sleep(Duration::from_millis(10)).await;
        }
        false
    }

    #[test]
    fn a_log_that_is_written_to_keeps_to_its_bound_and_its_newest_lines() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("backend.log");
        let log = LogFile::with_limit(&path, false, 1000).unwrap();
        for number in 0..1000 {
            log.append(format!("{number:09}\n").as_bytes()).unwrap();
        }
        let sizes = [path.clone(), logs::previous(&path)].map(|path| fs::metadata(path).unwrap().len());
        assert!(sizes.iter().all(|size| *size <= 1000), "{sizes:?}");
        let mut kept = lines(&logs::previous(&path));
        kept.extend(lines(&path));
        assert_eq!(kept.last().unwrap(), "000000999");
        assert!(kept.windows(2).all(|pair| pair[0] < pair[1]) && kept.len() >= 100, "{}", kept.len());
        // Lines of an earlier backend count as well.
        let again = LogFile::with_limit(&path, false, 10).unwrap();
        again.append(b"after\n").unwrap();
        assert_eq!(lines(&path), ["after"]);
    }

    #[tokio::test]
    async fn a_childs_lines_are_in_the_log_with_its_name_and_without_escape_sequences() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("backend.log");
        let log = LogFile::open(&path, false).unwrap();
        let mut writer = File::from(log.child("vmm").unwrap());
        write!(writer, "one\n\u{1b}[31mtwo\u{1b}[0m\nunfini").unwrap();
        assert!(line(&path, "vmm: two").await);
        write!(writer, "shed").unwrap();
        drop(writer);
        assert!(line(&path, "vmm: unfinished").await);
        assert_eq!(lines(&path), ["vmm: one", "vmm: two", "vmm: unfinished"]);
    }

    #[tokio::test]
    async fn a_child_that_floods_its_output_is_never_waited_for_and_loses_what_is_too_much() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("backend.log");
        let log = LogFile::with_limit(&path, false, 8000).unwrap();
        let mut writer = File::from(log.child("network").unwrap());
        let mut refused = 0;
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(500) {
            match writer.write(&[b'x'; 4000]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => refused += 1,
                Err(error) => panic!("{error}"),
            }
            // One thread: the backend's other work, here this loop, goes on.
            tokio::task::yield_now().await;
        }
        assert!(refused > 0);
        for path in [path.clone(), logs::previous(&path)] {
            assert!(fs::metadata(path).unwrap().len() < 8000 + MAX_LINE as u64);
        }
        assert!(lines(&path).iter().all(|line| line.starts_with("network: x") && line.len() <= MAX_LINE));
    }
}
