//! The thread that fills buffers.

use std::io::Write;

use virtio_queue::DescriptorChain;

use crate::{
    devices::virtio::{ActiveQueue, worker::StopSignal},
    memory::GuestRam,
};

/// Most bytes given for one buffer: a longer one gets a short answer, which 5.4.6.1 allows.
const MAX_LEN: usize = 4096;

pub(super) fn run(stop: &StopSignal, queue: ActiveQueue, memory: &GuestRam) {
    queue.serve(stop, memory, |chain| give(chain, memory));
}

/// Returns how many bytes the buffer got.
fn give(chain: DescriptorChain<&GuestRam>, memory: &GuestRam) -> u32 {
    chain.writer(memory).map_or(0, |mut writer| {
        let mut bytes = [0; MAX_LEN];
        let len = writer.available_bytes().min(MAX_LEN);
        fill(&mut bytes[..len]).and_then(|()| writer.write_all(&bytes[..len])).map_or(0, |()| len as u32)
    })
}

fn fill(bytes: &mut [u8]) -> std::io::Result<()> {
    // SAFETY: the pointer and length are those of `bytes`.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    if usize::try_from(got).is_ok_and(|got| got == bytes.len()) { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
