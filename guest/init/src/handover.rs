//! Hands to the isolating runtime what the engine's jail does not show.
//!
//! The runtime runs in the jail as everything that dockerd and containerd start, and needs the table of id ranges, the
//! tree of containers' files, the gate's sockets, and `/proc` and `/sys` in full. It connects to a socket that is in
//! the jail, and gets copies of these mounts, attached nowhere, which it mounts in a namespace of its own.
//!
//! Every other process gets nothing. dockerd can be led to connect to any path, and containers do not see the socket;
//! the runtime is known by the file that its process executes, which is on the VM's read-only image.

use std::{
    fs,
    io::{self, IoSlice},
    os::{
        fd::{AsFd, AsRawFd, FromRawFd, OwnedFd},
        unix::{
            fs::{MetadataExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::Path,
    time::Duration,
};

use bulkhead_guest_common::mount;
use bulkhead_protocol::RUNTIME_TREES;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessage, MsgFlags, getsockopt, sendmsg, sockopt::PeerCredentials},
};

use crate::{error::Error, event::spawn, jail, log};

/// The socket in the VM; in the jail it has another name.
pub(crate) const SOCKET: &str = "/run/bulkhead/handover.sock";

/// Limit for sending, which only waits if the peer does not read.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a failed accept, when descriptors have run out.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);

/// A file, by which a program is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Program {
    device: u64,
    inode: u64,
}

impl Program {
    /// The file at a path, with links followed.
    fn at(path: impl AsRef<Path>) -> io::Result<Self> {
        fs::metadata(path).map(|file| Self { device: file.dev(), inode: file.ino() })
    }
}

/// Opens the socket and serves the program at `runtime` on a thread.
pub(crate) fn listen(runtime: &'static str) -> Result<(), Error> {
    let program = Program::at(runtime).map_err(Error::file("look at", runtime))?;
    let listener = UnixListener::bind(SOCKET).map_err(Error::file("listen on", SOCKET))?;
    fs::set_permissions(SOCKET, fs::Permissions::from_mode(0o600)).map_err(Error::file("set the mode of", SOCKET))?;
    spawn("handover", move || {
        loop {
            let served = listener.accept().and_then(|(peer, _)| serve(&peer, program, &RUNTIME_TREES));
            if let Err(error) = served {
                log::info(&format!("cannot hand its directories to a container's runtime: {error}"));
                std::thread::sleep(RETRY_INTERVAL);
            }
        }
    })
}

/// Sends copies of the mounts at `trees` to a peer that executes `program`.
fn serve(peer: &UnixStream, program: Program, trees: &[&str]) -> io::Result<()> {
    if program_of(peer)? != program {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the caller is another program"));
    }
    let copies = trees.iter().map(|path| {
        let tree = mount::clone_tree_at(Path::new(path), true)?;
        // A shared copy would pass the runtime's mounts on to the VM.
        jail::set_attributes(&tree, 0, libc::MS_PRIVATE)?;
        Ok(tree)
    });
    let copies = copies.collect::<io::Result<Vec<_>>>()?;
    let descriptors: Vec<_> = copies.iter().map(AsRawFd::as_raw_fd).collect();
    peer.set_write_timeout(Some(TIMEOUT))?;
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(peer.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Returns the program that the process behind a connection executes.
fn program_of(peer: &UnixStream) -> io::Result<Program> {
    let process = peer_process(peer)?;
    let pid = getsockopt(peer, PeerCredentials)?.pid();
    let program = Program::at(format!("/proc/{pid}/exe"))?;
    // Its number may have become another's before the line above, but not if it still lives: a handle of a process
    // becomes readable with its end.
    let mut ended = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ended, PollTimeout::ZERO)? != 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(program)
}

/// Returns a handle of the process that connected (`SO_PEERPIDFD`, Linux 6.5).
fn peer_process(peer: &UnixStream) -> io::Result<OwnedFd> {
    let mut raw: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `raw`, and both outlive the call.
    let result = unsafe {
        libc::getsockopt(peer.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERPIDFD, (&raw mut raw).cast(), &raw mut length)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nothing else has its number.
    Ok(unsafe { OwnedFd::from_raw_fd(raw) })
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn another_program_gets_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        let (peer, _) = listener.accept().unwrap();
        // The peer is this test; another file of the machine stands for the runtime.
        let refused = serve(&peer, Program::at("/proc/self/status").unwrap(), &["/proc"]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::PermissionDenied);
        drop(peer);
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_program_behind_a_connection_is_known_by_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        let (peer, _) = listener.accept().unwrap();
        let own = std::env::current_exe().unwrap();
        assert_eq!(program_of(&peer).unwrap(), Program::at(own).unwrap());
    }
}
