//! A 16550 UART without input, for a serial console on request.

use std::io::{self, Write};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Length of the register block in bytes.
pub const LEN: u64 = 8;

/// The interrupt line, which is an irqfd.
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> Result<(), io::Error> {
        self.0.write(1)
    }
}

/// The port. The guest's output goes to `W`.
pub struct SerialPort<W: Write>(Serial<Line, NoEvents, W>);

impl<W: Write> SerialPort<W> {
    /// Creates a port with this interrupt and output.
    pub fn new(line: EventFd, output: W) -> Self {
        Self(Serial::new(Line(line), output))
    }
}

impl<W: Write + Send> BusDevice for SerialPort<W> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The registers have a byte each; wider accesses read as zero.
        data.fill(0);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            // A full or closed log must not stop the guest: the byte is lost, as on a line without a receiver.
            let _ = self.0.write(offset, *byte);
        }
    }
}
