//! passt(1) of the host as the backend of the network device.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use bulkhead_ipc::inherited::FD;
use bulkhead_net::addresses::{Addresses, MTU};

/// Why passt cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not there.
    #[error(
        "there is no `passt` in PATH; install the package passt (2024_11_27 or later), or use the network `user`, which \
         needs no other program"
    )]
    Missing,
    /// It does not run.
    #[error("{program} cannot be run", program = .0.display())]
    Run(PathBuf, #[source] std::io::Error),
    /// It is too old.
    #[error(
        "{} ({version}) does not speak vhost-user, which passt has since 2024_11_27; install a later one, or use the \
         network `user`",
        program.display()
    )]
    Old {
        /// Where it is.
        program: PathBuf,
        /// What it calls itself.
        version: String,
    },
}

/// A passt that can be used.
#[derive(Clone, Debug)]
pub(in crate::backend) struct Passt {
    program: PathBuf,
}

impl Passt {
    /// Looks for it in `PATH`, and for what it can.
    pub(super) fn find() -> Result<Self, PasstError> {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        Self::find_in(std::env::split_paths(&folders))
    }

    fn find_in(folders: impl IntoIterator<Item = PathBuf>) -> Result<Self, PasstError> {
        let mut paths = folders.into_iter().filter(|folder| folder.is_absolute()).map(|folder| folder.join("passt"));
        let program = paths.find(|path| path.is_file()).ok_or(PasstError::Missing)?;
        if says(&program, "--help")?.contains("--vhost-user") {
            return Ok(Self { program });
        }
        let version = says(&program, "--version")?.lines().next().unwrap_or("no version").trim().to_owned();
        Err(PasstError::Old { version: crate::backend::logs::clean(&version).chars().take(80).collect(), program })
    }

    /// The program.
    pub(super) fn program(&self) -> &Path {
        &self.program
    }

    /// Its arguments: the same addresses as our own process has, and nothing that listens.
    pub(super) fn arguments(addresses: &Addresses) -> Vec<OsString> {
        let (prefix, mtu, fd) = (addresses.prefix.to_string(), MTU.to_string(), FD.to_string());
        let [guest, gateway] = [addresses.guest, addresses.gateway].map(|address| address.to_string());
        let host = if addresses.host_loopback { addresses.host.to_string() } else { "none".to_owned() };
        let words = [
            "--vhost-user",
            "--foreground",
            "--quiet",
            "--ipv4-only",
            "--no-dhcp",
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

/// What the program prints, at most 64 KiB.
fn says(program: &Path, argument: &str) -> Result<String, PasstError> {
    let run = Command::new(program).arg(argument).stdin(Stdio::null()).output();
    let output = run.map_err(|error| PasstError::Run(program.to_owned(), error))?;
    let all = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&all[..all.len().min(64 * 1024)]).into_owned())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    fn folder(script: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("passt");
        fs::write(&path, script).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }

    #[test]
    fn a_passt_without_vhost_user_is_refused_with_its_version_and_the_remedy() {
        let old = folder(
            "#!/bin/sh\ncase $1 in --version) echo 'passt 0.0~git20230309';; *) echo '  --socket PATH' >&2; esac\n",
        );
        let message = Passt::find_in([old.path().to_owned()]).unwrap_err().to_string();
        assert!(message.contains("passt 0.0~git20230309") && message.contains("2024_11_27"), "{message}");
        assert!(matches!(Passt::find_in([PathBuf::from("/nonexistent")]), Err(PasstError::Missing)));
        let new = folder("#!/bin/sh\necho '  --vhost-user'\n");
        assert_eq!(Passt::find_in([new.path().to_owned()]).unwrap().program(), new.path().join("passt"));
    }
}
