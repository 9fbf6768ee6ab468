//! The network process of a VM with a tap device: copies frames between device and queues, and looks into none.
//!
//! Guest and kernel tell each other of checksums and segments in the header before each frame
//! (`Documentation/networking/tuntap.rst`), so bulk data moves up to 64 KiB at a time here too.

use std::{
    fs::File,
    io::{self, ErrorKind, IoSliceMut, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};

use super::{
    BURST, Device, NetError,
    control::{self, Command},
    events::{self, Token},
    frame::{Frame, MOST, VIRTIO_HEADER},
    front::Front,
    host,
    vhost::{RX, TX},
};
use bulkhead_ipc::sandbox;

/// Serves the frontend behind `stream` from the device that the next packet brings.
pub(super) fn serve(control: OwnedFd, stream: UnixStream) -> Result<(), NetError> {
    let Some((Command::Tap, Some(tap))) = control::receive(&control)? else {
        return Err(NetError::NoSetup);
    };
    let front = Front::new(control, stream)?;
    events::watch_edges(&front.epoll, &tap, Token::Tap).map_err(host("an epoll event"))?;
    sandbox::confine_tap()?;
    let mut wire = Wire { tap: tap.into(), offload: None, readable: true, waiting: None, buffer: vec![0; MOST] };
    run(front, &mut wire)
}

fn run(mut front: Front, wire: &mut Wire) -> Result<(), NetError> {
    let mut more = false;
    loop {
        for index in 0..front.wait(if more { 0 } else { -1 })? {
            match front.token(index) {
                // No port is published here.
                Token::Control => {
                    if front.command()?.is_none() {
                        return Ok(());
                    }
                }
                Token::Frontend => {
                    if !front.heard()? {
                        return Ok(());
                    }
                }
                Token::Kick(queue) => front.kicked(queue),
                _ => wire.readable = true,
            }
        }
        more = wire.move_frames(&mut front.device());
    }
}

/// The tap device and what is between it and the queues.
struct Wire {
    tap: File,
    /// What the device was last told that the guest takes (`TUN_F_…`).
    offload: Option<u32>,
    /// Whether it may have frames.
    readable: bool,
    /// A frame for which the guest had no buffers.
    waiting: Option<Frame>,
    buffer: Vec<u8>,
}

impl Wire {
    /// Moves frames both ways; true when there may be more to do at once.
    fn move_frames(&mut self, device: &mut Device) -> bool {
        let Some(memory) = device.memory.clone() else { return false };
        self.tell_offload(device);
        let mergeable = device.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut more = false;
        if device.rings[TX].runs() {
            // A frame that the device does not take is lost, as on any wire.
            more = device.rings[TX].take_whole(&memory, BURST, |frame| drop(self.tap.write(frame)));
        }
        let ring = &mut device.rings[RX];
        if !ring.runs() {
            return more;
        }
        for _ in 0..BURST {
            let Some(frame) = self.waiting.take().or_else(|| self.receive()) else {
                ring.signal(&memory);
                return more;
            };
            if !ring.give(&memory, &frame, mergeable) {
                self.waiting = Some(frame);
                if !ring.await_buffers(&memory) {
                    // The guest's kick continues.
                    ring.signal(&memory);
                    return more;
                }
            }
        }
        ring.signal(&memory);
        true
    }

    /// The next frame of the device.
    fn receive(&mut self) -> Option<Frame> {
        if !self.readable {
            return None;
        }
        let mut header = [0; VIRTIO_HEADER];
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut self.buffer)];
        loop {
            match self.tap.read_vectored(&mut parts) {
                Ok(len) => {
                    return Some(Frame { header, bytes: self.buffer[..len.checked_sub(VIRTIO_HEADER)?].to_vec() });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Empty, down or gone; the next event tells.
                Err(_) => {
                    self.readable = false;
                    return None;
                }
            }
        }
    }

    /// Tells the device what the guest's driver takes (`TUNSETOFFLOAD`); for the rest the kernel makes checksums and
    /// segments itself.
    fn tell_offload(&mut self, device: &Device) {
        let mut offload = 0;
        if device.has(VIRTIO_NET_F_GUEST_CSUM) {
            offload |= libc::TUN_F_CSUM;
            for (feature, flag) in
                [(VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4), (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6)]
            {
                if device.has(feature) {
                    offload |= flag;
                }
            }
        }
        if self.offload != Some(offload) {
            // SAFETY: TUNSETOFFLOAD takes its argument by value.
            let told = unsafe { libc::ioctl(self.tap.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
            if told < 0 {
                eprintln!("the tap device does not take the guest's offloads: {}", io::Error::last_os_error());
            }
            self.offload = Some(offload);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixDatagram, sync::Arc};

    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };
    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::{
        epoll::Epoll,
        eventfd::{EFD_NONBLOCK, EventFd},
    };

    use super::*;
    use bulkhead_vmm::memory;

    const WRITABLE: u16 = 2;
    const DATA: u64 = 0x10_0000;
    const BUFFERS: u64 = 0x20_0000;

    #[test]
    fn frames_pass_both_ways_with_their_headers_and_wait_while_the_guest_has_no_buffers() {
        let memory = Arc::new(memory::create(64).unwrap());
        let mut device = Device::new(Arc::new(Epoll::new().unwrap())).unwrap();
        device.memory = Some(Arc::clone(&memory));
        memory.write_slice(b"HEADERHEADERfrom the guest", GuestAddress(DATA)).unwrap();
        let sent = MockSplitQueue::create(&*memory, GuestAddress(0), 16);
        sent.build_multiple_desc_chains(&[RawDescriptor::from(Descriptor::new(DATA, 26, 0, 0))]).unwrap();
        let offered = MockSplitQueue::create(&*memory, GuestAddress(0x8000), 16);
        let buffers = [BUFFERS, BUFFERS + 0x1000].map(|at| RawDescriptor::from(Descriptor::new(at, 2000, WRITABLE, 0)));
        offered.build_multiple_desc_chains(&buffers).unwrap();
        for (index, queue) in [(TX, sent.create_queue().unwrap()), (RX, offered.create_queue().unwrap())] {
            let ring = &mut device.rings[index];
            ring.queue = queue;
            ring.enabled = true;
            ring.kick = Some(EventFd::new(EFD_NONBLOCK).unwrap());
        }
        // Datagrams come one by one, as a device's frames do.
        let (tap, wire) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let tap = File::from(OwnedFd::from(tap));
        let mut moved = Wire { tap, offload: Some(0), readable: true, waiting: None, buffer: vec![0; MOST] };
        for text in [&b"HEADERHEADERone"[..], b"HEADERHEADERtwo", b"HEADERHEADERthree", b"short"] {
            wire.send(text).unwrap();
        }
        assert!(!moved.move_frames(&mut device));
        let mut buffer = [0; 100];
        let len = wire.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..len], b"HEADERHEADERfrom the guest");
        let used: Vec<_> = (0..2).map(|index| offered.used().ring().ref_at(index).unwrap().load().len()).collect();
        assert_eq!((offered.used().idx().load(), used), (2, vec![15, 15]));
        let mut received = [0; 15];
        memory.read_slice(&mut received, GuestAddress(BUFFERS + 0x1000)).unwrap();
        // `num_buffers` is the device's to say.
        assert_eq!(&received, b"HEADERHEAD\x01\x00two");
        assert_eq!(moved.waiting.as_ref().map(|frame| frame.bytes.clone()), Some(b"three".to_vec()));
    }
}
