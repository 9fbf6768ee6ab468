//! The process that makes the jail and starts the services in it.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    process::ExitCode,
};

use bulkhead_guest_common::error::chain;
use bulkhead_policy::shares::MOUNT_POINT;

use super::{
    Answer, Request, confine,
    error::JailError,
    root, spawn,
    sys::{self, Packet},
};

/// Runs the jailer. Standard input is the socket to init.
pub(crate) fn main() -> ExitCode {
    let socket = io::stdin();
    let made = root::enter(MOUNT_POINT).and_then(|()| confine::confine());
    let answer = made.map_or_else(|error| Answer::Failed(chain(&error)), |()| Answer::Ready);
    let ready = matches!(answer, Answer::Ready);
    if reply(socket.as_fd(), &answer).is_err() || !ready {
        return ExitCode::FAILURE;
    }
    // Ends when init closes its end, which it never does: the jailer is killed with everything else.
    loop {
        match sys::receive(socket.as_fd()) {
            Ok(Packet { bytes, .. }) if bytes.is_empty() => return ExitCode::SUCCESS,
            Ok(packet) => {
                let answer = serve(packet).map_or_else(|error| Answer::Failed(chain(&error)), Answer::Started);
                if reply(socket.as_fd(), &answer).is_err() {
                    return ExitCode::FAILURE;
                }
            }
            Err(error) => {
                eprintln!("cannot hear from init: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
}

fn serve(packet: Packet) -> Result<i32, JailError> {
    let request: Request = serde_json::from_slice(&packet.bytes).map_err(|_| JailError::Request)?;
    let [output, procs] = <[_; 2]>::try_from(packet.descriptors).map_err(|_| JailError::Request)?;
    spawn::spawn(&request, File::from(output), &File::from(procs))
}

fn reply(socket: BorrowedFd<'_>, answer: &Answer) -> io::Result<()> {
    sys::send(socket, &serde_json::to_vec(answer)?, &[])
}
