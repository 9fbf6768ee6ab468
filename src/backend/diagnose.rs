//! Examination of a running VM, for a user who wonders why it does not respond.
//!
//! `doctor` asks the backend for it. Each vCPU is sampled three times: a signal makes `KVM_RUN` return, and the vCPU's
//! thread reads its registers and local APIC. KVM's counters are read with them; what counts is how fast they grow. The
//! agent is asked for load, memory and busy threads. Every part that does not answer within seconds is reported as
//! missing, which tells a guest that hangs from an engine that does; the command line pings the engine itself.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bulkhead_protocol::{Description, HostMessage};
use tokio::{
    sync::{mpsc, oneshot},
    time::{Instant, sleep, timeout},
};

use super::{api::Examination, vmm::VmmChannel};
use bulkhead_vmm::api::{Command, Sample};

/// Samples of the vCPUs; one that spins is at the same place again.
const VCPU_SAMPLES: usize = 3;

/// Pause between two samples.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(100);

/// Time for the vmm process to take one sample.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(2);

/// Time for the guest to describe itself, half a second of which it watches its threads.
const DESCRIPTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Places in the agent's queue that a question leaves free: an agent that is not connected yet, or hangs, reads
/// nothing, and questions must not keep out a shutdown.
const RESERVED: usize = 2;

/// Waiters for the next answer of one kind.
#[derive(Debug)]
pub(super) struct Waiters<T>(Mutex<Vec<oneshot::Sender<T>>>);

impl<T> Default for Waiters<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Waiters<T> {
    /// Adds a waiter and returns its end.
    pub(super) fn wait(&self) -> oneshot::Receiver<T> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A VM that never answers must not collect those that gave up.
        waiting.retain(|one| !one.is_closed());
        waiting.push(sender);
        receiver
    }

    /// Gives this answer to every waiter.
    pub(super) fn answer(&self, answer: &T) {
        // Answers carry no number of their question, so each answers all that were asked before it.
        for waiting in self.0.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = waiting.send(answer.clone());
        }
    }
}

/// The waiters for a VM's answers.
#[derive(Debug, Default)]
pub(super) struct VmWaiters {
    /// For the guest's description of itself.
    pub(super) guest: Waiters<Description>,
    /// For the error of the guest, if any, at a change of the shared directories.
    pub(super) shares: Waiters<Option<String>>,
    /// For the vmm process's samples.
    pub(super) samples: Waiters<Sample>,
}

/// Examines a VM; every part that does not answer is missing. Takes some seconds at most.
pub(super) async fn examine(
    channel: Arc<VmmChannel>,
    agent_outbox: mpsc::Sender<HostMessage>,
    waiters: Arc<VmWaiters>,
    kernel: PathBuf,
) -> Examination {
    // The guest is asked first: it watches its threads while the vCPUs are sampled.
    let description = waiters.guest.wait();
    let asked = agent_outbox.capacity() > RESERVED && agent_outbox.try_send(HostMessage::Describe).is_ok();
    let mut vcpus = Vec::new();
    let mut counters: Vec<(Instant, BTreeMap<String, Vec<u64>>)> = Vec::new();
    for _ in 0..VCPU_SAMPLES {
        let answer = waiters.samples.wait();
        let sample = async {
            channel.send(&Command::Look, None).await.ok()?;
            answer.await.ok()
        };
        if let Ok(Some(sample)) = timeout(SAMPLE_TIMEOUT, sample).await {
            vcpus.push(sample.vcpus);
            counters.push((Instant::now(), sample.counters));
        }
        sleep(SAMPLE_INTERVAL).await;
    }
    let kvm = match &counters[..] {
        [(start, before), .., (end, after)] => rates(before, after, *end - *start),
        _ => BTreeMap::new(),
    };
    let guest = if asked { timeout(DESCRIPTION_TIMEOUT, description).await.ok().and_then(Result::ok) } else { None };
    Examination { vcpus, kvm, guest, kernel: Some(kernel) }
}

/// Returns how fast counters grew, in a second.
fn rates(
    before: &BTreeMap<String, Vec<u64>>,
    after: &BTreeMap<String, Vec<u64>>,
    passed: Duration,
) -> BTreeMap<String, Vec<u64>> {
    let second = |growth: u64| (growth as f64 / passed.as_secs_f64().max(0.001)).round() as u64;
    let grew = |(name, values): (&String, &Vec<u64>)| {
        let before = before.get(name)?;
        let rates = values.iter().zip(before).map(|(after, before)| second(after.saturating_sub(*before)));
        Some((name.clone(), rates.collect()))
    };
    after.iter().filter_map(grew).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::vmm;

    #[tokio::test]
    async fn everybody_who_waits_gets_the_answer_and_nobody_who_comes_later() {
        let waiters = Waiters::default();
        let (first, gone, second) = (waiters.wait(), waiters.wait(), waiters.wait());
        drop(gone);
        waiters.answer(&1);
        let third = waiters.wait();
        assert_eq!((first.await, second.await), (Ok(1), Ok(1)));
        waiters.answer(&2);
        assert_eq!(third.await, Ok(2));
    }

    #[test]
    fn counters_grow_in_a_second_as_fast_as_between_two_samples() {
        let counters = |exits: &[u64], flushes| {
            BTreeMap::from([("exits".to_owned(), exits.to_vec()), ("remote_tlb_flush".to_owned(), vec![flushes])])
        };
        let grew = rates(&counters(&[100, 5], 9), &counters(&[2100, 5], 10), Duration::from_millis(500));
        assert_eq!(grew, counters(&[4000, 0], 2));
        // A counter that is new has no rate yet, and none grows backwards.
        assert_eq!(rates(&BTreeMap::new(), &grew, Duration::ZERO), BTreeMap::new());
        assert_eq!(rates(&grew, &counters(&[0, 0], 0), Duration::ZERO), counters(&[0, 0], 0));
    }

    #[tokio::test]
    async fn a_vm_that_says_nothing_is_examined_all_the_same() {
        let (channel, _theirs) = vmm::channel().unwrap();
        let (questions, mut outbox) = mpsc::channel(RESERVED + 1);
        let (channel, waiters) = (Arc::new(channel), Arc::<VmWaiters>::default());
        let examine = || examine(Arc::clone(&channel), questions.clone(), Arc::clone(&waiters), "vmlinux".into());
        // The second finds only the places that are reserved.
        let (first, second) = tokio::join!(examine(), examine());
        let nothing = Examination { kernel: Some("vmlinux".into()), ..Examination::default() };
        assert_eq!((first, second), (nothing.clone(), nothing));
        assert_eq!((outbox.try_recv().ok(), outbox.try_recv().ok()), (Some(HostMessage::Describe), None));
    }
}
