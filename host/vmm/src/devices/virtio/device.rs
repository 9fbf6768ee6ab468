//! The interface between virtio devices and their transport.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_queue::SplitQueue;
use virtio_queue::{DescriptorChain, Queue};
use vmm_sys_util::eventfd::EventFd;

use super::worker::StopSignal;
use crate::{exit::ExitSignal, memory::GuestRam};

/// Maximum time that a completed chain waits for the driver to be interrupted. Interrupts are saved by completing
/// several chains for each, but all that is available may take seconds, if each flushes a disk's cache.
pub(crate) const MAX_NOTIFY_DELAY: Duration = Duration::from_millis(1);

/// An interrupt of the driver. Its implementation is the irqfd of an MSI-X vector.
pub trait Interrupt: Send + Sync {
    /// Interrupts the driver. Never blocks. A masked vector becomes pending (PCI local bus specification 3.0, 6.8.3.5).
    fn trigger(&self);

    /// Returns an eventfd that interrupts the driver when it is written to, for another process; `None` if the driver
    /// has assigned no vector.
    fn event(&self) -> Option<EventFd>;
}

/// An enabled queue at `DRIVER_OK`. From then on its configuration is frozen: the transport has no way to change it.
pub struct ActiveQueue {
    /// The split virtqueue, validated.
    pub queue: Queue,
    /// Becomes readable when the driver kicks the queue (ioeventfd).
    pub kick: EventFd,
    /// The queue's "used buffer" notification. Ask [`SplitQueue::should_interrupt`] first.
    pub interrupt: Arc<dyn Interrupt>,
}

impl ActiveQueue {
    /// Turns the queue into the form that a worker serves.
    pub(crate) fn run(self) -> RunningQueue {
        RunningQueue { queue: SplitQueue::new(self.queue), kick: self.kick, interrupt: self.interrupt }
    }

    /// Serves the queue until the worker is stopped. This is the body of a thread that has one queue and nothing else.
    pub(crate) fn serve<'m>(
        self,
        stop: &StopSignal,
        memory: &'m GuestRam,
        mut serve: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32,
    ) -> io::Result<()> {
        let mut running = self.run();
        loop {
            // Before the first wait: chains may have become available before the queue's kick was watched.
            running.drain(memory, &mut serve);
            if !stop.wait(&[&running.kick], None)? {
                return Ok(());
            }
            // Reset before the queue is looked at again, so that a kick from now on wakes the next wait.
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
    /// Ends although the available ring claims more if no chain could be taken from it: a driver that keeps changing
    /// its index must not keep a device's thread from being stopped.
    fn drain<'m>(&mut self, memory: &'m GuestRam, mut serve: impl FnMut(DescriptorChain<&'m GuestRam>) -> u32) {
        loop {
            let (mut taken, mut notified) = (false, Instant::now());
            while let Some(chain) = self.queue.pop(memory) {
                taken = true;
                let head = chain.head_index();
                let written = serve(chain);
                // Each chain by itself, so that it is visible although others are still to be served.
                self.queue.complete(memory, head, written);
                if notified.elapsed() >= MAX_NOTIFY_DELAY {
                    self.notify(memory);
                    notified = Instant::now();
                }
            }
            // Interrupt first, then ask for kicks and look again: a chain that comes in between is either seen here or
            // kicks.
            self.notify(memory);
            if !self.queue.enable_notifications(memory) || !taken {
                return;
            }
        }
    }
}

/// Everything that a device receives at `DRIVER_OK`.
pub struct Activation {
    /// Guest memory.
    pub memory: Arc<GuestRam>,
    /// Negotiated feature bits.
    pub features: u64,
    /// The queues in order of their indices; `None` for those that the driver did not enable.
    pub queues: Vec<Option<ActiveQueue>>,
    /// The "configuration change" notification.
    pub config_interrupt: Arc<dyn Interrupt>,
    /// Ends the machine if a thread of the device fails.
    pub exit: ExitSignal,
}

/// An error in starting a device, to which the transport responds with `DEVICE_NEEDS_RESET`.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// The driver did not enable a queue that the device needs.
    #[error("queue {0} is not enabled")]
    MissingQueue(usize),
    /// The driver placed a queue outside of guest memory.
    #[error("queue {0} lies outside of guest memory")]
    InvalidQueue(usize),
    /// The host refused a thread, descriptor or event.
    #[error("cannot get a thread, descriptor or event from the host")]
    Host(#[from] io::Error),
}

/// A virtio device. The transport adds `VIRTIO_F_VERSION_1` to its features.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// Maximum size of each queue, a power of two; the length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Feature bits to offer, without those of the transport.
    fn features(&self) -> u64;

    /// Reads from the device's configuration space. Bytes past its end are zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Starts the device's workers; the driver has set `DRIVER_OK`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops the device's workers, and returns once none of them touches guest memory (virtio 1.3, 2.4.1).
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

    /// Returns the number of interrupts before each of four chains, and in the end. Those in `slow` take long.
    fn interrupts(slow: &[usize]) -> [usize; 5] {
        let memory = memory::create(64).unwrap();
        let mock = MockSplitQueue::new(&memory, 16);
        let chain = RawDescriptor::from(Descriptor::new(0x10_0000, 1, 0, 0));
        mock.build_multiple_desc_chains(&[chain; 4]).unwrap();
        let interrupt = Arc::new(Counter::default());
        let line: Arc<dyn Interrupt> = Arc::<Counter>::clone(&interrupt);
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut running = ActiveQueue { queue: mock.create_queue().unwrap(), kick, interrupt: line }.run();
        let (mut counts, mut at) = ([0; 5], 0);
        running.drain(&memory, |_| {
            counts[at] = interrupt.0.load(Ordering::SeqCst);
            if slow.contains(&at) {
                thread::sleep(2 * MAX_NOTIFY_DELAY);
            }
            at += 1;
            0
        });
        counts[4] = interrupt.0.load(Ordering::SeqCst);
        counts
    }

    #[test]
    fn the_driver_is_interrupted_for_a_slow_chain_before_others_are_served() {
        assert_eq!(interrupts(&[0, 2])[1..4], [1, 1, 2]);
    }

    #[test]
    fn the_driver_is_interrupted_once_for_quick_chains() {
        // A busy machine can make any of them slow.
        assert!((0..20).any(|_| interrupts(&[]) == [0, 0, 0, 0, 1]));
    }
}
