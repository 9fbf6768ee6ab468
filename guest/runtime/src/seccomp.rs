//! The seccomp filter of this program's own, which every process of a container inherits through crun.
//!
//! vsock is not namespaced: a process that can create such a socket can talk to the host and to the VM's own ports. The
//! filter is not part of the container's seccomp profile. So it is in force under `--privileged` and
//! `seccomp=unconfined`, with a user's own profile, in `docker exec` and in build steps. Where there is a profile, too,
//! the stricter answer wins (seccomp(2)). A refused call fails as on a kernel without the feature, for which programs
//! are prepared.
//!
//! io_uring is refused because a ring creates sockets past every filter (`IORING_OP_SOCKET`).
//!
//! A 32-bit program can still use `socketcall(2)`, whose arguments are in memory, where no filter can read them.
//! Refusing it would take the network from every 32-bit program with glibc. Such a socket does not reach the VM or the
//! host: their ports are reserved ones, which take a capability in the VM.

use std::io;

use bulkhead_guest_common::seccomp::{
    AND, ARCHITECTURE, I386, LOAD, NOT_X32, NUMBER, RETURN, X86_64, add_filter, if_equal, step,
};

/// The lower half of the first argument, an `int` to the kernel. The upper half is ignored there, so it must be here.
const FAMILY: u32 = 16;

/// System call numbers: of the 64-bit ABI, of the 32-bit ABI, and one that is the same in both.
const SOCKET_64: u32 = 41;
const SOCKET_32: u32 = 359;
const IO_URING_SETUP: u32 = 425;

const VSOCK: u32 = libc::AF_VSOCK as u32;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const NO_FAMILY: u32 = libc::SECCOMP_RET_ERRNO | libc::EAFNOSUPPORT as u32;
const NO_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// The filter. Each number is the instruction's index, and `to` the index that a jump leads to.
const FILTER: [libc::sock_filter; 14] = [
    // The ABI comes first: one number means different calls in different ABIs. x32 has the architecture of x86-64.
    step(LOAD, ARCHITECTURE), // 0
    if_equal(X86_64, 3, 0),   // 1: to 5
    if_equal(I386, 0, 10),    // 2: to 3, or to 13: this kernel has no other ABI, so nothing is allowed in one
    // 32-bit calls.
    step(LOAD, NUMBER),        // 3
    if_equal(SOCKET_32, 4, 3), // 4: to 9, or to 8
    // 64-bit calls, with or without the bit of x32. The 32-bit branch joins at 8.
    step(LOAD, NUMBER),             // 5
    step(AND, NOT_X32),             // 6
    if_equal(SOCKET_64, 1, 0),      // 7: to 9
    if_equal(IO_URING_SETUP, 4, 3), // 8: to 13, or to 12
    // socket(2): only the family matters.
    step(LOAD, FAMILY),      // 9
    if_equal(VSOCK, 0, 1),   // 10: to 12
    step(RETURN, NO_FAMILY), // 11
    step(RETURN, ALLOW),     // 12
    step(RETURN, NO_CALL),   // 13
];

