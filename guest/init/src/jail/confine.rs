//! The limits of the jail besides its view: a Landlock domain, a seccomp filter, capabilities.

use std::{io, ops::Range};

use bulkhead_guest_common::seccomp::{
    AND, ARCHITECTURE, I386, LOAD, NOT_X32, NUMBER, RETURN, X86_64, add_filter, if_equal, step,
};
use landlock::{CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope};

use super::error::JailError;

/// Capabilities that containerd, the shims, the runtime and crun need in the VM, by number (linux/capability.h).
/// Everything that a container may do comes from its own user namespace, in which it has all.
const KEPT: [u32; 18] = [
    0,  // CHOWN: owners of layers and pipes
    1,  // DAC_OVERRIDE: files of containers' users
    3,  // FOWNER
    4,  // FSETID
    5,  // KILL: processes of containers' users
    6,  // SETGID: maps of ids, and new files with a container's ids
    7,  // SETUID
    8,  // SETPCAP: bounding sets
    10, // NET_BIND_SERVICE
    12, // NET_ADMIN: networks of containers
    13, // NET_RAW
    18, // SYS_CHROOT
    19, // SYS_PTRACE: namespaces of processes of other users
    21, // SYS_ADMIN: mounts, namespaces, device programs of cgroups
    23, // SYS_NICE
    24, // SYS_RESOURCE: limits above init's, scores of the OOM killer
    27, // MKNOD: nodes and whiteouts in layers
    31, // SETFCAP: maps that contain id 0
];

/// Numbers of capabilities that prctl(2) is asked about; it refuses those that this kernel does not have.
const NUMBERS: Range<u32> = 0..64;

/// Calls that are refused to everything in the jail, by their numbers of the 64-bit and of the 32-bit ABI.
///
/// Each of them changes or shows the VM as a whole. In a container's user namespace the kernel refuses all of them in
/// any case, with the same error.
const REFUSED: [(u32, u32); 13] = [
    (163, 51),   // acct
    (164, 79),   // settimeofday
    (167, 87),   // swapon
    (168, 115),  // swapoff
    (172, 110),  // iopl
    (173, 101),  // ioperm
    (103, 103),  // syslog, which kernel.dmesg_restrict closes
    (175, 128),  // init_module
    (176, 129),  // delete_module
    (313, 350),  // finit_module
    (246, 283),  // kexec_load
    (320, NONE), // kexec_file_load
    (227, 264),  // clock_settime
];
/// Calls that one ABI has beside those above: x32's kexec_load without its bit; i386's clock_settime64 and stime.
const REFUSED_X32: u32 = 528;
const REFUSED_I386: [u32; 2] = [404, 25];
/// No call has this number.
const NONE: u32 = u32::MAX;

const REFUSE: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

/// Returns the part of the filter for one ABI, which ends with an answer.
fn answers(numbers: impl Iterator<Item = u32>) -> Vec<libc::sock_filter> {
    let mut part: Vec<_> = numbers.flat_map(|number| [if_equal(number, 0, 1), step(RETURN, REFUSE)]).collect();
    part.push(step(RETURN, libc::SECCOMP_RET_ALLOW));
    part
}

/// Writes the filter out. The kernel notices that it looks at the number only, and skips it for calls that it allows.
fn filter() -> Vec<libc::sock_filter> {
    let of_64 = answers(REFUSED.iter().map(|(number, _)| *number).chain([REFUSED_X32]));
    let of_32 = answers(REFUSED.iter().map(|(_, number)| *number).chain(REFUSED_I386));
    // x32 has the architecture of x86-64 and its numbers, with a bit set.
    let of_64: Vec<_> = [step(LOAD, NUMBER), step(AND, NOT_X32)].into_iter().chain(of_64).collect();
    let of_32: Vec<_> = std::iter::once(step(LOAD, NUMBER)).chain(of_32).collect();
    // Both parts are shorter than the 255 instructions that a jump can skip.
    let skip = |part: &[libc::sock_filter]| part.len() as u8;
    let mut filter = vec![step(LOAD, ARCHITECTURE)];
    filter.push(if_equal(X86_64, 0, skip(&of_64)));
    filter.extend(of_64);
    filter.push(if_equal(I386, 0, skip(&of_32)));
    filter.extend(of_32);
    // This kernel has no other ABI.
    filter.push(step(RETURN, REFUSE));
    filter
}

/// Puts this process and all that it starts into a domain and under a filter. Set-user-id programs keep working.
pub(crate) fn confine() -> Result<(), JailError> {
    // Without rights over files a domain does not touch mounting, which the engine does all the time.
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .scope(Scope::AbstractUnixSocket | Scope::Signal)
        .and_then(Ruleset::create)
        .and_then(|ruleset| ruleset.no_new_privs(false).restrict_self())
        .map_err(JailError::Landlock)?;
    add_filter(&filter()).map_err(JailError::system("install a seccomp filter"))
}

/// Takes from this process, at its next exec, the capabilities that are not in the list, for good.
pub(super) fn drop_capabilities() -> io::Result<()> {
    for number in NUMBERS.filter(|number| !KEPT.contains(number)) {
        // SAFETY: takes integers only.
        let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        if dropped < 0 {
            let error = io::Error::last_os_error();
            // No such capability in this kernel.
            if error.raw_os_error() != Some(libc::EINVAL) {
                return Err(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::seccomp::JUMP_EQUAL;
    use proptest::prelude::*;

    use super::*;

    /// Runs the filter as the kernel would.
    fn evaluate(architecture: u32, number: u32) -> u32 {
        let filter = filter();
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = filter[at];
            at += 1;
            match code {
                LOAD => accumulator = if k == NUMBER { number } else { architecture },
                AND => accumulator &= k,
                JUMP_EQUAL => at += usize::from(if accumulator == k { jt } else { jf }),
                RETURN => return k,
                _ => panic!("{code:#x} is not in the filter"),
            }
        }
    }

    #[test]
    fn the_same_calls_are_refused_in_every_abi() {
        for (number_64, number_32) in REFUSED {
            assert_eq!(evaluate(X86_64, number_64), REFUSE);
            assert_eq!(evaluate(X86_64, number_64 | !NOT_X32), REFUSE);
            assert_eq!(evaluate(I386, number_32), REFUSE);
        }
        assert_eq!(evaluate(X86_64, REFUSED_X32 | !NOT_X32), REFUSE);
        assert_eq!((evaluate(I386, 404), evaluate(I386, 25)), (REFUSE, REFUSE));
        // clone, mount, setns, bpf and reboot, which containers and the engine make.
        for number in [56, 165, 308, 321, 169] {
            assert_eq!(evaluate(X86_64, number), libc::SECCOMP_RET_ALLOW);
        }
        for number in [120, 21, 346, 357, 88] {
            assert_eq!(evaluate(I386, number), libc::SECCOMP_RET_ALLOW);
        }
    }

    proptest! {
        #[test]
        fn every_number_has_one_of_two_answers_and_foreign_abis_none(number in any::<u32>(), architecture in any::<u32>()) {
            for known in [X86_64, I386] {
                prop_assert!([REFUSE, libc::SECCOMP_RET_ALLOW].contains(&evaluate(known, number)));
            }
            prop_assume!(![X86_64, I386].contains(&architecture));
            prop_assert_eq!(evaluate(architecture, number), REFUSE);
        }
    }
}
