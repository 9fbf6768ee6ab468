//! A device with its thread, a driver and sockets, ready for a test.

use std::{
    io::Read,
    os::unix::{net::UnixStream, thread::JoinHandleExt},
    path::PathBuf,
    thread,
    time::Duration,
};

use tempfile::TempDir;

use super::driver::{Driver, Layout};
use crate::devices::virtio::{
    VirtioDevice,
    vsock::{
        Vsock, VsockHandle,
        packet::{HOST_CID, Header, Op, TYPE_STREAM},
    },
};

pub(super) const CID: u32 = 3;
pub(super) const GUEST_BUFFER: u32 = 256 << 10;

/// A running device with its driver.
pub(super) struct Machine {
    pub(super) device: Vsock,
    pub(super) handle: VsockHandle,
    pub(super) driver: Driver,
    pub(super) directory: TempDir,
}

impl Machine {
    pub(super) fn off(driver: Driver) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (device, handle) = Vsock::new(CID, &directory.path().join("v.sock"), true).unwrap();
        Self { device, handle, driver, directory }
    }

    pub(super) fn on() -> Self {
        let mut machine = Self::off(Driver::new(true, 4096));
        machine.driver.offer_rx(0..128);
        machine.device.activate(machine.driver.activation()).unwrap();
        machine
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.directory.path().join("v.sock")
    }

    pub(super) fn hand_in(&self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.handle.connect(port, theirs.into());
        ours
    }

    pub(super) fn expect(&mut self, op: Op) -> Header {
        let (header, _) = self.driver.receive();
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, u64::from(CID), TYPE_STREAM));
        header
    }

    /// Hands in a stream that the guest accepts. The header is that of the guest's packets.
    pub(super) fn stream(&mut self) -> (UnixStream, Header) {
        let host = self.hand_in(1024);
        let request = self.expect(Op::Request);
        self.send(answer(&request, Op::Response), b"");
        (host, answer(&request, Op::Rw))
    }

    pub(super) fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.send(&Header { len: payload.len() as u32, ..header }, payload, Layout::One);
    }

    pub(super) fn cpu_time(&self) -> Duration {
        let thread = self.device.thread.as_ref().unwrap().as_pthread_t();
        let mut clock = 0;
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: the thread runs until the device is reset, and both results are local.
        let failed = unsafe {
            libc::pthread_getcpuclockid(thread, &raw mut clock) != 0 || libc::clock_gettime(clock, &raw mut time) != 0
        };
        assert!(!failed);
        Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
    }

    pub(super) fn assert_idle(&self) {
        thread::sleep(Duration::from_millis(50));
        let before = self.cpu_time();
        thread::sleep(Duration::from_millis(300));
        let spent = self.cpu_time().saturating_sub(before);
        assert!(spent < Duration::from_millis(30), "the thread spins: {spent:?} of 300 ms");
    }
}

pub(super) fn answer(to: &Header, op: Op) -> Header {
    Header {
        src_cid: to.dst_cid,
        dst_cid: to.src_cid,
        src_port: to.dst_port,
        dst_port: to.src_port,
        kind: TYPE_STREAM,
        op: op.to_wire(),
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

pub(super) fn request(guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: Op::Request.to_wire(),
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

pub(super) fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

pub(super) fn reads_end(stream: &mut UnixStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    matches!(stream.read(&mut [0]), Ok(0))
}

pub(super) fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|index| index.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect()
}
