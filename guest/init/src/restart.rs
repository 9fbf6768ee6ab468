//! Restart delays: exponential backoff over bad starts in a row.

use std::time::Duration;

/// Shortest run of a service that counts as a good start, if it had also become ready.
const MIN_STABLE_RUN: Duration = Duration::from_secs(1);

/// Delay after the first bad start; each further one doubles it.
const INITIAL_DELAY: Duration = Duration::from_millis(100);
const MAX_DELAY: Duration = Duration::from_secs(5);

/// Bad starts in a row after which the start has failed.
pub(crate) const MAX_BAD_STARTS: u32 = 6;

/// Counts bad starts of one service and sets the delay before the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backoff {
    bad_starts: u32,
}

/// The decision about a service that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Start it again after this delay.
    RestartAfter(Duration),
    /// Do not try again: it does not come up.
    GiveUp,
}

impl Backoff {
    /// Decides about a service that ended after `ran`; `served` tells whether it had become ready.
    pub(crate) fn ended(&mut self, ran: Duration, served: bool) -> Decision {
        if served && ran >= MIN_STABLE_RUN {
            // It worked, so this is a crash and not a wrong configuration: restart without delay, however often.
            self.bad_starts = 0;
            return Decision::RestartAfter(Duration::ZERO);
        }
        // The shift is bounded so that it cannot overflow; the result is cut at the maximum anyway.
        let delay = INITIAL_DELAY.saturating_mul(1 << self.bad_starts.min(16)).min(MAX_DELAY);
        self.bad_starts = self.bad_starts.saturating_add(1);
        if self.bad_starts >= MAX_BAD_STARTS { Decision::GiveUp } else { Decision::RestartAfter(delay) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_service_that_served_is_started_again_at_once() {
        assert_eq!(Backoff::default().ended(MIN_STABLE_RUN, true), Decision::RestartAfter(Duration::ZERO));
    }

    #[test]
    fn a_service_that_never_serves_is_given_up() {
        let mut backoff = Backoff::default();
        let decisions: Vec<_> = (0..MAX_BAD_STARTS).map(|_| backoff.ended(Duration::from_secs(9), false)).collect();
        assert_eq!(decisions.last(), Some(&Decision::GiveUp));
        assert_eq!(decisions[0], Decision::RestartAfter(INITIAL_DELAY));
        assert!(decisions[..decisions.len() - 1].iter().all(|decision| *decision != Decision::GiveUp));
    }

    #[test]
    fn one_good_run_forgives_the_bad_starts() {
        let mut backoff = Backoff::default();
        for _ in 0..MAX_BAD_STARTS - 1 {
            backoff.ended(Duration::ZERO, false);
        }
        backoff.ended(MIN_STABLE_RUN, true);
        assert_eq!(backoff, Backoff::default());
    }

    proptest! {
        #[test]
        fn no_delay_exceeds_the_maximum(runs in proptest::collection::vec((0_u64..3000, any::<bool>()), 0..100)) {
            let mut backoff = Backoff::default();
            for (ran, served) in runs {
                if let Decision::RestartAfter(delay) = backoff.ended(Duration::from_millis(ran), served) {
                    prop_assert!(delay <= MAX_DELAY);
                }
            }
        }
    }
}
