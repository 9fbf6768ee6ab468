//! passt(1) of the host as the backend of the network device.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bulkhead_ipc::inherited::FD;
use bulkhead_net::addresses::{Addresses, MTU};

use crate::backend::logs;

/// Longest output of passt that is read, in bytes.
const MAX_OUTPUT: usize = 64 * 1024;

/// Longest version that an error shows, in characters.
const MAX_VERSION: usize = 80;

/// Reason that passt cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error(
        "there is no `passt` in PATH; install the package passt (2024_11_27 or later), or use the network `user`, which \
         needs no other program"
    )]
    Missing,
    /// It does not run.
    #[error("cannot run {program}", program = .0.display())]
    Run(PathBuf, #[source] std::io::Error),
    /// It is too old.
    #[error(
        "{} ({version}) does not support vhost-user, which passt has since 2024_11_27; install a later version, or use \
         the network `user`",
        program.display()
    )]
    Old {
        /// Its path.
        program: PathBuf,
        /// The first line of `passt --version`.
        version: String,
    },
}

/// A passt that can be used.
#[derive(Clone, Debug)]
pub(in crate::backend) struct Passt {
    program: PathBuf,
}

impl Passt {
    /// Looks for a passt with vhost-user in `PATH`.
    pub(super) fn find() -> Result<Self, PasstError> {
        let directories = std::env::var_os("PATH").unwrap_or_default();
        Self::find_in(std::env::split_paths(&directories))
    }

    fn find_in(directories: impl IntoIterator<Item = PathBuf>) -> Result<Self, PasstError> {
        // A relative entry of PATH would mean another directory in the backend than in the command.
        let mut paths =
            directories.into_iter().filter(|path| path.is_absolute()).map(|directory| directory.join("passt"));
        let program = paths.find(|path| path.is_file()).ok_or(PasstError::Missing)?;
        // Distributions number their packages differently (`0.0~git20230309`), so the option decides, not the version.
        if output_of(&program, "--help")?.contains("--vhost-user") {
            return Ok(Self { program });
        }
        let version = output_of(&program, "--version")?.lines().next().unwrap_or("no version").trim().to_owned();
        Err(PasstError::Old { version: logs::clean(&version).chars().take(MAX_VERSION).collect(), program })
    }

    /// The path of the program.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// Returns its arguments: the same addresses as our own process has, and nothing that listens.
    pub(super) fn arguments(addresses: &Addresses) -> Vec<OsString> {
        let (prefix, mtu, fd) = (addresses.prefix.to_string(), MTU.to_string(), FD.to_string());
        let [guest, gateway] = [addresses.guest, addresses.gateway].map(|address| address.to_string());
        let host = if addresses.host_loopback { addresses.host.to_string() } else { "none".to_owned() };
        let words = [
            "--vhost-user",
            // In the foreground it stays our child and is killed with the backend.
            "--foreground",
            "--quiet",
            "--ipv4-only",
            // init configures the guest's address itself.
            "--no-dhcp",
            // The connected stream to the vmm, in place of a socket to listen on.
            "--fd",
            &fd,
            "--address",
            &guest,
            "--netmask",
            &prefix,
            "--gateway",
            &gateway,
            "--mtu",
            &mtu,
            // By default passt leads the gateway's address to the host's loopback, which `hostLoopback` may forbid.
            "--map-host-loopback",
            &host,
            "--dns-forward",
            &gateway,
            "--tcp-ports",
            "none",
            "--udp-ports",
            "none",
        ];
        words.into_iter().map(OsString::from).collect()
    }
}

/// Returns the program's output and errors, at most [`MAX_OUTPUT`] bytes.
fn output_of(program: &Path, argument: &str) -> Result<String, PasstError> {
    let run = Command::new(program).arg(argument).stdin(Stdio::null()).output();
    let output = run.map_err(|error| PasstError::Run(program.to_owned(), error))?;
    // Some versions print their help to standard error.
    let all = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&all[..all.len().min(MAX_OUTPUT)]).into_owned())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn directory(script: &str) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("passt");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        directory
    }

    #[test]
    fn a_passt_without_vhost_user_is_refused_with_its_version_and_the_remedy() {
        let old = directory(
            "#!/bin/sh\ncase $1 in --version) echo 'passt 0.0~git20230309';; *) echo '  --socket PATH' >&2; esac\n",
        );
        let message = Passt::find_in([old.path().to_owned()]).unwrap_err().to_string();
        assert!(message.contains("passt 0.0~git20230309") && message.contains("2024_11_27"), "{message}");
        assert!(matches!(Passt::find_in([PathBuf::from("/nonexistent")]), Err(PasstError::Missing)));
        let new = directory("#!/bin/sh\necho '  --vhost-user'\n");
        assert_eq!(Passt::find_in([new.path().to_owned()]).unwrap().program(), new.path().join("passt"));
    }
}
