//! Messages from the backend to its child `bulkhead share-server`.
//!
//! The child inherits one end of a `SOCK_SEQPACKET` socket pair as file descriptor [`bulkhead_ipc::inherited::FD`].
//! Each packet is one JSON object of at most [`MAX_PACKET`] bytes, with at most one descriptor beside it. The first is
//! [`Command::State`], the second [`Command::Setup`]. The child sends nothing back; it ends when the vmm's stream or
//! this socket closes.
//!
//! The child opens the shared directories itself, before it confines itself to them. A path that is not a directory at
//! that time is left out, with one line on standard error.

use std::{fs::File, io, os::fd::OwnedFd, path::PathBuf};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use serde::{Deserialize, Serialize};

use bulkhead_ipc::channel::{self, PacketError};

/// Length in bytes of the memory that outlives a process, see [`Command::State`].
pub const STATE_LEN: u64 = crate::fs::STATE_LEN as u64;

/// Creates the memory for [`Command::State`]: without a name, and of a length that no process can change, so that none
/// harms the next one by it.
pub fn new_state() -> io::Result<File> {
    let state = File::from(memfd_create(c"share-state", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
    state.set_len(STATE_LEN)?;
    fcntl_add_seals(&state, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(state)
}

/// Longest packet in bytes.
pub const MAX_PACKET: usize = 65_536;

/// A directory of the host that the guest may use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Absolute path without `.`, `..`, repeated or trailing slashes, as the user names it: its symbolic links are
    /// followed once, when the process starts.
    pub path: PathBuf,
    /// The guest may not change anything in it.
    pub read_only: bool,
}

/// A command of the backend.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Command {
    /// Goes on with what the predecessors of this process left in the file beside this packet: zeros if there is none.
    /// It has [`STATE_LEN`] bytes, cannot shrink, and belongs to this process alone from now on.
    State,
    /// Serves the vhost-user frontend behind the unix stream beside this packet.
    Setup {
        /// The shared directories. One may lie inside of another, which it then hides at that place.
        shares: Vec<Share>,
        /// Absolute paths of directories and files that the guest cannot find, whatever share they are in, nor make.
        hidden: Vec<PathBuf>,
        /// The host keeps the guest's locks.
        locks: bool,
    },
}

/// Receives the next command with the descriptor beside it; `None` when the backend is gone. Blocks until there is one.
pub fn receive(socket: &OwnedFd) -> Result<Option<(Command, Option<OwnedFd>)>, PacketError> {
    channel::receive(socket, &mut vec![0; MAX_PACKET])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_json_objects_with_a_type() {
        let text = r#"{"type":"setup","shares":[{"path":"/home/me","read_only":false}],"hidden":["/home/me/own"],"locks":true}"#;
        let shares = vec![Share { path: "/home/me".into(), read_only: false }];
        let setup = Command::Setup { shares, hidden: vec!["/home/me/own".into()], locks: true };
        assert_eq!(serde_json::to_string(&setup).unwrap(), text);
        assert_eq!(serde_json::from_str::<Command>(text).unwrap(), setup);
    }
}
