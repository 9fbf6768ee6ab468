//! System calls, asked for by number: many of them have no wrapper, and some are asked for in a foreign ABI on purpose.

use std::{
    arch::asm,
    ffi::{CStr, CString},
    io,
    os::fd::{FromRawFd, OwnedFd},
};

use crate::attempt::Blocked;

/// One argument of a system call.
pub(crate) trait Argument {
    /// As the kernel takes it.
    fn raw(&self) -> u64;
}

macro_rules! integers {
    ($($kind:ty),*) => { $(impl Argument for $kind { fn raw(&self) -> u64 { *self as u64 } })* };
}
integers!(i32, i64, u64, usize);

impl Argument for u32 {
    fn raw(&self) -> u64 {
        u64::from(*self)
    }
}

impl Argument for &CStr {
    fn raw(&self) -> u64 {
        self.as_ptr() as u64
    }
}

impl Argument for &CString {
    fn raw(&self) -> u64 {
        self.as_ptr() as u64
    }
}

impl<T> Argument for *const T {
    fn raw(&self) -> u64 {
        *self as u64
    }
}

impl<T> Argument for *mut T {
    fn raw(&self) -> u64 {
        *self as u64
    }
}

/// Makes a system call in the native ABI; missing arguments are 0.
pub(crate) fn call(number: libc::c_long, arguments: &[&dyn Argument]) -> io::Result<u64> {
    let mut raw = [0; 6];
    for (place, argument) in raw.iter_mut().zip(arguments) {
        *place = argument.raw();
    }
    // SAFETY: every caller passes integers and pointers to buffers of its own that live across the call and are as long
    // as the call may write; the process exists for nothing but such calls.
    let result = unsafe { libc::syscall(number, raw[0], raw[1], raw[2], raw[3], raw[4], raw[5]) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as u64) }
}

/// A system call that makes a descriptor.
pub(crate) fn open_call(number: libc::c_long, arguments: &[&dyn Argument]) -> io::Result<OwnedFd> {
    let fd = call(number, arguments)?;
    // SAFETY: the kernel just made this descriptor for the caller alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Makes a system call in the 32-bit ABI, with arguments that fit in 32 bits. Without that ABI it is a SIGSEGV.
pub(crate) fn call_32(number: u32, arguments: [u32; 3]) -> io::Result<u64> {
    let mut result = u64::from(number);
    let [first, second, third] = arguments.map(u64::from);
    // SAFETY: the gate of the 32-bit ABI changes rax and may clear r8 to r11; rbx, which the compiler keeps for itself,
    // is put back. Pointers among the arguments point below 4 GiB, to memory that lives across the call.
    unsafe {
        asm!(
            "xchg {first}, rbx",
            "int 0x80",
            "xchg {first}, rbx",
            first = inout(reg) first => _,
            inout("rax") result,
            in("rcx") second,
            in("rdx") third,
            in("rsi") 0_u64,
            in("rdi") 0_u64,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    let result = result as u32 as i32;
    if (-4095..0).contains(&result) { Err(io::Error::from_raw_os_error(-result)) } else { Ok(result as u64) }
}

/// Memory of the kernel's choice, or a part of a file.
pub(crate) fn map(fd: i32, length: usize, offset: i64, flags: i32) -> io::Result<*mut libc::c_void> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: without MAP_FIXED no memory in use is touched.
    let at = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, fd, offset) };
    if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(at) }
}

/// A path for the kernel.
pub(crate) fn c(path: &str) -> Result<CString, Blocked> {
    CString::new(path).map_err(|_| Blocked::Absent(format!("{path:?} is not a path")))
}

/// mount(2).
pub(crate) fn mount(source: &str, target: &str, kind: &str, flags: u64, options: &str) -> Result<(), Blocked> {
    let words = [c(source)?, c(target)?, c(kind)?, c(options)?];
    let made = call(libc::SYS_mount, &[&&words[0], &&words[1], &&words[2], &flags, &&words[3]]);
    made.map(drop).map_err(|error| Blocked::at(&format!("mount {kind} {target}"), &error))
}

/// unshare(2).
pub(crate) fn unshare(flags: i32) -> io::Result<()> {
    call(libc::SYS_unshare, &[&flags]).map(drop)
}