/// Installs the filter in this process; crun and all processes of the container inherit it.
///
/// # Errors
/// If the kernel has no seccomp, or this process lacks the capability. No container must run then.
pub(crate) fn confine() -> io::Result<()> {
    add_filter(&FILTER)
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::seccomp::JUMP_EQUAL;
    use proptest::prelude::*;

    use super::*;

    /// Runs the filter as the kernel would, for the instructions that are in it.
    fn evaluate(architecture: u32, number: u32, first: u64) -> u32 {
        let (mut at, mut accumulator) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = FILTER[at];
            at += 1;
            match code {
                LOAD => {
                    accumulator = match k {
                        NUMBER => number,
                        ARCHITECTURE => architecture,
                        FAMILY => first as u32,
                        _ => panic!("nothing is known to be at {k}"),
                    }
                }
                AND => accumulator &= k,
                JUMP_EQUAL => at += usize::from(if accumulator == k { jt } else { jf }),
                RETURN => return k,
                _ => panic!("{code:#x} is not in the filter"),
            }
        }
    }

    #[test]
    fn a_vsock_socket_is_refused_in_every_abi_and_with_any_upper_half() {
        for (architecture, number) in [(X86_64, SOCKET_64), (X86_64, SOCKET_64 | 0x4000_0000), (I386, SOCKET_32)] {
            for first in [40, (1 << 32) + 40, (0xffff_ffff << 32) + 40] {
                assert_eq!(evaluate(architecture, number, first), NO_FAMILY, "{architecture:#x} {number}");
            }
            assert_eq!(evaluate(architecture, number, 2), ALLOW);
        }
    }

    #[test]
    fn rings_are_refused_in_every_abi() {
        for (architecture, number) in
            [(X86_64, IO_URING_SETUP), (X86_64, IO_URING_SETUP | 0x4000_0000), (I386, IO_URING_SETUP)]
        {
            assert_eq!(evaluate(architecture, number, 8), NO_CALL);
        }
    }

    #[test]
    fn an_abi_that_is_not_known_can_do_nothing() {
        for number in [0, 1, 59, SOCKET_64] {
            assert_eq!(evaluate(0xc000_00b7, number, 2), NO_CALL);
        }
    }

    #[test]
    fn every_instruction_is_reached_and_no_jump_leaves_the_filter() {
        let mut reached = [false; FILTER.len()];
        reached[0] = true;
        for (at, libc::sock_filter { code, jt, jf, .. }) in FILTER.iter().enumerate() {
            assert!(reached[at], "{at} is dead");
            match *code {
                RETURN => {}
                JUMP_EQUAL => {
                    for jump in [jt, jf] {
                        reached[at + 1 + usize::from(*jump)] = true;
                    }
                }
                _ => reached[at + 1] = true,
            }
        }
    }

    /// The kernel's own view, on a thread that ends with the test.
    #[test]
    fn the_kernel_takes_the_filter_and_applies_it() {
        std::thread::spawn(|| {
            // SAFETY: the option takes plain integers and concerns this thread only.
            assert_eq!(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }, 0);
            confine().unwrap();
            let errno = |number: libc::c_long, first: libc::c_long, second: libc::c_long| {
                // SAFETY: only calls are made that take integers, or a null pointer that the kernel refuses.
                let result = unsafe { libc::syscall(number, first, second, 0, 0) };
                if result < 0 { io::Error::last_os_error().raw_os_error() } else { None }
            };
            let stream = libc::c_long::from(libc::SOCK_STREAM);
            assert_eq!(errno(libc::SYS_socket, 40, stream), Some(libc::EAFNOSUPPORT));
            assert_eq!(errno(libc::SYS_socket, (1 << 32) + 40, stream), Some(libc::EAFNOSUPPORT));
            assert_eq!(errno(libc::SYS_socket, 1, stream), None);
            assert_eq!(errno(libc::SYS_socketpair, 1, stream), Some(libc::EFAULT));
            assert_eq!(errno(libc::SYS_io_uring_setup, 1, 0), Some(libc::ENOSYS));
        })
        .join()
        .unwrap();
    }

    proptest! {
        #[test]
        fn everything_else_is_allowed(
            architecture in prop_oneof![Just(X86_64), Just(I386)],
            number in prop_oneof![any::<u32>(), 0_u32..500],
            first in prop_oneof![any::<u64>(), 0_u64..64],
        ) {
            let plain = if architecture == X86_64 { number & NOT_X32 } else { number };
            let makes_socket = plain == if architecture == X86_64 { SOCKET_64 } else { SOCKET_32 };
            let wanted = match plain {
                IO_URING_SETUP => NO_CALL,
                _ if makes_socket && first as u32 == VSOCK => NO_FAMILY,
                _ => ALLOW,
            };
            prop_assert_eq!(evaluate(architecture, number, first), wanted);
        }
    }
}
