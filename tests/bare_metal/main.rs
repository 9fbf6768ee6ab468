//! Guests of a few instructions on this machine's /dev/kvm: what needs KVM but no operating system.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

mod disks;
mod shares;

use std::{
    fs,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::PathBuf,
    time::{Duration, Instant},
};

use bulkhead_vmm::api::{Command, Event, ExitReason};
use support::{
    guest::{ENTRY, SPIN, kernel, machine, out},
    vmm::{self, Vmm},
};

const SOON: Duration = Duration::from_secs(20);
const POWER: u16 = 0x600;
const OFF: u8 = 5 << 2 | 1 << 5;

fn run(code: &[u8]) -> ExitReason {
    let dir = tempfile::tempdir().unwrap();
    Vmm::boot(machine(kernel(dir.path(), code))).exit(SOON)
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

#[test]
fn soft_off_through_the_sleep_register_ends_the_machine() {
    assert_eq!(run(&sequence(&[&out(POWER, OFF), &SPIN])), ExitReason::PowerOff);
}

#[test]
fn the_reset_register_resets() {
    assert_eq!(run(&sequence(&[&out(POWER + 2, 1), &SPIN])), ExitReason::Reset);
}

#[test]
fn a_triple_fault_ends_the_machine_and_says_so() {
    // lidt of an empty table, then a segment that does not exist: no handler for that, nor for the fault of having
    // none.
    let code = [0x0f, 0x01, 0x1d, 0x00, 0x00, 0x00, 0x00, 0x66, 0xb8, 0x34, 0x12, 0x8e, 0xd8];
    assert_eq!(run(&code), ExitReason::TripleFault);
}

#[test]
fn a_serial_port_exists_only_when_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let code = sequence(&[&out(0x3f8, b'h'), &out(0x3f8, b'i'), &out(POWER, OFF), &SPIN]);
    let log = dir.path().join("serial.log");
    let mut config = machine(kernel(dir.path(), &code));
    assert_eq!(Vmm::boot(config.clone()).exit(SOON), ExitReason::PowerOff);
    assert!(!log.exists());
    config.serial = Some(log.clone());
    assert_eq!(Vmm::boot(config).exit(SOON), ExitReason::PowerOff);
    assert_eq!(fs::read(log).unwrap(), b"hi");
}

