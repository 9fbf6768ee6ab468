//! The thread that fills the buffers.

use std::io::{self, Write};

use virtio_queue::DescriptorChain;

use crate::{
    devices::virtio::{ActiveQueue, worker::StopSignal},
    memory::GuestRam,
};

/// Maximum number of bytes for a buffer. A longer one is filled in part, for which drivers are prepared (5.4.6.1).
const MAX_LEN: usize = 4096;

pub(super) fn run(stop: &StopSignal, queue: ActiveQueue, memory: &GuestRam) -> io::Result<()> {
    queue.serve(stop, memory, |chain| give(chain, memory))
}

/// Fills a buffer and returns the number of bytes written.
fn give(chain: DescriptorChain<&GuestRam>, memory: &GuestRam) -> u32 {
    chain.writer(memory).map_or(0, |mut writer| {
        // Through a copy, because guest memory may not be borrowed as a Rust slice.
        let mut bytes = [0; MAX_LEN];
        let len = writer.available_bytes().min(MAX_LEN);
        fill(&mut bytes[..len]).and_then(|()| writer.write_all(&bytes[..len])).map_or(0, |()| len as u32)
    })
}

fn fill(bytes: &mut [u8]) -> std::io::Result<()> {
    // Up to 256 bytes always arrive at once; more may be cut short by a signal, which then counts as a failure
    // (getrandom(2)). SAFETY: the pointer and length are those of `bytes`.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got).is_ok_and(|got| got == bytes.len()) { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
