//! The log of the guest's console: the last bytes in memory, and a bounded file that a thread of its own writes.
//!
//! The guest's driver waits for each buffer with interrupts off, so nothing on its way may wait for the host's disk.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, ErrorKind, Seek, SeekFrom, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Maximum length of the file in bytes. It starts again from empty when it is reached, so that a guest cannot fill the
/// host's disk.
const MAX_FILE_LEN: u64 = 16 << 20;
/// Maximum length of the tail in memory, in bytes.
const MAX_TAIL_LEN: usize = 16 << 10;
/// Maximum number of bytes that wait for the file. What comes on top of them is dropped.
const MAX_PENDING: usize = 1 << 20;
/// Start of the message of the guest kernel's `panic()`.
const PANIC: &[u8] = b"Kernel panic - not syncing";

/// The guest's side of the log. Appending to it never waits for a file.
pub struct ConsoleLog {
    /// Present with a file.
    pending: Option<Pending>,
    tail: VecDeque<u8>,
}

/// The side of the file, for a thread that may wait for it.
pub struct LogWriter {
    file: File,
    /// Bytes in the file since it was last emptied, or since the start of the vmm.
    written: u64,
    pending: Pending,
}

/// Bytes on their way from the guest to the file.
#[derive(Clone)]
pub(crate) struct Pending(Arc<(Mutex<Buffer>, Condvar)>);

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// Bytes that were dropped behind those in the buffer.
    dropped: u64,
    /// The writer has taken bytes that are not in the file yet.
    writing: bool,
    /// One of the sides is gone, or the file failed.
    closed: bool,
}

impl ConsoleLog {
    /// Creates a log, and the writer of `file` if there is one.
    pub fn new(file: Option<File>) -> (Self, Option<LogWriter>) {
        let writer = file.map(|file| LogWriter {
            file,
            written: 0,
            pending: Pending(Arc::new((Mutex::default(), Condvar::new()))),
        });
        let pending = writer.as_ref().map(|writer| writer.pending.clone());
        (Self { pending, tail: VecDeque::new() }, writer)
    }

