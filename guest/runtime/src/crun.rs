//! crun, which sets up the container, and the standard streams that it hands to it.

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

/// crun in the guest image, out of every PATH; `crun` and `runc` in the PATH are this program.
const PRIVATE: &str = "/usr/libexec/bulkhead/crun";

/// crun in Debian's package.
const PACKAGED: &str = "/usr/bin/crun";

/// Major 1, minor 3: `/dev/null` in the kernel's `devices.txt`.
const NULL: Dev = 0x103;

fn path() -> PathBuf {
    let private = Path::new(PRIVATE);
    if private.exists() { private.to_owned() } else { PACKAGED.into() }
}

/// Executes crun in this process; returns only on failure.
pub(crate) fn exec(args: &[OsString]) -> Result<Infallible, Error> {
    let path = path();
    let source = command(&path, args).exec();
    Err(Error::Crun { path, source })
}

/// Has crun kill and delete a container.
pub(crate) fn delete(mut args: Vec<OsString>, id: &str) -> Result<(), Error> {
    args.extend(["delete".into(), "--force".into(), "--".into(), id.into()]);
    // An error of crun's is in the engine's log, and the engine deletes what it could not create.
    run(&args).map(drop)
}

/// Runs crun and waits for it.
pub(crate) fn run(args: &[OsString]) -> Result<ExitCode, Error> {
    let path = path();
    let mut command = command(&path, args);
    // The shim knows this process only: killed, it must not leave a crun behind that goes on with the container.
    sys::end_with_parent(&mut command);
    let status = command.status().map_err(|source| Error::Crun { path, source })?;
    // Without a code, a signal ended it.
    let code = status.code().map_or(1, |code| u8::try_from(code).unwrap_or(1));
    Ok(code.into())
}

fn command(path: &Path, args: &[OsString]) -> Command {
    let mut command = Command::new(path);
    // containerd's own readiness socket, which the shim inherits. crun would offer it to the container's first process.
    command.args(args).env_remove("NOTIFY_SOCKET");
    command
}

/// Gives standard streams that are pipes to the container's root, so that a program can open `/dev/stdout` by its path.
///
/// crun does so itself for `create`. For `exec` it tries inside the user namespace, where it is not allowed to.
pub(crate) fn chown_pipes(first_id: u32) {
    let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
    for stream in [input.as_fd(), output.as_fd(), error.as_fd()] {
        let is_pipe = rustix::fs::fstat(stream).is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::Fifo);
        if is_pipe {
            // At worst the program cannot open the stream by its path; it still has the stream itself.
            let _ = rustix::fs::fchown(stream, Some(Uid::from_raw(first_id)), Some(Gid::from_raw(first_id)));
        }
    }
}

/// Replaces standard streams that are the VM's `/dev/null` with a null device of the container's own.
///
/// crun gives the standard streams to the container's root. For a pipe that is right. But the inode of `/dev/null` is
/// the one that the whole VM uses, and its owner could change its mode.
pub(crate) fn use_private_null() -> io::Result<()> {
    let (input, output, error) = (io::stdin(), io::stdout(), io::stderr());
    let is_null = |stream: BorrowedFd<'_>| {
        rustix::fs::fstat(stream)
            .is_ok_and(|s| FileType::from_raw_mode(s.st_mode) == FileType::CharacterDevice && s.st_rdev == NULL)
    };
    // By device number: the shim can have opened it by any path.
    let replaced = [is_null(input.as_fd()), is_null(output.as_fd()), is_null(error.as_fd())];
    if replaced == [false; 3] {
        return Ok(());
    }
    let null = private_null()?;
    if replaced[0] {
        rustix::stdio::dup2_stdin(&null)?;
    }
    if replaced[1] {
        rustix::stdio::dup2_stdout(&null)?;
    }
    if replaced[2] {
        rustix::stdio::dup2_stderr(&null)?;
    }
    Ok(())
}

/// Creates a null device on a file system of its own, which is mounted nowhere.
fn private_null() -> io::Result<OwnedFd> {
    let context = rustix::mount::fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(&context)?;
    // No `nodev`: the device has to be opened through this mount.
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
