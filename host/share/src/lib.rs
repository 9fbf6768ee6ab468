//! Host files for the guest: `bulkhead share-server`, the vhost-user backend of the VM's virtio-fs device (virtio 1.3,
//! 5.11).

pub mod api;
mod error;

use std::{
    io::{self, Write},
    os::unix::net::UnixStream,
    process::ExitCode,
};

use nix::sys::socket::SockType;

use bulkhead_ipc::{inherited, report::chain};

use api::Command;
use error::ShareError;

/// Tag of the device, by which the guest mounts it.
pub const TAG: &str = "bulkhead";

/// Number of request queues. The device has one queue more, the first, for requests that must not wait.
pub const REQUEST_QUEUES: usize = 4;

/// Serves the virtio-fs device until the vmm is gone; the main function of `bulkhead share-server`.
pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "error: share: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> Result<(), ShareError> {
    let control = inherited::socket(SockType::SeqPacket).ok_or(ShareError::Descriptor)?;
    let (shares, stream) = match api::receive(&control)? {
        Some((Command::Setup { shares }, Some(stream))) => (shares, UnixStream::from(stream)),
        _ => return Err(ShareError::NoSetup),
    };
    drop((shares, stream));
    Ok(())
}
