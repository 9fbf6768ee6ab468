//! The event loop, the process's only thread: events of the host's sockets, frames both ways, timers.

use std::os::fd::OwnedFd;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_MRG_RXBUF,
};

use super::{
    api::Command,
    error::NetError,
    events::Token,
    frame,
    frontend::Frontend,
    ring::{BURST, RxSink},
    stack::Stack,
    tcp::sender::Sent,
    vhost::{RX, TX},
};

/// The vmm's device on one side, the host's sockets on the other.
pub(super) struct EventLoop {
    pub(super) frontend: Frontend,
    pub(super) stack: Stack,
}

impl EventLoop {
    /// Runs until the backend or the vmm is gone.
    pub(super) fn run(mut self) -> Result<(), NetError> {
        let mut more = false;
        loop {
            let timeout = if more { 0 } else { self.stack.timeout() };
            for index in 0..self.frontend.wait(timeout)? {
                match self.frontend.token(index) {
                    Token::Control => match self.frontend.receive_command()? {
                        Some((command, descriptor)) => self.execute(command, descriptor),
                        None => return Ok(()),
                    },
                    Token::Frontend => {
                        if !self.frontend.handle_request()? {
                            return Ok(());
                        }
                    }
                    // The kick only ends the wait: frames move after every batch of events.
                    Token::Kick(queue) => self.frontend.take_kick(queue),
                    token => self.stack.host_ready(token, self.frontend.ending(index)),
                }
            }
            more = self.move_frames();
        }
    }

    fn execute(&mut self, command: Command, descriptor: Option<OwnedFd>) {
        match (command, descriptor) {
            (Command::Listen { id, transport, target }, Some(socket)) => {
                self.stack.publish(id, transport, socket, target);
            }
            (Command::Forget { id }, _) => self.stack.forget(id),
            // A second setup, or a port without its socket: the backend sends neither.
            _ => {}
        }
    }

    /// Moves frames both ways; true when there may be more to do at once.
    fn move_frames(&mut self) -> bool {
        let device = &mut *self.frontend.device();
        let Some(memory) = device.memory.clone() else { return false };
        // The driver may negotiate other features after a reset. Connections keep those that they were made with.
        self.stack.offload.checksum = device.has(VIRTIO_NET_F_GUEST_CSUM);
        self.stack.offload.segmentation = device.has(VIRTIO_NET_F_GUEST_TSO4) && device.has(VIRTIO_NET_F_GUEST_TSO6);
        let mergeable = device.has(VIRTIO_NET_F_MRG_RXBUF);
        let mut more = false;
        // The guest's frames come first: its acknowledgements open windows for the data below.
        if device.rings[TX].runs() {
            more = device.rings[TX].pop_frames(&memory, BURST, |frame| self.stack.receive(&frame));
        }
        self.stack.run_timers();
        let ring = &mut device.rings[RX];
        if !ring.runs() {
            return more;
        }
        loop {
            let mut room = true;
            // Ready frames (handshakes, acknowledgements, datagrams) go before bulk data.
            while let Some(frame) = self.stack.out.front() {
                if ring.push_frame(&memory, frame, mergeable) {
                    if let Some(given) = self.stack.out.pop_front() {
                        frame::recycle(given.bytes);
                    }
                } else if !ring.enable_kick(&memory) {
                    room = false;
                    break;
                }
            }
            // Bulk data goes straight from the host's sockets into the guest's buffers.
            while room {
                match self.stack.send(&mut RxSink { ring, memory: &memory, mergeable }) {
                    // Before more is sent the guest's acknowledgements have their turn.
                    Sent::More => {
                        more = true;
                        break;
                    }
                    // The driver may have added buffers since; otherwise its kick continues.
                    Sent::Blocked => room = ring.enable_kick(&memory),
                    Sent::Idle | Sent::End => break,
                }
            }
            // One interrupt for everything of this round.
            ring.signal(&memory);
            let before = self.stack.out.len();
            self.stack.resume();
            if self.stack.out.len() == before || before > 0 {
                // Sending may have ended a connection whose last frames wait in `out`, and no event announces those.
                // With no room, the guest's kick does.
                return more || room && self.stack.has_output();
            }
        }
    }
}
