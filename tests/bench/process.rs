//! The kernel's figures for a VMM's process: VM exits and memory.

use std::{collections::BTreeMap, fs};

use serde_json::{Value, json};

use crate::Result;

/// KVM's statistics: one directory for each VM, named `<process>-<descriptor>`.
const KVM: &str = "/sys/kernel/debug/kvm";

/// VM exits of all vCPUs.
#[derive(Clone, Debug)]
pub struct Exits {
    /// All of them.
    pub total: u64,
    /// KVM's own kinds; they overlap and do not add up.
    pub kinds: BTreeMap<String, u64>,
}

/// The exits of the process's VM up to now; `None` where debugfs cannot be read.
pub fn exits(pid: u32) -> Option<Exits> {
    let prefix = format!("{pid}-");
    let entry =
        fs::read_dir(KVM).ok()?.flatten().find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))?;
    let read = |name: &str| fs::read_to_string(entry.path().join(name)).ok()?.trim().parse::<u64>().ok();
    // The sum first: the guest runs on while the rest is read.
    let total = read("exits")?;
    let kinds = fs::read_dir(entry.path())
        .ok()?
        .flatten()
        .map(|file| file.file_name().to_string_lossy().into_owned())
        .filter(|name| name.ends_with("_exits") || name == "insn_emulation" || name == "hypercalls")
        .filter_map(|name| Some((name.clone(), read(&name).filter(|count| *count > 0)?)))
        .collect();
    Some(Exits { total, kinds })
}

/// A process and the processes that it has started, directly or not: virtiofsd serves in a child.
pub fn family(pid: u32) -> Vec<u32> {
    // Not by /proc/PID/task/TID/children, which not every kernel has.
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let parent = |pid: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        field(&stat, 4)?.parse::<u32>().ok()
    };
    let processes: Vec<_> = processes
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Some((pid, parent(pid)?)))
        .collect();
    let mut family = vec![pid];
    let mut at = 0;
    while let Some(member) = family.get(at).copied() {
        family.extend(processes.iter().filter(|(_, parent)| *parent == member).map(|(child, _)| child));
        at += 1;
    }
    family
}

/// A field of proc_pid_stat(5), from the third on: the name before it, in parentheses, may hold anything.
fn field(stat: &str, number: usize) -> Option<&str> {
    stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(number - 3)
}

/// CPU time of a process, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cpu {
    /// All of it.
    pub total: f64,
    /// The part in which its vCPUs ran the guest.
    pub guest: f64,
}

impl Cpu {
    /// The process's time up to now (proc_pid_stat(5)).
    pub fn read(pid: u32) -> Result<Self> {
        Self::parse(&fs::read_to_string(format!("/proc/{pid}/stat"))?).ok_or_else(|| "no such process".into())
    }

    fn parse(stat: &str) -> Option<Self> {
        // Clock ticks of USER_HZ, which is 100 for every program.
        let seconds = |number| Some(field(stat, number)?.parse::<f64>().ok()? / 100.0);
        Some(Self { total: seconds(14)? + seconds(15)?, guest: seconds(43)? })
    }
}

impl std::ops::AddAssign for Cpu {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.guest += other.guest;
    }
}

impl std::ops::Sub for Cpu {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self { total: self.total - other.total, guest: self.guest - other.guest }
    }
}

/// Memory of a process in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Resident guest memory.
    pub guest: u64,
    /// Resident, guest memory apart.
    pub resident: u64,
    /// The same, with pages that others map too counted by share.
    pub proportional: u64,
    /// The part of `resident` that is the program and its libraries.
    pub files: u64,
}

impl Memory {
    /// Reads the process's list of mappings; those whose name begins with `guest` are guest memory.
    pub fn read(pid: u32, guest: &str) -> Result<Self> {
        Ok(Self::parse(&fs::read_to_string(format!("/proc/{pid}/smaps"))?, guest))
    }

    fn parse(smaps: &str, guest: &str) -> Self {
        let mut memory = Self::default();
        let mut name = "";
        for line in smaps.lines() {
            let kib = |text: &str| text.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0);
            if let Some(text) = line.strip_prefix("Rss:") {
                if name.starts_with(guest) {
                    memory.guest += kib(text);
                } else {
                    memory.resident += kib(text);
                    memory.files += if name.starts_with('/') { kib(text) } else { 0 };
                }
            } else if let Some(text) = line.strip_prefix("Pss:") {
                memory.proportional += if name.starts_with(guest) { 0 } else { kib(text) };
            } else if line.split_once(' ').is_some_and(|(range, _)| range.contains('-')) {
                // range, permissions, offset, device, inode, name
                name = line.splitn(6, ' ').nth(5).unwrap_or("").trim_start();
            }
        }
        memory
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let Self { guest, resident, proportional, files } = self;
        json!({"guest_kib": guest, "rss_kib": resident, "pss_kib": proportional, "rss_files_kib": files})
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_have_any_name() {
        let numbers: Vec<_> = (4..=52).map(|field| (field * 100).to_string()).collect();
        let stat = format!("7 (a) b (c)) S {}", numbers.join(" "));
        assert_eq!(Cpu::parse(&stat), Some(Cpu { total: 14.0 + 15.0, guest: 43.0 }));
        assert_eq!(Cpu::parse("7 (a) S 1 2"), None);
    }

    #[test]
    fn guest_memory_and_files_are_told_from_the_rest() {
        let smaps = "1000-2000 rw-s 00000000 00:01 5                  /memfd:guest-memory (deleted)\n\
                     Size: 9 kB\nRss:   12 kB\nPss: 12 kB\n\
                     3000-4000 r-xp 00000000 00:01 6                  /bin/x\nRss: 8 kB\nPss: 3 kB\n\
                     5000-6000 rw-p 00000000 00:00 0 \nRss: 4 kB\nPss: 4 kB\n\
                     6000-7000 rw-p 00000000 00:00 0                  [heap]\nRss: 1 kB\nPss: 1 kB\n";
        let memory = Memory::parse(smaps, "/memfd:guest-memory");
        assert_eq!((memory.guest, memory.resident, memory.proportional, memory.files), (12, 13, 8, 8));
    }
}
