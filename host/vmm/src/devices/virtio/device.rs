//! What a virtio device is to its transport.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_queue::SplitQueue;
use virtio_queue::{DescriptorChain, Queue};
use vmm_sys_util::eventfd::EventFd;

use super::worker::StopSignal;
use crate::memory::GuestRam;

/// Longest that a served chain waits for others before the driver is told: all that it has made available may take
/// seconds, when each means a disk's cache.
const MAX_NOTIFY_DELAY: Duration = Duration::from_millis(1);

/// Tells the driver that something happened; behind it is an MSI-X vector's irqfd.
pub trait Interrupt: Send + Sync {
    /// Signals the driver. Never blocks; a masked vector stays pending (virtio 1.3, 4.1.4.5).
    fn trigger(&self);

    /// An event that does the same when it is written to, for whoever is not in this process; `None` when nobody waits
    /// for the interrupt.
    fn event(&self) -> Option<EventFd>;
}

/// One enabled queue at `DRIVER_OK`. From then on its configuration is frozen: the transport keeps no way to change it.
pub struct ActiveQueue {
    /// The device side of the split virtqueue.
    pub queue: Queue,
    /// Readable when the driver kicked the queue (ioeventfd).
    pub kick: EventFd,
    /// The queue's "used buffer" notification. Ask [`SplitQueue::should_interrupt`] first.
    pub interrupt: Arc<dyn Interrupt>,
}

impl ActiveQueue {
    /// The queue in the hands of a worker.
    pub(crate) fn run(self) -> RunningQueue {
        RunningQueue { queue: SplitQueue::new(self.queue), kick: self.kick, interrupt: self.interrupt }
    }

    /// Serves the queue until the worker is stopped; the body of a thread that has one queue and nothing else.
    pub(crate) fn serve<'m>(
        self,
        stop: &StopSignal,
        memory: &'m GuestRam,
        mut serve: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32,
    ) {
        let mut running = self.run();
        loop {
            running.drain(memory, &mut serve);
            if stop.wait(&[&running.kick]).is_none() {
                return;
            }
            let _ = running.kick.read();
        }
    }
}

/// A queue that a worker serves.
pub(crate) struct RunningQueue {
    pub(crate) queue: SplitQueue,
    pub(crate) kick: EventFd,
    interrupt: Arc<dyn Interrupt>,
}

impl RunningQueue {
    /// Interrupts the driver for the chains completed so far, if it wants to know of them.
    pub(crate) fn notify(&mut self, memory: &GuestRam) {
        if self.queue.should_interrupt(memory) {
            self.interrupt.trigger();
        }
    }

    /// Serves every available chain and notifies the driver; `serve` returns the bytes it wrote into the chain.
    ///
    /// Ends although the available ring claims more when no chain can be taken from it: a driver that plays with its
    /// index must not keep a device's thread from being stopped.
    fn drain<'m>(&mut self, memory: &'m GuestRam, mut serve: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32) {
        loop {
            let (mut taken, mut notified) = (false, Instant::now());
            while let Some(chain) = self.queue.pop(memory) {
                taken = true;
                let head = chain.head_index();
                let written = serve(chain);
                self.queue.complete(memory, head, written);
                if notified.elapsed() >= MAX_NOTIFY_DELAY {
                    self.notify(memory);
                    notified = Instant::now();
                }
            }
            self.notify(memory);
            if !self.queue.enable_notifications(memory) || !taken {
                return;
            }
        }
    }
}

/// What a device gets at `DRIVER_OK`.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestRam>,
    /// Feature bits both sides agreed on.
    pub features: u64,
    /// The queues in order of index; `None` for those the driver left disabled.
    pub queues: Vec<Option<ActiveQueue>>,
    /// "Configuration changed" notification.
    pub config_interrupt: Arc<dyn Interrupt>,
}

/// Why a device could not start. The transport answers with `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver left a queue disabled that the device cannot do without.
    #[error("queue {0} is not enabled")]
    MissingQueue(usize),
    /// The driver placed a queue outside of guest memory.
    #[error("queue {0} lies outside of guest memory")]
    InvalidQueue(usize),
    /// The host refused a thread, descriptor or event.
    #[error("cannot get a thread, descriptor or event from the host")]
    Host(#[from] io::Error),
}

/// A virtio device as its transport sees it. The transport offers `VIRTIO_F_VERSION_1` itself.
pub trait VirtioDevice: Send {
    /// Device id (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue, a power of two; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Feature bits offered, without the transport's own.
    fn features(&self) -> u64;

    /// Reads from the device's configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver reached `DRIVER_OK`: start the workers.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver reset the device: stop the workers and wait until they touch guest memory no more.
    fn reset(&mut self);
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        thread,
    };

    use virtio_queue::{
        desc::{RawDescriptor, split::Descriptor},
        mock::MockSplitQueue,
    };
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::memory;

    #[derive(Default)]
    struct Counter(AtomicUsize);

    impl Interrupt for Counter {
        fn trigger(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }

        fn event(&self) -> Option<EventFd> {
            None
        }
    }

    /// How often the driver was told before each of four chains, and in the end.
    fn told(slow: &[usize]) -> [usize; 5] {
        let memory = memory::create(64).unwrap();
        let mock = MockSplitQueue::new(&memory, 16);
        let chain = RawDescriptor::from(Descriptor::new(0x10_0000, 1, 0, 0));
        mock.build_multiple_desc_chains(&[chain; 4]).unwrap();
        let interrupt = Arc::new(Counter::default());
        let line: Arc<dyn Interrupt> = Arc::<Counter>::clone(&interrupt);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut running = ActiveQueue { queue: mock.create_queue().unwrap(), kick, interrupt: line }.run();
        let (mut told, mut at) = ([0; 5], 0);
        running.drain(&memory, |_| {
            told[at] = interrupt.0.load(Ordering::SeqCst);
            if slow.contains(&at) {
                thread::sleep(2 * MAX_NOTIFY_DELAY);
            }
            at += 1;
            0
        });
        told[4] = interrupt.0.load(Ordering::SeqCst);
        told
    }

    #[test]
    fn the_driver_hears_of_a_slow_chain_before_others_are_served() {
        assert_eq!(told(&[0, 2])[1..4], [1, 1, 2]);
    }

    #[test]
    fn the_driver_hears_of_quick_chains_together() {
        // A busy machine can make any of them slow.
        assert!((0..20).any(|_| told(&[]) == [0, 0, 0, 0, 1]));
    }
}
