//! System calls that act on the whole kernel.

use std::{fs, io};

use crate::{
    attempt::{At, Blocked, Outcome, any},
    sys,
};

/// Success, or an error that the kernel returns only to a caller that may make the call.
fn reached(what: &str, result: io::Result<u64>, beyond: &[i32]) -> Outcome {
    match result {
        Ok(_) => Ok(format!("{what} succeeded")),
        Err(error) if error.raw_os_error().is_some_and(|errno| beyond.contains(&errno)) => {
            Ok(format!("{what} was let through and failed later: {error}"))
        }
        Err(error) => Err(Blocked::at(what, &error)),
    }
}

/// bpf(2): a map, a program that looks at packets, one that judges devices, and the list of what is loaded.
pub(crate) fn bpf() -> Outcome {
    const MAP_CREATE: i32 = 0;
    const PROG_LOAD: i32 = 5;
    const PROG_GET_NEXT_ID: i32 = 11;
    const SIZE: usize = 128;
    // BPF_MAP_TYPE_ARRAY, 4-byte keys, 8-byte values, 1 entry.
    let mut map = [0_u32; SIZE / 4];
    map[..4].copy_from_slice(&[2, 4, 8, 1]);
    // r0 = 0; exit
    let code: [u64; 2] = [0xb7, 0x95];
    let license = c"GPL";
    let program = |kind: u32| {
        let mut attributes = [0_u64; SIZE / 8];
        attributes[0] = u64::from(kind) | 2 << 32;
        attributes[1] = code.as_ptr() as u64;
        attributes[2] = license.as_ptr() as u64;
        reached(
            &format!("loading a program of type {kind}"),
            sys::call(libc::SYS_bpf, &[&PROG_LOAD, &attributes.as_ptr(), &SIZE]),
            &[],
        )
    };
    let ids = [0_u64; SIZE / 8];
    any([
        reached("making a map", sys::call(libc::SYS_bpf, &[&MAP_CREATE, &map.as_ptr(), &SIZE]), &[]),
        program(1),
        program(15),
        // Without any program the answer is "no entry", to those who may ask.
        reached(
            "listing programs",
            sys::call(libc::SYS_bpf, &[&PROG_GET_NEXT_ID, &ids.as_ptr(), &SIZE]),
            &[libc::ENOENT],
        ),
    ])
}

/// init_module(2), finit_module(2) and delete_module(2) of something that is not a module.
pub(crate) fn modules() -> Outcome {
    let garbage = [0_u8; 64];
    let file = fs::File::open("/proc/self/exe").at("open")?;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
    let name = c"escape";
    any([
        reached("init_module", sys::call(libc::SYS_init_module, &[&garbage.as_ptr(), &64, &name]), &[libc::ENOEXEC]),
        reached("finit_module", sys::call(libc::SYS_finit_module, &[&fd, &name, &0]), &[libc::ENOEXEC]),
        reached("delete_module", sys::call(libc::SYS_delete_module, &[&name, &0]), &[libc::ENOENT]),
    ])
}

/// Another kernel.
pub(crate) fn kexec() -> Outcome {
    any([reached("kexec_load", sys::call(libc::SYS_kexec_load, &[&0, &0, &0, &0]), &[])])
}

/// The machine's clock, set to what it is.
pub(crate) fn clock() -> Outcome {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    sys::call(libc::SYS_clock_gettime, &[&libc::CLOCK_REALTIME, &&raw mut now]).at("clock_gettime")?;
    any([
        reached("clock_settime", sys::call(libc::SYS_clock_settime, &[&libc::CLOCK_REALTIME, &&raw const now]), &[]),
        reached("settimeofday", sys::call(libc::SYS_settimeofday, &[&[now.tv_sec, 0].as_ptr(), &0]), &[]),
    ])
}

/// Performance events of the whole machine.
pub(crate) fn perf_events() -> Outcome {
    // type: software, size, config: CPU clock.
    let mut attributes = [0_u64; 16];
    attributes[0] = 1 | 128 << 32;
    any([reached(
        "perf_event_open",
        sys::call(libc::SYS_perf_event_open, &[&attributes.as_ptr(), &-1, &0, &-1, &0]),
        &[],
    )])
}

