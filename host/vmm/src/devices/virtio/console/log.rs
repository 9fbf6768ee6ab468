//! The log of the guest's console: a bounded file, and the last bytes in memory.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, Seek, SeekFrom, Write},
};

/// Maximum length of the file in bytes. It starts again from empty when it is reached, so that a guest cannot fill the
/// host's disk.
const MAX_FILE_LEN: u64 = 16 << 20;
/// Maximum length of the tail in memory, in bytes.
const MAX_TAIL_LEN: usize = 16 << 10;
/// Start of the message of the guest kernel's `panic()`.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// The log.
pub struct ConsoleLog {
    file: Option<File>,
    /// Bytes in the file since it was last emptied, or since the start of the vmm.
    written: u64,
    tail: VecDeque<u8>,
}

impl ConsoleLog {
    /// Creates a log that is also written to `file`.
    pub fn new(file: Option<File>) -> Self {
        Self { file, written: 0, tail: VecDeque::new() }
    }

    /// Appends the guest's output. After an error the file is left alone, and only the tail is kept.
    pub fn append(&mut self, bytes: &[u8]) {
        if self.file.as_mut().is_some_and(|file| write(file, &mut self.written, bytes).is_err()) {
            self.file = None;
        }
        self.tail.extend(bytes);
        let surplus = self.tail.len().saturating_sub(MAX_TAIL_LEN);
        self.tail.drain(..surplus);
    }

    /// True if the last bytes contain the guest kernel's panic message.
    pub fn panicked(&mut self) -> bool {
        self.tail.make_contiguous().windows(PANIC.len()).any(|window| window == PANIC)
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.append(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn write(file: &mut File, written: &mut u64, bytes: &[u8]) -> io::Result<()> {
    *written += bytes.len() as u64;
    if *written > MAX_FILE_LEN {
        // A FIFO cannot be truncated, so it is given up after as much output.
        *written = bytes.len() as u64;
        file.set_len(0)?;
        file.seek(SeekFrom::Start(0))?;
        file.write_all(b"[earlier console output was dropped: the log had reached 16 MiB]\n")?;
    }
    file.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_writes_without_end_fills_neither_disk_nor_memory() {
        let file = tempfile::tempfile().unwrap();
        let mut log = ConsoleLog::new(Some(file.try_clone().unwrap()));
        for _ in 0..80 {
            log.append(&vec![b'x'; 1 << 19]);
        }
        assert!(file.metadata().unwrap().len() <= MAX_FILE_LEN + 100);
        assert_eq!(log.tail.len(), MAX_TAIL_LEN);
    }

    #[test]
    fn a_panic_is_seen_even_if_its_message_comes_in_pieces() {
        let mut log = ConsoleLog::new(None);
        log.append(b"Kernel panic - not");
        assert!(!log.panicked());
        log.append(b" syncing: VFS");
        assert!(log.panicked());
        assert!(log.tail.make_contiguous().ends_with(b"syncing: VFS"));
    }
}
