//! Handing over to crun, which does the container set-up.

use std::{
    convert::Infallible,
    ffi::OsString,
    io,
    os::fd::AsFd,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::{FileType, Gid, Uid};

use crate::error::Error;

/// Where the guest image keeps it, out of every PATH.
const PRIVATE: &str = "/usr/libexec/bulkhead/crun";

/// Where Debian keeps it.
const PACKAGED: &str = "/usr/bin/crun";

fn path() -> PathBuf {
    let private = Path::new(PRIVATE);
    if private.exists() { private.to_owned() } else { PACKAGED.into() }
}

/// Turns this process into crun; returns only on failure.
pub(crate) fn exec(args: &[OsString]) -> Result<Infallible, Error> {
    let path = path();
    let source = Command::new(&path).args(args).exec();
    Err(Error::Crun { path, source })
}

/// Gives the standard streams, where they are pipes, to the container's root.
///
/// Without it a program in the container can write to its stdout but not open `/dev/stdout`.
pub(crate) fn own_streams(start: u32) {
    let owner = (Some(Uid::from_raw(start)), Some(Gid::from_raw(start)));
    let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [input.as_fd(), output.as_fd(), error.as_fd()] {
        let is_pipe = rustix::fs::fstat(stream).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Fifo);
        if is_pipe {
            // At worst the stream can't be opened anew, as before.
            let _ = rustix::fs::fchown(stream, owner.0, owner.1);
        }
    }
}
