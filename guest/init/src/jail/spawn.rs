//! The start of a service by the jailer.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

use super::{Request, confine, error::JailError, sys};

/// Starts a service as a child of init and returns its process id.
pub(super) fn spawn(request: &Request, output: File, procs: &File) -> Result<i32, JailError> {
    let (program, arguments) = request.words.split_first().ok_or(JailError::Request)?;
    let failed = |source| JailError::Start { program: program.clone(), source };
    let second = output.try_clone().map_err(failed)?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(request.environment.iter().map(|(name, value)| (name, value)))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(second);
    // Closed by a successful exec; otherwise the reason comes through it.
    let (mut reader, mut writer) = io::pipe().map_err(failed)?;
    let pid = sys::fork_sibling().map_err(failed)?;
    if pid == 0 {
        let error = become_service(&mut command, request, procs);
        let number = error.raw_os_error().unwrap_or(libc::EIO);
        let _ = writer.write_all(&number.to_ne_bytes());
        sys::end_at_once();
    }
    drop(writer);
    let mut number = Vec::new();
    reader.read_to_end(&mut number).map_err(failed)?;
    match <[u8; 4]>::try_from(number) {
        // init is its parent and reaps it as it does every orphan.
        Ok(number) => Err(failed(io::Error::from_raw_os_error(i32::from_ne_bytes(number)))),
        Err(_) => Ok(pid),
    }
}

/// Turns this process into the service; returns only on failure.
fn become_service(command: &mut Command, request: &Request, mut procs: &File) -> io::Error {
    let mut prepare = || -> io::Result<()> {
        // `0` stands for the writer (cgroup-v2.rst): it is in its group before its first instruction.
        procs.write_all(b"0")?;
        // No controlling terminal, and signals to its process group stay inside the service.
        nix::unistd::setsid()?;
        if !request.all_capabilities {
            confine::drop_capabilities()?;
        }
        Ok(())
    };
    match prepare() {
        Ok(()) => command.exec(),
        Err(error) => error,
    }
}
