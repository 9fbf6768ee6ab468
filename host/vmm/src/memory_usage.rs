//! The process's resident memory, with guest memory counted apart.

use std::fs;

use vm_memory::GuestMemoryBackend;

use super::memory::GuestRam;

/// Returns the resident KiB of `(guest memory, everything else)`, from `/proc/self/smaps` (proc_pid_smaps(5)).
pub(super) fn resident_kib(memory: &GuestRam) -> (u64, u64) {
    // Landlock leaves this one directory readable, see `sandbox`.
    let starts: Vec<u64> = memory.iter().map(|region| region.as_ptr() as u64).collect();
    fs::read_to_string("/proc/self/smaps").map_or((0, 0), |smaps| split(&smaps, &starts))
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
    use super::*;

    #[test]
    fn guest_mappings_are_counted_apart() {
        let smaps =
            "1000-2000 rw-s 0 0:1 5 /memfd:guest\nRss:   12 kB\n3000-4000 r-xp 0 0:1 5 /bin/x\nRss: 3 kB\nPss: 9 kB\n";
        assert_eq!(split(smaps, &[0x1000]), (12, 3));
    }
}
