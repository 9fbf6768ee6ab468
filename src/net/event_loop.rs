//! The process's one thread.

use std::os::fd::OwnedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};

use super::{
    api::Command,
    error::NetError,
    events::Token,
    frame,
    frontend::Front,
    ring::{BURST, Offered},
    stack::Stack,
    tcp::sender::Sent,
    vhost::{RX, TX},
};

/// The one thread.
pub(super) struct Loop {
    pub(super) front: Front,
    pub(super) stack: Stack,
}

impl Loop {
    pub(super) fn run(mut self) -> Result<(), NetError> {
        let mut more = false;
        loop {
            let timeout = if more { 0 } else { self.stack.timeout() };
            for index in 0..self.front.wait(timeout)? {
                match self.front.token(index) {
                    Token::Control => match self.front.command()? {
                        Some((command, descriptor)) => self.obey(command, descriptor),
                        None => return Ok(()),
                    },
                    Token::Frontend => {
                        if !self.front.heard()? {
                            return Ok(());
                        }
                    }
                    Token::Kick(queue) => self.front.kicked(queue),
                    token => self.stack.host_ready(token, self.front.ending(index)),
                }
            }
            more = self.move_frames();
        }
    }

    fn obey(&mut self, command: Command, descriptor: Option<OwnedFd>) {
        match (command, descriptor) {
            (Command::Listen { id, transport, target }, Some(socket)) => {
                self.stack.publish(id, transport, socket, target);
            }
            (Command::Forget { id }, _) => self.stack.forget(id),
            // A second setup, or a port without its socket: nothing that the backend does.
            _ => {}
        }
    }

    /// Moves frames both ways; true when there may be more to do at once.
    fn move_frames(&mut self) -> bool {
        let device = &mut *self.front.device();
        let Some(memory) = device.memory.clone() else { return false };
        self.stack.offload.checksum = device.has(VIRTIO_NET_F_GUEST_CSUM);
        self.stack.offload.segmentation = device.has(VIRTIO_NET_F_GUEST_TSO4) && device.has(VIRTIO_NET_F_GUEST_TSO6);
        let mergeable = device.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut more = false;
        if device.rings[TX].runs() {
            more = device.rings[TX].take(&memory, BURST, |frame| self.stack.receive(frame));
        }
        self.stack.run_timers();
        let ring = &mut device.rings[RX];
        if !ring.runs() {
            return more;
        }
        loop {
            let mut room = true;
            while let Some(frame) = self.stack.out.front() {
                if ring.give(&memory, frame, mergeable) {
                    if let Some(given) = self.stack.out.pop_front() {
                        frame::recycle(given.bytes);
                    }
                } else if !ring.await_buffers(&memory) {
                    room = false;
                    break;
                }
            }
            while room {
                match self.stack.send(&mut Offered { ring, memory: &memory, mergeable }) {
                    // Before more is sent the guest's acknowledgements have their turn.
                    Sent::More => {
                        more = true;
                        break;
                    }
                    Sent::Blocked => room = ring.await_buffers(&memory),
                    Sent::Idle | Sent::End => break,
                }
            }
            ring.signal(&memory);
            let before = self.stack.out.len();
            self.stack.resume();
            if self.stack.out.len() == before || before > 0 {
                // Sending may end a connection, whose frames then wait here and are told of by nobody. A guest without
                // buffers is waited for: its kick continues.
                return more || room && self.stack.has_output();
            }
        }
    }
}
