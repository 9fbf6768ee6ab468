//! What a running VM does at the moment, for a person who wonders why it does not answer.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bulkhead_protocol::{Description, HostMessage};
use tokio::{
    sync::{mpsc, oneshot},
    time::{sleep, timeout},
};

use super::{api::Examination, vmm::VmmChannel};
use bulkhead_vmm::api::{Command, VcpuView};

/// How often the vCPUs are looked at: one that spins is in the same place again.
const LOOKS: usize = 3;

/// Pause between two looks.
const PAUSE: Duration = Duration::from_millis(100);

/// How long the VM's process may take to look.
const LOOK: Duration = Duration::from_secs(2);

/// How long the guest may take to describe itself, half a second of which it watches its threads.
const DESCRIPTION: Duration = Duration::from_secs(5);

/// Orders that an agent which is not there yet must still have room for: a question must not keep out a shutdown.
const RESERVED: usize = 2;

/// Those who wait for the next answer of one kind.
#[derive(Debug)]
pub(super) struct Desk<T>(Mutex<Vec<oneshot::Sender<T>>>);

impl<T> Default for Desk<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Desk<T> {
    /// The next answer.
    fn wait(&self) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|one| !one.is_closed());
        waiting.push(sender);
        receiver
    }

    /// Everybody who waits gets this.
    pub(super) fn answer(&self, answer: &T) {
        for waiting in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = waiting.send(answer.clone());
        }
    }
}

/// Where the answers of a VM arrive.
#[derive(Debug, Default)]
pub(super) struct Desks {
    /// The guest's.
    pub(super) guest: Desk<Description>,
    /// The VM process's.
    pub(super) vcpus: Desk<Vec<Option<VcpuView>>>,
}

/// Asks a VM. Whatever does not answer is missing; takes some seconds at most.
pub(super) async fn examine(
    channel: Arc<VmmChannel>,
    orders: mpsc::Sender<HostMessage>,
    desks: Arc<Desks>,
) -> Examination {
    let description = desks.guest.wait();
    let asked = orders.capacity() > RESERVED && orders.try_send(HostMessage::Describe).is_ok();
    let mut vcpus = Vec::new();
    for _ in 0..LOOKS {
        let seen = desks.vcpus.wait();
        let look = async {
            channel.send(&Command::Look, None).await.ok()?;
            seen.await.ok()
        };
        vcpus.extend(timeout(LOOK, look).await.ok().flatten());
        sleep(PAUSE).await;
    }
    let guest = if asked { timeout(DESCRIPTION, description).await.ok().and_then(Result::ok) } else { None };
    Examination { vcpus, guest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everybody_who_waits_gets_the_answer_and_nobody_who_comes_later() {
        let desk = Desk::default();
        let (first, gone, second) = (desk.wait(), desk.wait(), desk.wait());
        drop(gone);
        desk.answer(&1);
        let third = desk.wait();
        assert_eq!((first.await, second.await), (Ok(1), Ok(1)));
        desk.answer(&2);
        assert_eq!(third.await, Ok(2));
    }

    #[tokio::test]
    async fn a_vm_that_says_nothing_is_examined_all_the_same() {
        let (channel, _theirs) = super::super::vmm::channel().unwrap();
        let (orders, mut outbox) = mpsc::channel(RESERVED + 1);
        let (channel, desks) = (Arc::new(channel), Arc::<Desks>::default());
        let examine = || examine(Arc::clone(&channel), orders.clone(), Arc::clone(&desks));
        // The second finds no room for its question but what is kept for orders.
        let (first, second) = tokio::join!(examine(), examine());
        let nothing = Examination { vcpus: Vec::new(), guest: None };
        assert_eq!((first, second), (nothing.clone(), nothing));
        assert_eq!((outbox.try_recv().ok(), outbox.try_recv().ok()), (Some(HostMessage::Describe), None));
    }
}
