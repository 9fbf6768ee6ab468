//! The thread that takes what the guest prints.

use std::{
    io::Read,
    sync::{Mutex, PoisonError},
};

use virtio_queue::DescriptorChain;

use super::ConsoleLog;
use crate::{
    virtio::{ActiveQueue, worker::Stop},
    vmm::memory::GuestRam,
};

pub(super) fn run(stop: &Stop, mut active: ActiveQueue, memory: &GuestRam, log: &Mutex<ConsoleLog>) {
    loop {
        active.drain(memory, |chain| {
            serve(chain, memory, log);
            0
        });
        if stop.wait(&[&active.kick]).is_none() {
            return;
        }
        let _ = active.kick.read();
    }
}

fn serve(chain: DescriptorChain<&GuestRam>, memory: &GuestRam, log: &Mutex<ConsoleLog>) {
    if let Ok(mut reader) = chain.reader(memory) {
        let mut piece = [0; 4096];
        while let Ok(len @ 1..) = reader.read(&mut piece) {
            log.lock().unwrap_or_else(PoisonError::into_inner).append(&piece[..len]);
        }
    }
}
