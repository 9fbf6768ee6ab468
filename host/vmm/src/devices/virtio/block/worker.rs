//! The thread that serves the queue.

use super::{disk::DiskFile, request::Request};
use crate::{
    devices::virtio::{ActiveQueue, worker::StopSignal},
    memory::GuestRam,
};

/// Serves requests one after the other, so that a FLUSH finds all earlier writes completed.
pub(super) fn run(stop: &StopSignal, queue: ActiveQueue, memory: &GuestRam, disk: &DiskFile) -> std::io::Result<()> {
    queue.serve(stop, memory, |chain| Request::parse(chain, memory).map_or(0, |request| request.execute(disk, memory)))
}
