//! Handing over to crun, which does the container set-up.

use std::{
    convert::Infallible,
    ffi::OsString,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

use rustix::{
    fs::{Dev, FileType, Gid, Mode, OFlags, Uid},
    mount::{FsMountFlags, FsOpenFlags, MountAttrFlags},
};

use crate::{error::Error, sys};

/// Where the guest image keeps it, out of every PATH.
const PRIVATE: &str = "/usr/libexec/bulkhead/crun";

/// Where Debian keeps it.
const PACKAGED: &str = "/usr/bin/crun";

/// Major 1, minor 3: `/dev/null`, as the kernel's list of devices assigns it.
const NULL: Dev = 0x103;

fn path() -> PathBuf {
    let private = Path::new(PRIVATE);
    if private.exists() { private.to_owned() } else { PACKAGED.into() }
}

/// Turns this process into crun; returns only on failure.
pub(crate) fn exec(args: &[OsString]) -> Result<Infallible, Error> {
    let path = path();
    let source = command(&path, args).exec();
    Err(Error::Crun { path, source })
}

/// Runs crun to its end, which comes before this process's own.
pub(crate) fn run(args: &[OsString]) -> Result<ExitCode, Error> {
    let path = path();
    let mut command = command(&path, args);
    sys::end_with_parent(&mut command);
    let status = command.status().map_err(|source| Error::Crun { path, source })?;
    // A signal ended it when there is no code.
    let code = status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1));
    Ok(code.into())
}

fn command(path: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new(path);
    // The readiness socket of containerd is no container's: crun would offer it to the container's first process.
    command.args(args).env_remove("NOTIFY_SOCKET");
    command
}

/// Gives the standard streams, where they are pipes, to the container's root, so that `/dev/stdout` can be opened anew.
///
/// crun does so itself for `create`; for `exec` it tries inside of the user namespace, where it may not.
pub(crate) fn own_pipes(start: u32) {
    let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [input.as_fd(), output.as_fd(), error.as_fd()] {
        let is_pipe = rustix::fs::fstat(stream).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Fifo);
        if is_pipe {
            // At worst the stream can't be opened anew, as before.
            let _ = rustix::fs::fchown(stream, Some(Uid::from_raw(start)), Some(Gid::from_raw(start)));
        }
    }
}

/// Puts a null device of our own in the place of the VM's where that is a standard stream.
///
/// crun gives the standard streams to the container's root, so that a program can open `/dev/stdout` anew. Of a pipe
/// that is right; of `/dev/null` it would be the inode that the whole VM uses, and the container could then change its
/// mode.
pub(crate) fn shield_null() -> io::Result<()> {
    let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
    let is_null = |stream: BorrowedFd<'_>| {
        rustix::fs::fstat(stream)
            .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::CharacterDevice && s.st_rdev == NULL)
    };
    let shielded = [is_null(input.as_fd()), is_null(output.as_fd()), is_null(error.as_fd())];
    if shielded == [false; 3] {
        return Ok(());
    }
    let null = private_null()?;
    if shielded[0] {
        rustix::stdio::dup2_stdin(&null)?;
    }
    if shielded[1] {
        rustix::stdio::dup2_stdout(&null)?;
    }
    if shielded[2] {
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

/// A null device on a file system of its own, which is mounted nowhere.
fn private_null() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    let mount = rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    rustix::fs::mknodat(&mount, "null", FileType::CharacterDevice, Mode::from_raw_mode(0o666), NULL)?;
    rustix::fs::openat(&mount, "null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn the_null_device_number_is_that_of_dev_null() {
        assert_eq!(std::fs::metadata("/dev/null").unwrap().rdev(), NULL);
    }
}
