//! The connection to a vhost-user backend (QEMU documentation, "Vhost-user Protocol").

use std::{io, os::unix::net::UnixStream, sync::Arc, time::Duration};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{
        Frontend, VhostUserFrontend,
        message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures},
    },
};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::Kind;
use crate::{devices::virtio::ActiveQueue, memory::GuestRam};

/// Time that the backend has for a reply. A vCPU may be waiting for it, in the middle of a register access.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);

/// An error in using a backend; each text begins with its process.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A request failed or was rejected.
    #[error("the {process} process failed to {what}")]
    Request {
        /// The backend's name.
        process: &'static str,
        /// The operation: a verb and its object.
        what: &'static str,
        /// The error of the protocol.
        #[source]
        source: vhost::Error,
    },
    /// The configuration space is none that a driver can work with.
    #[error("the {0} process reports an invalid configuration of its device")]
    Configuration(&'static str),
    /// The backend offers less than its predecessor.
    #[error("the {0} process lacks features that the guest already uses")]
    Features(&'static str),
    /// A queue lies outside of guest memory.
    #[error("the {0} process was to serve a queue outside of guest memory")]
    Queue(&'static str),
    /// The host refused a descriptor.
    #[error("cannot get a descriptor or event from the host")]
    Host(#[from] io::Error),
}

/// Addresses and signals of a queue.
struct Ring {
    /// The queue's number in the device.
    index: usize,
    size: u16,
    descriptors: GuestAddress,
    driver: GuestAddress,
    device: GuestAddress,
    kick: EventFd,
    call: EventFd,
}

/// The queues that the driver enabled, as it configured them; kept for the backend's successors.
pub(super) struct Rings {
    memory: Arc<GuestRam>,
    features: u64,
    each: Vec<Ring>,
}

impl Rings {
    pub(super) fn new(memory: Arc<GuestRam>, features: u64, queues: &[Option<ActiveQueue>]) -> io::Result<Self> {
        let ring = |(index, active): (usize, &ActiveQueue)| {
            Ok(Ring {
                index,
                size: active.queue.size(),
                descriptors: GuestAddress(active.queue.desc_table()),
                driver: GuestAddress(active.queue.avail_ring()),
                device: GuestAddress(active.queue.used_ring()),
                kick: active.kick.try_clone()?,
                // Without a vector the backend still needs an event to write to. Nothing reads it.
                call: active.interrupt.event().map_or_else(|| EventFd::new(EFD_NONBLOCK), Ok)?,
            })
        };
        let enabled = queues.iter().enumerate().filter_map(|(index, queue)| Some((index, queue.as_ref()?)));
        Ok(Self { memory, features, each: enabled.map(ring).collect::<io::Result<_>>()? })
    }

    /// Kicks the backend and interrupts the driver for each queue. Both have to accept spurious notifications (virtio
    /// 1.3, 2.7.7.1 and 2.7.10.2).
    pub(super) fn signal_all(&self) {
        for ring in &self.each {
            // A write fails only when the counter is full, and then the event is raised anyway.
            let _ = ring.kick.write(1);
            let _ = ring.call.write(1);
        }
    }
}

/// A connected backend.
pub(super) struct Link {
    kind: &'static Kind,
    frontend: Frontend,
    /// The backend's features, those of the protocol included.
    offered: u64,
    protocol: VhostUserProtocolFeatures,
}

impl Link {
    /// Connects to the backend and negotiates the protocol.
    pub(super) fn connect(kind: &'static Kind, stream: UnixStream) -> Result<Self, LinkError> {
        let failed = |what| failed(kind, what);
        stream.set_read_timeout(Some(REPLY_TIMEOUT))?;
        stream.set_write_timeout(Some(REPLY_TIMEOUT))?;
        let mut frontend = Frontend::from_stream(stream, kind.queue_sizes.len() as u64);
        // The first message of a session.
        frontend.set_owner().map_err(failed("answer"))?;
        let offered = frontend.get_features().map_err(failed("report its features"))?;
        // CONFIG lets the backend supply the configuration space. With REPLY_ACK each request is confirmed, so an error
        // is seen at the request that caused it.
        let mut protocol = VhostUserProtocolFeatures::empty();
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            protocol = frontend.get_protocol_features().map_err(failed("report its protocol features"))?
                & (VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK);
            frontend.set_protocol_features(protocol).map_err(failed("accept the protocol features"))?;
            if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
                frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
            }
        }
        Ok(Self { kind, frontend, offered, protocol })
    }

    /// The features to offer to the driver.
    pub(super) fn features(&self) -> u64 {
        let configured = self.protocol.contains(VhostUserProtocolFeatures::CONFIG);
        let unknown = if configured { 0 } else { self.kind.configured_features };
        self.offered & self.kind.features & !unknown
    }

    /// Reads the device's configuration space; zeroes if the backend has none.
    pub(super) fn config(&mut self) -> Result<Vec<u8>, LinkError> {
        let length = self.kind.config_len;
        let mut config = vec![0; length];
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIG) {
            let (_, payload) = self
                .frontend
                .get_config(0, length as u32, VhostUserConfigFlags::WRITABLE, &config)
                .map_err(failed(self.kind, "report its configuration"))?;
            // The reply may be shorter than asked for.
            for (to, from) in config.iter_mut().zip(payload) {
                *to = from;
            }
        }
        if (self.kind.accepts)(&config) { Ok(config) } else { Err(LinkError::Configuration(self.kind.process)) }
    }

    /// Hands guest memory and the queues to the backend.
    ///
    /// Each queue continues at its used index. Backends complete the chains of a queue in order, so after a crash of
    /// the predecessor exactly the chains that were not completed are served again. One that completes some of them
    /// later keeps account of those, and goes on behind them.
    pub(super) fn start(&mut self, rings: &Rings) -> Result<(), LinkError> {
        let failed = |what| failed(self.kind, what);
        // The bit for protocol features is acknowledged here and is not one of virtio's; the driver never sees it.
        let extra = self.offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.frontend.set_features(rings.features | extra).map_err(failed("accept the driver's features"))?;
        // Before the addresses of queues, which refer to this table. Each region goes with its memfd.
        let regions = rings.memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region);
        let regions = regions.collect::<Result<Vec<_>, _>>().map_err(failed("get a description of guest memory"))?;
        self.frontend.set_mem_table(&regions).map_err(failed("map guest memory"))?;
        for ring in &rings.each {
            // vhost-user has addresses of this process, which the backend translates by the table of regions. The
            // driver's are validated, yet translated with a check.
            let outside = || LinkError::Queue(self.kind.process);
            let host = |address| rings.memory.get_host_address(address).map(|p| p as u64).map_err(|_| outside());
            // `used.idx` follows `flags` (virtio 1.3, 2.7.8).
            let used = ring.device.0.checked_add(2).ok_or_else(outside)?;
            let base: u16 = rings.memory.read_obj(GuestAddress(used)).map_err(|_| outside())?;
            let addresses = VringConfigData {
                queue_max_size: ring.size,
                queue_size: ring.size,
                flags: 0,
                desc_table_addr: host(ring.descriptors)?,
                used_ring_addr: host(ring.device)?,
                avail_ring_addr: host(ring.driver)?,
                log_addr: None,
            };
            // The kick comes last: a backend starts a ring when it receives its kick event.
            self.frontend.set_vring_num(ring.index, ring.size).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_addr(ring.index, &addresses).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_base(ring.index, base).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_call(ring.index, &ring.call).map_err(failed("set up a queue"))?;
            self.frontend.set_vring_kick(ring.index, &ring.kick).map_err(failed("set up a queue"))?;
            // With protocol features a ring starts disabled, without them enabled.
            if extra != 0 {
                self.frontend.set_vring_enable(ring.index, true).map_err(failed("enable a queue"))?;
            }
        }
        Ok(())
    }

    /// Takes the queues back. The backend's reply means that it touches guest memory no more.
    pub(super) fn stop(&mut self, rings: &Rings) -> Result<(), LinkError> {
        // The index in the reply is not needed: the driver resets the queues.
        for ring in &rings.each {
            self.frontend.get_vring_base(ring.index).map_err(failed(self.kind, "return a queue"))?;
        }
        Ok(())
    }
}

/// Wraps the error of a request.
fn failed(kind: &'static Kind, what: &'static str) -> impl FnOnce(vhost::Error) -> LinkError {
    move |source| LinkError::Request { process: kind.process, what, source }
}
