//! io_uring, as far as it takes to have a ring make a socket.

use std::{io, os::fd::AsRawFd};

use crate::sys;

/// `struct io_uring_params` in 32-bit words: 10 of its own, then the offsets of both rings.
const WORDS: usize = 30;
/// Offsets of `sq_off` and `cq_off`.
const SUBMISSION: usize = 10;
const COMPLETION: usize = 20;

/// Offsets for mmap(2).
const SUBMISSION_RING: i64 = 0;
const COMPLETION_RING: i64 = 0x800_0000;
const ENTRIES: i64 = 0x1000_0000;

const IORING_OP_SOCKET: u8 = 45;
const WAIT_FOR_EVENTS: u32 = 1;

/// `struct io_uring_sqe`.
#[repr(C)]
struct Entry {
    opcode: u8,
    flags: u8,
    priority: u16,
    fd: i32,
    offset: u64,
    address: u64,
    length: u32,
    rw_flags: u32,
    rest: [u64; 4],
}

/// socket(2) by a ring.
pub(crate) fn socket(family: i32, kind: i32) -> io::Result<i32> {
    let mut parameters = [0_u32; WORDS];
    let ring = sys::open_call(libc::SYS_io_uring_setup, &[&4, &parameters.as_mut_ptr()])?;
    let fd = ring.as_raw_fd();
    let submission = sys::map(fd, 4096, SUBMISSION_RING, libc::MAP_SHARED)?;
    let completion = sys::map(fd, 4096, COMPLETION_RING, libc::MAP_SHARED)?;
    let entries = sys::map(fd, 4096, ENTRIES, libc::MAP_SHARED)?.cast::<Entry>();
    let entry = Entry {
        opcode: IORING_OP_SOCKET,
        flags: 0,
        priority: 0,
        fd: family,
        offset: kind as u64,
        address: 0,
        length: 0,
        rw_flags: 0,
        rest: [0; 4],
    };
    let word = |ring: *mut libc::c_void, offset: u32| ring.wrapping_byte_add(offset as usize).cast::<u32>();
    // The fields are head, tail, mask, entries, flags, dropped, array for one ring and head, tail, mask, entries,
    // overflow, cqes for the other.
    let (tail, array) = (word(submission, parameters[SUBMISSION + 1]), word(submission, parameters[SUBMISSION + 6]));
    // SAFETY: the kernel said that these offsets are in the pages that it shared; it reads them in the call below only.
    unsafe {
        entries.write(entry);
        array.write_volatile(0);
        tail.write_volatile(tail.read_volatile() + 1);
    }
    sys::call(libc::SYS_io_uring_enter, &[&fd, &1, &1, &WAIT_FOR_EVENTS, &0, &0])?;
    // A completion is a 64-bit token and then the result.
    let result = word(completion, parameters[COMPLETION + 5] + 8);
    // SAFETY: as above; the call waited for the completion.
    let result = unsafe { result.read_volatile() } as i32;
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result) }
}