/// The kernel's log.
pub(crate) fn kernel_log() -> Outcome {
    let mut text = vec![0_u8; 4096];
    any([reached("reading the log", sys::call(libc::SYS_syslog, &[&3, &text.as_mut_ptr(), &4096]), &[])])
}

/// Swapping and accounting, on files that are not there.
pub(crate) fn swap_and_accounting() -> Outcome {
    let name = c"/tmp/not-there";
    any([
        reached("swapon", sys::call(libc::SYS_swapon, &[&name, &0]), &[libc::ENOENT]),
        reached("swapoff", sys::call(libc::SYS_swapoff, &[&name]), &[libc::ENOENT]),
        reached("acct", sys::call(libc::SYS_acct, &[&name]), &[libc::ENOENT]),
    ])
}

/// Input and output ports of the processor.
pub(crate) fn ports() -> Outcome {
    any([
        reached("iopl", sys::call(libc::SYS_iopl, &[&3]), &[]),
        reached("ioperm", sys::call(libc::SYS_ioperm, &[&0x3f8, &8, &1]), &[]),
    ])
}

/// Precedence over the VM's own processes: hard limits raised, real-time scheduling, not to be killed for memory.
pub(crate) fn precedence() -> Outcome {
    let limit = libc::rlimit { rlim_cur: 1 << 30, rlim_max: 1 << 30 };
    let priority = 50_i32;
    let unkillable = fs::write("/proc/self/oom_score_adj", "-1000");
    any([
        reached(
            "raising a hard limit",
            sys::call(libc::SYS_setrlimit, &[&libc::RLIMIT_NOFILE, &&raw const limit]),
            &[],
        ),
        reached(
            "real-time scheduling",
            sys::call(libc::SYS_sched_setscheduler, &[&0, &libc::SCHED_FIFO, &&raw const priority]),
            &[],
        ),
        unkillable.at("oom_score_adj").map(|()| "no memory killer for this process".to_owned()),
    ])
}

/// Ids that are not the container's.
pub(crate) fn foreign_ids() -> Outcome {
    let foreign = 70_000_u32;
    fs::write("/tmp/foreign", "").at("/tmp/foreign")?;
    let path = c"/tmp/foreign";
    any([
        reached("setresuid", sys::call(libc::SYS_setresuid, &[&foreign, &foreign, &foreign]), &[]),
        reached("chown", sys::call(libc::SYS_chown, &[&path, &foreign, &foreign]), &[]),
    ])
}

/// The description of the key that the victim keeps in its keyring.
pub(crate) const KEY: &std::ffi::CStr = c"escape-victim";

const KEYRING_USER: i32 = -4;
const KEYRING_USER_SESSION: i32 = -5;

/// Adds it, links it where others of the same user look, and returns its serial number.
pub(crate) fn add_key() -> io::Result<u64> {
    let secret = b"secret";
    let kind = c"user";
    sys::call(libc::SYS_add_key, &[&kind, &KEY, &secret.as_ptr(), &secret.len(), &KEYRING_USER])
}

/// Another container's key: by its number, and by its name in the keyrings of the user.
pub(crate) fn keyrings() -> Outcome {
    const SEARCH: i32 = 10;
    const READ: i32 = 11;
    let Some(serial) = std::env::var("VICTIM_KEY").ok().and_then(|text| text.parse::<u64>().ok()) else {
        return Err(Blocked::Absent("no victim".into()));
    };
    let mut secret = [0_u8; 16];
    let kind = c"user";
    any([
        reached("reading its key", sys::call(libc::SYS_keyctl, &[&READ, &serial, &secret.as_mut_ptr(), &16]), &[]),
        reached("finding its key", sys::call(libc::SYS_keyctl, &[&SEARCH, &KEYRING_USER, &kind, &KEY, &0]), &[]),
        reached(
            "finding its key",
            sys::call(libc::SYS_keyctl, &[&SEARCH, &KEYRING_USER_SESSION, &kind, &KEY, &0]),
            &[],
        ),
    ])
}
