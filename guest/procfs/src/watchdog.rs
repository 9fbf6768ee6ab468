//! Tells init that requests are being answered. A warden that says nothing for a while is killed and started anew.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// How often init is told.
pub(crate) const BEAT: Duration = Duration::from_secs(2);

/// A request that takes longer than this is stuck.
const STUCK: Duration = Duration::from_secs(4);

/// When the worker began with what it does; 0 when it waits.
#[derive(Debug, Default)]
pub(crate) struct Work(AtomicU64);

/// As long as it is there, the worker works.
#[derive(Debug)]
pub(crate) struct Busy<'a>(&'a Work);

impl Work {
    /// The worker has something to do.
    pub(crate) fn begin(&self) -> Busy<'_> {
        self.0.store(now(), Ordering::Relaxed);
        Busy(self)
    }

    /// Whether it has been at one thing for too long.
    pub(crate) fn is_stuck(&self) -> bool {
        let begun = self.0.load(Ordering::Relaxed);
        begun != 0 && now().saturating_sub(begun) > STUCK.as_millis() as u64
    }
}

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Relaxed);
    }
}

/// Milliseconds since the first call, and one, so that it is never 0.
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
        assert_eq!(work.is_stuck(), long_ago > STUCK.as_millis() as u64);
    }
}
