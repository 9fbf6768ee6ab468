//! The thread that serves the queue.

use super::{disk::DiskFile, request::Request};
use crate::{
    virtio::{ActiveQueue, worker::Stop},
    vmm::memory::GuestRam,
};

pub(super) fn run(stop: &Stop, mut active: ActiveQueue, memory: &GuestRam, disk: &DiskFile) {
    loop {
        active.drain(memory, |chain| Request::parse(chain, memory).map_or(0, |request| request.execute(disk, memory)));
        if stop.wait(&[&active.kick]).is_none() {
            return;
        }
        let _ = active.kick.read();
    }
}
