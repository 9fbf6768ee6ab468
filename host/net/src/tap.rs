//! The network process of a VM with a tap device: copies frames between the device and the queues, under a tighter
//! filter than the user-mode network's, and interprets none.
//!
//! The device has the same header before each frame as virtio (`IFF_VNET_HDR`, Documentation/networking/tuntap.rst), so
//! guest and host kernel do checksums and segments between them, and bulk data moves up to 64 KiB at a time.

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
    api::{self, Command},
    error::{NetError, cannot},
    events::{self, Token},
    frame::{Frame, MAX_FRAME, VIRTIO_HEADER},
    frontend::Frontend,
    ring::BURST,
    vhost::{Device, RX, TX},
};
use bulkhead_ipc::sandbox;

/// Serves the vmm behind `stream` from the tap device that the backend's next packet brings.
pub(super) fn serve(control: OwnedFd, stream: UnixStream) -> Result<(), NetError> {
    let Some((Command::Tap, Some(tap))) = api::receive(&control)? else {
        return Err(NetError::NoSetup);
    };
    let frontend = Frontend::new(control, stream)?;
    events::watch_edges(&frontend.epoll, &tap, Token::Tap).map_err(cannot("watch the tap device"))?;
    sandbox::confine_tap()?;
    let mut tap = Tap {
        file: tap.into(),
        offload: None,
        readable: true,
        waiting: None,
        buffer: vec![0; MAX_FRAME],
        outgoing: Vec::new(),
    };
    run(frontend, &mut tap)
}

fn run(mut frontend: Frontend, tap: &mut Tap) -> Result<(), NetError> {
    let mut more = false;
    loop {
        for index in 0..frontend.wait(if more { 0 } else { -1 })? {
            match frontend.token(index) {
                // The backend publishes no ports with a tap device; only its end matters.
                Token::Control => {
                    if frontend.receive_command()?.is_none() {
                        return Ok(());
                    }
                }
                Token::Frontend => {
                    if !frontend.handle_request()? {
                        return Ok(());
                    }
                }
                Token::Kick(queue) => frontend.take_kick(queue),
                _ => tap.readable = true,
            }
        }
        more = tap.move_frames(&mut frontend.device());
    }
}

/// The tap device.
struct Tap {
    file: File,
    /// Offloads that were last set on the device (`TUN_F_…`).
    offload: Option<u32>,
    /// The device may have frames; its events are edges.
    readable: bool,
    /// A frame for which the guest had no buffers.
    waiting: Option<Frame>,
    buffer: Vec<u8>,
    /// A frame of the guest, while it is written.
    outgoing: Vec<u8>,
}

impl Tap {
    /// Moves frames both ways; true when there may be more to do at once.
    fn move_frames(&mut self, device: &mut Device) -> bool {
        let Some(memory) = device.memory.clone() else { return false };
        self.update_offload(device);
        let mergeable = device.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut more = false;
        if device.rings[TX].runs() {
            // A frame that the device does not take is lost, as on any wire. The kernel checks the header of the
            // others.
            more = device.rings[TX].pop_frames(&memory, BURST, |frame| {
                let frame = frame.with_header();
                self.outgoing.resize(frame.len(), 0);
                frame.copy(0, &mut self.outgoing);
                drop(self.file.write(&self.outgoing));
            });
        }
        let ring = &mut device.rings[RX];
        if !ring.runs() {
            return more;
        }
        for _ in 0..BURST {
            // The frame that waits was read before all others.
            let Some(frame) = self.waiting.take().or_else(|| self.receive()) else {
                ring.signal(&memory);
                return more;
            };
            if !ring.push_frame(&memory, &frame, mergeable) {
                // The device's queue fills up meanwhile, and drops what comes after.
                self.waiting = Some(frame);
                if !ring.enable_kick(&memory) {
                    // The guest's kick continues.
                    ring.signal(&memory);
                    return more;
                }
            }
        }
        ring.signal(&memory);
        true
    }

    /// Reads the next frame of the device.
    fn receive(&mut self) -> Option<Frame> {
        if !self.readable {
            return None;
        }
        let mut header = [0; VIRTIO_HEADER];
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut self.buffer)];
        loop {
            match self.file.read_vectored(&mut parts) {
                // A frame shorter than the header, which the kernel never makes, ends this turn.
                Ok(len) => {
                    return Some(Frame { header, bytes: self.buffer[..len.checked_sub(VIRTIO_HEADER)?].to_vec() });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Empty, down or gone; an event tells when that changes.
                Err(_) => {
                    self.readable = false;
                    return None;
                }
            }
        }
    }

    /// Sets the offloads that the guest's driver has negotiated on the device (`TUNSETOFFLOAD`). For the rest, the
    /// kernel makes checksums and segments itself.
    fn update_offload(&mut self, device: &Device) {
        // The device refuses segmentation without checksums, as virtio does.
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
            let set = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
            if set < 0 {
                // A full pipe fails this write, at which `eprintln!` would panic.
                let error = io::Error::last_os_error();
                let _ = writeln!(io::stderr(), "cannot set the guest's offloads on the tap device: {error}");
            }
            // Also after a failure, which would only repeat.
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
    use bulkhead_queue::SplitQueue;
    use bulkhead_vmm::memory;

    const WRITABLE: u16 = 2;
    const DATA: u64 = 0x10_0000;
    const BUFFERS: u64 = 0x20_0000;

    #[test]
    fn frames_pass_both_ways_with_headers_and_wait_for_the_guests_buffers() {
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
            ring.queue = SplitQueue::new(queue);
            ring.enabled = true;
            ring.kick = Some(EventFd::new(EFD_NONBLOCK).unwrap());
        }
        // Datagrams come one by one, as a device's frames do.
        let (tap, wire) = UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let file = File::from(OwnedFd::from(tap));
        let mut moved = Tap {
            file,
            offload: Some(0),
            readable: true,
            waiting: None,
            buffer: vec![0; MAX_FRAME],
            outgoing: Vec::new(),
        };
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
