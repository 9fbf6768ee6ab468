//! When a service that ended is started again.

use std::time::Duration;

/// A service that ran at least this long ended by an accident, not by its configuration.
const STABLE: Duration = Duration::from_secs(1);

const FIRST_DELAY: Duration = Duration::from_millis(100);
const LONGEST_DELAY: Duration = Duration::from_secs(5);

/// Bad starts in a row after which the start has failed.
pub(crate) const BAD_STARTS: u32 = 6;

/// Counts bad starts and sets the delay before the next one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backoff {
    bad_starts: u32,
}

/// What to do about a service that ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Start it again after this long.
    After(Duration),
    /// It will not come up; trying goes on no longer.
    GiveUp,
}

impl Backoff {
    /// Judges an end after `ran`; `served` says whether the service had become ready.
    pub(crate) fn ended(&mut self, ran: Duration, served: bool) -> Verdict {
        if served && ran >= STABLE {
            self.bad_starts = 0;
            return Verdict::After(Duration::ZERO);
        }
        let delay = FIRST_DELAY.saturating_mul(1 << self.bad_starts.min(16)).min(LONGEST_DELAY);
        self.bad_starts = self.bad_starts.saturating_add(1);
        if self.bad_starts >= BAD_STARTS { Verdict::GiveUp } else { Verdict::After(delay) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_service_that_served_is_started_again_at_once() {
        assert_eq!(Backoff::default().ended(STABLE, true), Verdict::After(Duration::ZERO));
    }

    #[test]
    fn a_service_that_never_serves_is_given_up() {
        let mut backoff = Backoff::default();
        let verdicts: Vec<_> = (0..BAD_STARTS).map(|_| backoff.ended(Duration::from_secs(9), false)).collect();
        assert_eq!(verdicts.last(), Some(&Verdict::GiveUp));
        assert_eq!(verdicts[0], Verdict::After(FIRST_DELAY));
        assert!(verdicts[..verdicts.len() - 1].iter().all(|verdict| *verdict != Verdict::GiveUp));
    }

    #[test]
    fn one_good_run_forgives_the_bad_starts() {
        let mut backoff = Backoff::default();
        for _ in 0..BAD_STARTS - 1 {
            backoff.ended(Duration::ZERO, false);
        }
        backoff.ended(STABLE, true);
        assert_eq!(backoff, Backoff::default());
    }

    proptest! {
        #[test]
        fn no_delay_is_longer_than_the_longest(runs in proptest::collection::vec((0_u64..3000, any::<bool>()), 0..100)) {
            let mut backoff = Backoff::default();
            for (ran, served) in runs {
                if let Verdict::After(delay) = backoff.ended(Duration::from_millis(ran), served) {
                    prop_assert!(delay <= LONGEST_DELAY);
                }
            }
        }
    }
}
