//! Properties of a confined process that are neither calls nor files.

use std::io;

use nix::sys::resource::{Resource, setrlimit};

use super::SandboxError;

/// Keeps the process from writing a core, which would hold what guests and clients have sent, from being read by other
/// processes of the user, and from turning data into code.
pub(super) fn harden() -> Result<(), SandboxError> {
    let failed = |what| move |error: io::Error| SandboxError::Process { what, source: error };
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|errno| failed("turn off core dumps")(errno.into()))?;
    // Neither a debugger of the user nor a core handler that ignores the limit reads this process.
    // SAFETY: prctl with PR_SET_DUMPABLE takes integers only.
    if unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) } != 0 {
        return Err(failed("keep other processes from reading this one")(io::Error::last_os_error()));
    }
    // Memory that was writable once never becomes executable (PR_SET_MDWE). Linux before 6.3 does not know the option;
    // there the system call filter alone refuses PROT_EXEC.
    // SAFETY: prctl with PR_SET_MDWE takes integers only.
    let result = unsafe { libc::prctl(libc::PR_SET_MDWE, libc::PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) };
    match result {
        0 => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            error => Err(failed("refuse executable memory")(error)),
        },
    }
}