#[test]
fn a_log_that_nobody_reads_holds_up_no_vcpu() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("serial.fifo");
    nix::unistd::mkfifo(&log, nix::sys::stat::Mode::S_IRWXU).unwrap();
    // Opened, so that the vmm can open the other end, and never read.
    let options = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&log).unwrap();
    // SAFETY: fcntl with integers.
    assert!(unsafe { libc::fcntl(options.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 0);
    // mov ecx, 8192; mov dx, 0x3f8; out dx, al; loop back
    let code = [0xb9, 0x00, 0x20, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xee, 0xe2, 0xfd];
    let mut config = machine(kernel(dir.path(), &sequence(&[&code, &out(POWER, OFF), &SPIN])));
    config.serial = Some(log);
    assert_eq!(Vmm::boot(config).exit(SOON), ExitReason::PowerOff);
}

#[test]
fn a_guest_sees_the_processors_name_and_no_performance_counters() {
    // mov eax, leaf; cpuid
    let cpuid = |leaf: u32| [&[0xb8][..], &leaf.to_le_bytes(), &[0x0f, 0xa2]].concat();
    // test eax, eax; jnz or jz to itself
    let (zero, not_zero) = ([0x85, 0xc0, 0x75, 0xfe], [0x85, 0xc0, 0x74, 0xfe]);
    let code = sequence(&[&cpuid(0x8000_0002), &not_zero, &cpuid(0xa), &zero, &out(POWER, OFF), &SPIN]);
    assert_eq!(run(&code), ExitReason::PowerOff);
}

#[test]
fn the_host_bridge_answers_through_ecam_and_empty_slots_do_not() {
    // mov eax, [0xe0000000]; cmp eax, 0x00081b36; jne spin; mov eax, [0xe00f8000]; cmp eax, -1; jne spin; off
    let read = |address: u32| [&[0xa1][..], &address.to_le_bytes()].concat();
    let expect = |value: u32| [&[0x3d][..], &value.to_le_bytes(), &[0x75, 0xfe]].concat();
    let code = sequence(&[
        &read(0xe000_0000),
        &expect(0x0008_1b36),
        &read(0xe00f_8000),
        &expect(0xffff_ffff),
        &out(POWER, OFF),
        &SPIN,
    ]);
    assert_eq!(run(&code), ExitReason::PowerOff);
}

#[test]
fn exits_are_counted_by_kind() {
    let dir = tempfile::tempdir().unwrap();
    let code = sequence(&[&out(0x80, 1), &out(0x80, 2), &[0xa1, 0, 0, 0, 0xe0], &SPIN]);
    let vmm = Vmm::boot(machine(kernel(dir.path(), &code)));
    assert!(matches!(vmm.event(SOON), Some(Event::Started { .. })));
    let mut exits = std::collections::BTreeMap::new();
    for _ in 0..200 {
        vmm.send(&Command::Statistics, None);
        let Some(Event::Statistics(statistics)) = vmm.event(SOON) else { panic!("no statistics") };
        exits = statistics.exits;
        if exits["mmio"] > 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((exits["port"], exits["mmio"]), (2, 1));
}

#[test]
fn a_look_shows_where_a_vcpu_is_and_whether_it_sleeps() {
    let dir = tempfile::tempdir().unwrap();
    let seen = |code: &[u8]| {
        let vmm = Vmm::boot(machine(kernel(dir.path(), code)));
        assert!(matches!(vmm.event(SOON), Some(Event::Started { .. })));
        let mut seen = None;
        // It may not have come that far yet.
        for _ in 0..200 {
            vmm.send(&Command::Look, None);
            let Some(Event::Sample(mut sample)) = vmm.event(SOON) else { panic!("no sample") };
            assert_eq!(sample.vcpus.len(), 1);
            seen = sample.vcpus.remove(0);
            if seen.as_ref().is_some_and(|view| view.halted || code == SPIN) {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        seen.expect("the vCPU did not show itself")
    };
    let spinning = seen(&SPIN);
    assert_eq!((spinning.rip, spinning.halted, spinning.user), (u64::from(ENTRY), false, false));
    // hlt; spin
    let halted = seen(&sequence(&[&[0xf4], &SPIN]));
    assert_eq!((halted.rip, halted.halted, halted.rflags & 1 << 9), (u64::from(ENTRY) + 1, true, 0));
}

#[test]
fn every_thread_of_a_running_vmm_is_confined_by_its_kind_and_leaves_no_core() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = Vmm::boot(machine(kernel(dir.path(), &SPIN)));
    assert!(matches!(vmm.event(SOON), Some(Event::Started { .. })));
    // An answer comes from the main thread only after it has narrowed its filter.
    vmm.send(&Command::Statistics, None);
    let Some(Event::Statistics(statistics)) = vmm.event(SOON) else { panic!("no statistics") };
    assert!(statistics.overhead_kib > 0, "the account was opened before and is still read");
    let directory = PathBuf::from(format!("/proc/{}", vmm.pid()));
    let threads = || {
        let mut threads: Vec<_> = fs::read_dir(directory.join("task"))
            .unwrap()
            .flatten()
            .map(|thread| {
                let status = fs::read_to_string(thread.path().join("status")).unwrap();
                let field =
                    |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
                assert_eq!(field("NoNewPrivs:"), "1");
                (field("Name:"), field("Seccomp_filters:"))
            })
            // A thread of the kernel's own, which belongs to the process on some versions.
            .filter(|(name, _)| !name.starts_with("kvm-"))
            .collect();
        threads.sort();
        threads
    };
    let expected = [("bulkhead", "3"), ("vcpu0", "2")].map(|(name, filters)| (name.to_owned(), filters.to_owned()));
    // A new thread takes its name a moment after it exists.
    let deadline = Instant::now() + SOON;
    while threads() != expected {
        assert!(Instant::now() < deadline, "{:?}", threads());
        std::thread::sleep(Duration::from_millis(20));
    }
    let limits = fs::read_to_string(directory.join("limits")).unwrap();
    let core: Vec<_> = limits.lines().find(|line| line.starts_with("Max core")).unwrap().split_whitespace().collect();
    assert_eq!(core[4..6], ["0", "0"]);
}

#[test]
fn the_vmm_ends_with_its_backend() {
    let dir = tempfile::tempdir().unwrap();
    let vmm = Vmm::boot(machine(kernel(dir.path(), &SPIN)));
    assert!(matches!(vmm.event(SOON), Some(Event::Started { .. })));
    let mut child = vmm.disconnect();
    assert!(vmm::ended(&mut child, SOON), "still running without a backend");
}

#[test]
fn a_machine_that_cannot_be_built_ends_with_one_clear_reason() {
    let dir = tempfile::tempdir().unwrap();
    let good = machine(kernel(dir.path(), &SPIN));
    let broken = |change: &dyn Fn(&mut bulkhead_vmm::api::VmConfig)| {
        let mut config = good.clone();
        change(&mut config);
        match Vmm::boot(config).exit(SOON) {
            ExitReason::Error { message } => message,
            other => panic!("{other:?}"),
        }
    };
    assert!(broken(&|c| c.cpus = 33).contains("1-32"));
    assert!(broken(&|c| c.memory_mib = 1 << 40).contains("--memory"));
    assert!(broken(&|c| c.kernel = PathBuf::from("/nowhere/vmlinux")).contains("/nowhere/vmlinux"));
    let truncated = dir.path().join("truncated");
    fs::write(&truncated, &support::guest::elf(&SPIN)[..100]).unwrap();
    assert!(broken(&|c| c.kernel = truncated.clone()).contains("truncated"));
}

#[test]
fn garbage_instead_of_a_first_command_is_refused() {
    for packet in [&b"{}"[..], b"\xff\xfe", b"[]", b"{\"type\":\"kill\"}"] {
        let vmm = Vmm::spawn();
        vmm.send_raw(packet, None);
        assert!(matches!(vmm.exit(SOON), ExitReason::Error { .. }));
    }
}
