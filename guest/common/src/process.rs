//! Who a thread is: its `status` in procfs.

use std::fs;

use serde::{Deserialize, Serialize};

/// `CAP_SYS_ADMIN`, which mounting and names take.
const ADMINISTRATION: u64 = 1 << 21;

/// Most supplementary groups that the kernel allows.
const MAX_GROUPS: usize = 65_536;

/// A process, told apart from later ones with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the VM.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of `/proc/PID/stat`.
    pub started: u64,
}

impl Process {
    /// The process with this number now.
    pub fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name may hold anything but is followed by the last parenthesis.
        let (_, fields) = stat.rsplit_once(')')?;
        let started = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Whether it has not ended.
    pub fn lives(self) -> bool {
        Self::find(self.pid) == Some(self)
    }
}

/// Ids and capabilities by which the kernel judges a thread's access to files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// File-system user id.
    pub user: u32,
    /// File-system group id.
    pub group: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Effective capabilities, in the thread's own user namespace.
    pub effective: u64,
}

impl Status {
    /// Reads the text; `None` when something is missing.
    pub fn read(text: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(text);
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        // Real, effective, saved, file system.
        let id = |name: &str| field(name)?.split_ascii_whitespace().nth(3)?.parse::<u32>().ok();
        let groups = field("Groups")?.split_ascii_whitespace().take(MAX_GROUPS).map(|id| id.parse::<u32>().ok());
        Some(Self {
            user: id("Uid")?,
            group: id("Gid")?,
            groups: groups.collect::<Option<_>>()?,
            effective: u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?,
        })
    }

    /// Whether the thread may mount, or set a name, where it is root.
    pub fn is_administrator(&self) -> bool {
        self.effective & ADMINISTRATION != 0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TEXT: &str = "Name:\tUid:\t9\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t10 11 \nCapPrm:\t0\n\
                        CapEff:\t0000000000200001\n";

    #[test]
    fn the_ids_of_the_file_system_and_the_effective_capabilities_count() {
        let status = Status::read(TEXT.as_bytes()).unwrap();
        assert_eq!(status, Status { user: 4, group: 8, groups: vec![10, 11], effective: 0x20_0001 });
        assert!(status.is_administrator());
        assert!(!Status { effective: !ADMINISTRATION, ..status }.is_administrator());
    }

    #[test]
    fn this_processs_own_status_is_read() {
        assert!(Status::read(&std::fs::read("/proc/self/status").unwrap()).is_some());
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "(Uid|Gid|Groups|CapEff|:|\t|\n|4294967296|1| ){0,40}") {
            let _ = Status::read(text.as_bytes());
        }
    }
}
