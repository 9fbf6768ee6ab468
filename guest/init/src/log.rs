//! Log lines of init: on the console, and a few in the kernel log.
//!
//! The console is the VM's `console.log` on the host. Services' output goes there as well, so each line has a prefix.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    sync::{Mutex, OnceLock, PoisonError},
};

use nix::time::{ClockId, clock_gettime};

/// Shared by all threads, so that lines do not mix.
static CONSOLE: OnceLock<Mutex<File>> = OnceLock::new();

/// Returns the microseconds since the guest kernel started (`CLOCK_BOOTTIME`).
pub(crate) fn uptime_us() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map_or(0, |now| now.tv_sec().unsigned_abs() * 1_000_000 + now.tv_nsec().unsigned_abs() / 1000)
}

/// Opens the console for [`info`]; needs `/dev`. Without a console its lines are lost.
pub(crate) fn open_console() {
    // O_NOCTTY: the console must not become PID 1's controlling terminal, or its hang-up would send signals.
    let console = OpenOptions::new().write(true).custom_flags(libc::O_NOCTTY).open("/dev/console");
    if let Ok(console) = console {
        let _ = CONSOLE.set(Mutex::new(console));
    }
}

/// Writes one line to the kernel log, at a level that also reaches the console of a kernel started with `quiet`.
pub(crate) fn kernel(text: &str) {
    if let Ok(mut log) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // One write is one record. `quiet` lets levels below 4 through, so 3 (error) is the mildest that is shown.
        let _ = log.write_all(format!("<3>bulkhead-init: {text}\n").as_bytes());
    }
}

/// Writes one line of init to the console.
pub(crate) fn info(text: &str) {
    console(format!("bulkhead-init: {text}\n").as_bytes());
}

/// Writes bytes, which should be whole lines, to the console.
pub(crate) fn console(bytes: &[u8]) {
    if let Some(console) = CONSOLE.get() {
        let _ = console.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes);
    }
}
