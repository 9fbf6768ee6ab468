//! The thread that reads the guest's output.

use std::{
    io::{self, Read},
    sync::{Mutex, PoisonError},
};

use virtio_queue::DescriptorChain;

use super::ConsoleLog;
use crate::{
    devices::virtio::{ActiveQueue, worker::StopSignal},
    memory::GuestRam,
};

pub(super) fn run(stop: &StopSignal, queue: ActiveQueue, memory: &GuestRam, log: &Mutex<ConsoleLog>) -> io::Result<()> {
    queue.serve(stop, memory, |chain| {
        take(chain, memory, log);
        0
    })
}

fn take(chain: DescriptorChain<&GuestRam>, memory: &GuestRam, log: &Mutex<ConsoleLog>) {
    if let Ok(mut reader) = chain.reader(memory) {
        // Piece by piece, so that a chain of gigabytes costs time but no memory here.
        let mut piece = [0; 4096];
        while let Ok(len @ 1..) = reader.read(&mut piece) {
            log.lock().unwrap_or_else(PoisonError::into_inner).append(&piece[..len]);
        }
    }
}
