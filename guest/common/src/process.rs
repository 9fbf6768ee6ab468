//! Processes and threads, as procfs describes them: their identity, and the credentials by which the kernel judges
//! them.

use std::fs;

use serde::{Deserialize, Serialize};

/// `CAP_SYS_ADMIN`, as a bit of a set of capabilities. Mounting and sethostname(2) require it.
const CAP_SYS_ADMIN: u64 = 1 << 21;

/// Maximum number of supplementary groups (`NGROUPS_MAX`).
const MAX_GROUPS: usize = 65_536;

/// A process, distinguished from later ones with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Process id in the VM.
    pub pid: u32,
    /// Start time, in clock ticks since boot (field 22 of `/proc/PID/stat`).
    pub started: u64,
}

impl Process {
    /// Finds the process that has this id now; `None` if there is none.
    pub fn find(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name is chosen by the process and may contain anything, spaces and parentheses too. The last
        // parenthesis ends it, since only numbers follow.
        let (_, fields) = stat.rsplit_once(')')?;
        // Field 3 is the first one behind the name.
        let started = fields.split_ascii_whitespace().nth(19)?.parse().ok()?;
        Some(Self { pid, started })
    }

    /// Returns whether it still runs, or has not been reaped yet.
    pub fn lives(self) -> bool {
        Self::find(self.pid) == Some(self)
    }
}

/// The credentials by which the kernel judges a thread's access to files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// File-system user id.
    pub user: u32,
    /// File-system group id.
    pub group: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Effective capabilities, which hold in the thread's own user namespace.
    pub effective: u64,
}

impl Status {
    /// Parses `/proc/TID/status`; `None` if a field is missing.
    ///
    /// Ids are those in the user namespace of the process that opened the file.
    pub fn read(text: &[u8]) -> Option<Self> {
        // The name in the first line is the thread's own choice, with newlines escaped: it cannot forge a field.
        let text = String::from_utf8_lossy(text);
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        // Four ids: real, effective, saved, file system.
        let id = |name: &str| field(name)?.split_ascii_whitespace().nth(3)?.parse::<u32>().ok();
        let groups = field("Groups")?.split_ascii_whitespace().take(MAX_GROUPS).map(|id| id.parse::<u32>().ok());
        Some(Self {
            user: id("Uid")?,
            group: id("Gid")?,
            groups: groups.collect::<Option<_>>()?,
            effective: u64::from_str_radix(field("CapEff")?.trim(), 16).ok()?,
        })
    }

    /// Returns whether it has `CAP_SYS_ADMIN`, over whatever its user namespace owns.
    pub fn has_sys_admin(&self) -> bool {
        self.effective & CAP_SYS_ADMIN != 0
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
        assert!(status.has_sys_admin());
        assert!(!Status { effective: !CAP_SYS_ADMIN, ..status }.has_sys_admin());
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
