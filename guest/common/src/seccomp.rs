//! Seccomp filters that are written out, for programs that start containers.
//!
//! seccompiler, which the host's processes use, kills a process for each call of another ABI than the one it was
//! compiled for, but i386 and x32 programs must run in containers. libseccomp is a C library, and the guest's programs
//! are static.

use std::io;

/// Loads the 32-bit word of `struct seccomp_data` at an offset into the accumulator.
pub const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
/// ANDs the accumulator with a constant.
pub const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
/// Skips `jt` instructions if the accumulator equals the constant, else `jf`.
pub const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
/// Ends the filter with an answer.
pub const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Offset of the call's number in `struct seccomp_data` (linux/seccomp.h).
pub const NUMBER: u32 = 0;
/// Offset of the architecture.
pub const ARCHITECTURE: u32 = 4;

/// The architecture of 64-bit programs, and of x32 ones (linux/audit.h).
pub const X86_64: u32 = 0xc000_003e;
/// The architecture of 32-bit programs.
pub const I386: u32 = 0x4000_0003;

/// Clears the bit that marks a number of the x32 ABI.
pub const NOT_X32: u32 = !0x4000_0000;

/// An instruction that does not jump.
pub const fn step(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

/// A comparison with the accumulator: skips `jt` instructions if it equals `k`, else `jf`.
pub const fn if_equal(k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: JUMP_EQUAL, jt, jf, k }
}

/// Adds a seccomp filter to this process; all that it executes or forks inherits it.
///
/// # Errors
/// `EACCES` without `CAP_SYS_ADMIN`, `EINVAL` for an invalid filter or a kernel without seccomp.
pub fn add_filter(filter: &[libc::sock_filter]) -> io::Result<()> {
    let len = filter.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    // The C type has a mutable pointer; the kernel only reads through it.
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` names `len` instructions that live across the call, and the kernel copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