    /// Appends the guest's output. What the file cannot take in time is dropped, and counted in the file.
    pub fn append(&mut self, bytes: &[u8]) {
        if let Some(pending) = &self.pending {
            pending.put(bytes);
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

impl Drop for ConsoleLog {
    fn drop(&mut self) {
        if let Some(pending) = &self.pending {
            pending.close();
        }
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

impl Pending {
    /// Waits until all bytes so far are in the file, but not longer than `timeout`.
    pub(crate) fn flush(&self, timeout: Duration) {
        let (_, changed) = &*self.0;
        let waits = |buffer: &mut Buffer| !buffer.closed && (buffer.writing || !buffer.is_empty());
        drop(changed.wait_timeout_while(self.buffer(), timeout, waits));
    }

    fn put(&self, bytes: &[u8]) {
        let mut buffer = self.buffer();
        if buffer.closed {
            return;
        }
        let wakes = buffer.is_empty();
        let fits = bytes.len().min(MAX_PENDING - buffer.bytes.len());
        buffer.bytes.extend_from_slice(&bytes[..fits]);
        buffer.dropped += (bytes.len() - fits) as u64;
        drop(buffer);
        // The writer looks at the buffer before it waits, so only the first byte has to wake it.
        if wakes {
            self.0.1.notify_all();
        }
    }

    /// Waits for bytes, exchanges them for `spare` and returns the number of those dropped behind them; `None` when
    /// nothing follows.
    fn take(&self, spare: &mut Vec<u8>) -> Option<u64> {
        spare.clear();
        let waits = |buffer: &mut Buffer| !buffer.closed && buffer.is_empty();
        let mut buffer = self.0.1.wait_while(self.buffer(), waits).unwrap_or_else(PoisonError::into_inner);
        if buffer.is_empty() {
            return None;
        }
        buffer.writing = true;
        std::mem::swap(&mut buffer.bytes, spare);
        Some(std::mem::take(&mut buffer.dropped))
    }

    fn written(&self) {
        self.buffer().writing = false;
        self.0.1.notify_all();
    }

    fn close(&self) {
        self.buffer().closed = true;
        self.0.1.notify_all();
    }

    fn buffer(&self) -> MutexGuard<'_, Buffer> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Buffer {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.dropped == 0
    }
}

impl LogWriter {
    /// The bytes that wait for this writer.
    pub(crate) fn pending(&self) -> Pending {
        self.pending.clone()
    }

    /// Writes the file until the log is dropped. After an error other than a full file system the file is left alone.
    pub(crate) fn run(mut self) {
        let mut bytes = Vec::new();
        let mut lost = 0;
        while let Some(dropped) = self.pending.take(&mut bytes) {
            lost += dropped;
            match self.write(&bytes).and_then(|()| self.write_note(lost)) {
                Ok(()) => lost = 0,
                // The machine waits for room on the host and goes on, and so does its log.
                Err(error) if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) => {
                    lost += bytes.len() as u64;
                }
                Err(_) => break,
            }
            self.pending.written();
        }
        self.pending.close();
    }

    fn write_note(&mut self, lost: u64) -> io::Result<()> {
        if lost == 0 {
            return Ok(());
        }
        self.write(
            format!("\n[{lost} bytes of output were dropped: this file could not take them in time]\n").as_bytes(),
        )
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        if self.written > MAX_FILE_LEN {
            // A FIFO cannot be truncated, so it is given up after as much output.
            self.written = bytes.len() as u64;
            self.file.set_len(0)?;
            self.file.seek(SeekFrom::Start(0))?;
            self.file.write_all(b"[earlier console output was dropped: the log had reached 16 MiB]\n")?;
        }
        self.file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Read, thread};

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    #[test]
    fn a_guest_that_writes_without_end_fills_neither_disk_nor_memory() {
        let file = tempfile::tempfile().unwrap();
        let (mut log, writer) = ConsoleLog::new(Some(file.try_clone().unwrap()));
        let writer = writer.unwrap();
        let pending = writer.pending();
        let thread = thread::spawn(|| writer.run());
        for _ in 0..80 {
            log.append(&vec![b'x'; 1 << 19]);
            pending.flush(SOON);
        }
        assert!(file.metadata().unwrap().len() > 1 << 19);
        assert!(file.metadata().unwrap().len() <= MAX_FILE_LEN + 100);
        assert_eq!(log.tail.len(), MAX_TAIL_LEN);
        drop(log);
        thread.join().unwrap();
    }

    #[test]
    fn a_file_that_takes_nothing_holds_nobody_up_and_the_loss_is_counted() {
        let (reader, writer_end) = nix::unistd::pipe().unwrap();
        let (mut log, writer) = ConsoleLog::new(Some(File::from(writer_end)));
        let thread = thread::spawn(|| writer.unwrap().run());
        // The pipe takes some of it and blocks its writer. None of these waits.
        for _ in 0..1024 {
            log.append(&[b'x'; 1 << 12]);
        }
        drop(log);
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        thread.join().unwrap();
        let kept = text.matches('x').count();
        assert!(kept <= 2 * MAX_PENDING + (1 << 16), "{kept}");
        let dropped: usize =
            text.split('[').skip(1).map(|note| note.split(' ').next().unwrap().parse::<usize>().unwrap()).sum();
        assert_eq!(kept + dropped, 1024 << 12);
    }

    #[test]
    fn a_full_file_system_ends_the_log_of_no_machine() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (mut log, writer) = ConsoleLog::new(Some(full));
        let writer = writer.unwrap();
        let pending = writer.pending();
        let thread = thread::spawn(|| writer.run());
        for _ in 0..3 {
            log.append(b"hung task");
            pending.flush(SOON);
            assert!(!pending.buffer().closed);
        }
        drop(log);
        thread.join().unwrap();
    }

    #[test]
    fn a_panic_is_seen_even_if_its_message_comes_in_pieces() {
        let (mut log, _) = ConsoleLog::new(None);
        log.append(b"Kernel panic - not");
        assert!(!log.panicked());
        log.append(b" syncing: VFS");
        assert!(log.panicked());
        assert!(log.tail.make_contiguous().ends_with(b"syncing: VFS"));
    }
}
