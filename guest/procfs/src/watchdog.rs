//! Detects workers that hang. init kills a service without a heartbeat and starts it again; the kernel then sends the
//! requests that it did not answer to the next process.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Interval of heartbeats; init waits several times as long.
pub(crate) const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(2);

/// Time after which a request counts as stuck.
const STUCK_AFTER: Duration = Duration::from_secs(4);

/// The time when a worker began its request, in milliseconds as of [`now`]; 0 while it waits for one.
#[derive(Debug, Default)]
pub(crate) struct Work(AtomicU64);

/// Marks the worker as busy until it is dropped.
#[derive(Debug)]
pub(crate) struct Busy<'a>(&'a Work);

impl Work {
    /// Marks the beginning of a request.
    pub(crate) fn begin(&self) -> Busy<'_> {
        self.0.store(now(), Ordering::Relaxed);
        Busy(self)
    }

    /// Returns whether one request takes too long.
    pub(crate) fn is_stuck(&self) -> bool {
        let begun = self.0.load(Ordering::Relaxed);
        begun != 0 && now().saturating_sub(begun) > STUCK_AFTER.as_millis() as u64
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Relaxed);
    }
}

/// Milliseconds since the first call, plus one, since 0 stands for waiting.
fn now() -> u64 {
    static FIRST: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
    FIRST.get_or_init(Instant::now).elapsed().as_millis() as u64 + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_waits_or_has_only_begun_is_not_stuck() {
        let work = Work::default();
        assert!(!work.is_stuck());
        let busy = work.begin();
        assert!(!work.is_stuck());
        drop(busy);
        assert_eq!(work.0.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_worker_that_has_been_at_one_thing_for_long_is_stuck() {
        now();
        std::thread::sleep(Duration::from_millis(20));
        let work = Work::default();
        work.0.store(1, Ordering::Relaxed);
        let long_ago = now() - 1;
        assert!(long_ago >= 19);
        assert_eq!(work.is_stuck(), long_ago > STUCK_AFTER.as_millis() as u64);
    }
}
