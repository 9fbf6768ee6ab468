//! The two ways to be heard: the kernel log and the console.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    sync::{Mutex, OnceLock, PoisonError},
};

use nix::time::{ClockId, clock_gettime};

static CONSOLE: OnceLock<Mutex<File>> = OnceLock::new();

/// Microseconds since the guest kernel started (`CLOCK_BOOTTIME`).
pub(crate) fn uptime_us() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |now| now.tv_sec().unsigned_abs() * 1_000_000 + now.tv_nsec().unsigned_abs() / 1000)
}

/// Opens the console for [`info`]; needs `/dev`.
pub(crate) fn open_console() {
    let console = OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY).open("/dev/console");
    if let Ok(console) = console {
        let _ = CONSOLE.set(Mutex::new(console));
    }
}

/// Writes one line to the kernel log, at a level that also reaches the console of a kernel started with `quiet`.
pub(crate) fn kernel(text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one record; 3 (error) is the lowest level that `quiet` still shows.
        let _ = log.write_all(format!("<3>bulkhead-init: {text}\n").as_bytes());
    }
}

/// Writes one line of init's own to the console.
pub(crate) fn info(text: &str) {
    console(format!("bulkhead-init: {text}\n").as_bytes());
}

/// Writes bytes to the console; they are lost when there is none.
pub(crate) fn console(bytes: &[u8]) {
    if let Some(console) = CONSOLE.get() {
        let _ = console.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes);
    }
}
