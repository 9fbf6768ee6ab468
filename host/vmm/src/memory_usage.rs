//! The process's resident memory, with guest memory counted apart.

use std::{
    fs::File,
    io::{Read, Seek},
};

use vm_memory::GuestMemoryBackend;

use super::memory::GuestRam;

/// The process's own account, `/proc/self/smaps` (proc_pid_smaps(5)).
pub(super) struct MemoryUsage {
    /// Opened before the process confines itself, which then opens nothing. Each read from the start is a new account.
    smaps: Option<File>,
    /// First addresses of the mappings of guest memory.
    guest_starts: Vec<u64>,
}

impl MemoryUsage {
    /// Opens the account. Without one, where /proc is not mounted, everything counts as zero.
    pub(super) fn open(memory: &GuestRam) -> Self {
        let guest_starts = memory.iter().map(|region| region.as_ptr() as u64).collect();
        Self { smaps: File::open("/proc/self/smaps").ok(), guest_starts }
    }

    /// Returns the resident KiB of `(guest memory, everything else)`.
    pub(super) fn resident_kib(&self) -> (u64, u64) {
        let read = |mut file: &File| {
            let mut smaps = String::new();
            file.rewind()?;
            file.read_to_string(&mut smaps).map(|_| smaps)
        };
        let smaps = self.smaps.as_ref().and_then(|file| read(file).ok());
        smaps.map_or((0, 0), |smaps| split(&smaps, &self.guest_starts))
    }
}

fn split(smaps: &str, guest_starts: &[u64]) -> (u64, u64) {
    let (mut guest, mut rest) = (0, 0);
    let mut is_guest = false;
    for line in smaps.lines() {
        // A mapping is a line with its addresses, which the lines with its properties follow.
        if let Some(rss) = line.strip_prefix("Rss:") {
            let kib: u64 = rss.trim().trim_end_matches(" kB").parse().unwrap_or(0);
            *(if is_guest { &mut guest } else { &mut rest }) += kib;
        } else if let Some(start) = line.split_once('-').and_then(|(s, _)| u64::from_str_radix(s, 16).ok()) {
            is_guest = guest_starts.contains(&start);
        }
    }
    (guest, rest)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn an_account_that_was_opened_before_grows_with_what_is_touched_later() {
        let memory = crate::memory::create(64).unwrap();
        let usage = MemoryUsage::open(&memory);
        let (before, rest) = usage.resident_kib();
        assert!(before < 1024 && rest > 100, "{before} {rest}");
        memory.write_slice(&vec![1; 8 << 20], GuestAddress(0)).unwrap();
        let (after, _) = usage.resident_kib();
        assert!(after >= before + (8 << 10), "{before} {after}");
    }

    #[test]
    fn guest_mappings_are_counted_apart() {
        let smaps =
            "1000-2000 rw-s 0 0:1 5 /memfd:guest\nRss:   12 kB\n3000-4000 r-xp 0 0:1 5 /bin/x\nRss: 3 kB\nPss: 9 kB\n";
        assert_eq!(split(smaps, &[0x1000]), (12, 3));
    }
}
