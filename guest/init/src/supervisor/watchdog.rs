//! The watchdog of the procfs service, by `WATCHDOG=1` of sd_notify(3).
//!
//! Programs in containers that read a file of this service wait for its answer. A service that hangs would make them
//! wait for ever, so it is killed, and the next one continues on the same FUSE connection.

use std::time::{Duration, Instant};

/// Longest silence; the service sends `WATCHDOG=1` every two seconds while none of its threads is stuck.
const WATCHDOG_TIMEOUT: Duration = Duration::from_secs(10);

/// The time of the last sign of life; `None` while the service does not run.
#[derive(Debug, Default)]
pub(super) struct Watchdog {
    last_message: Option<Instant>,
}

impl Watchdog {
    /// Records a start or a `WATCHDOG=1`.
    pub(super) fn renew(&mut self, now: Instant) {
        self.last_message = Some(now);
    }

    /// Stops waiting: the service has ended.
    pub(super) fn stop(&mut self) {
        self.last_message = None;
    }

    /// Returns the time at which the service has been silent for too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.last_message.map(|last| last + WATCHDOG_TIMEOUT)
    }

    /// Returns true once when the service has been silent for too long.
    pub(super) fn take_expired(&mut self, now: Instant) -> bool {
        self.last_message.take_if(|last| now.saturating_duration_since(*last) >= WATCHDOG_TIMEOUT).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_expires_once_and_a_message_renews_it() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        assert!(watchdog.deadline().is_none() && !watchdog.take_expired(start + WATCHDOG_TIMEOUT));
        watchdog.renew(start);
        let deadline = watchdog.deadline().unwrap();
        watchdog.renew(start + Duration::from_secs(1));
        assert!(!watchdog.take_expired(deadline));
        assert!(watchdog.take_expired(deadline + Duration::from_secs(1)));
        assert!(!watchdog.take_expired(deadline + Duration::from_secs(2)));
    }

    #[test]
    fn a_service_that_has_ended_is_not_silent() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        watchdog.renew(start);
        watchdog.stop();
        assert!(!watchdog.take_expired(start + WATCHDOG_TIMEOUT));
    }
}
