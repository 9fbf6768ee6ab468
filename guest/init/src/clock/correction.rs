//! The decision on a difference between two clocks, without I/O. Times are nanoseconds since the Unix epoch.

/// Offset in ns from which the clock is set. The kernel's clock discipline would take minutes for it.
const STEP_NS: i64 = 50_000_000;

/// Uncertainty in ns up to which a reading is good for the clock discipline, which would follow its noise otherwise.
const EXACT_NS: i64 = 200_000;

/// A comparison of the guest's clock with the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    /// The host's time less the guest's.
    pub(super) offset_ns: i64,
    /// The largest error of the offset in either direction, never negative.
    pub(super) uncertainty_ns: i64,
}

/// Work on the clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Correction {
    /// Leave it alone.
    None,
    /// Add the offset at once.
    Step {
        /// Nanoseconds to add.
        offset_ns: i64,
    },
    /// Make up for the offset by and by.
    Slew {
        /// Nanoseconds to add.
        offset_ns: i64,
    },
}

impl Reading {
    /// The comparison of a reading of the host's clock that was made between two of the guest's; `None` if these are in
    /// the wrong order, because the guest's clock was set in between.
    pub(super) fn between(before: i64, host: i64, after: i64) -> Option<Self> {
        let window = after.checked_sub(before).filter(|window| *window >= 0)?;
        let middle = before.checked_add(window / 2)?;
        Some(Self { offset_ns: host.checked_sub(middle)?, uncertainty_ns: window - window / 2 })
    }

    /// The most exact comparison of a series of readings in which those of the guest and the host alternate: guest,
    /// host, guest, … guest.
    pub(super) fn best_of(series: &[i64]) -> Option<Self> {
        let readings = series.windows(3).step_by(2).filter_map(|part| Self::between(part[0], part[1], part[2]));
        readings.min_by_key(|reading| reading.uncertainty_ns)
    }

    /// True if the reading is good for the clock discipline.
    pub(super) fn is_exact(self) -> bool {
        self.uncertainty_ns <= EXACT_NS
    }
}

/// Decides on a reading.
pub(super) fn decide(reading: Reading) -> Correction {
    let Reading { offset_ns, uncertainty_ns } = reading;
    // At least this much is wrong, whatever the error of the reading. A step by the offset is wrong by that error, so
    // it has to be the smaller one.
    let certain = offset_ns.unsigned_abs().saturating_sub(uncertainty_ns.unsigned_abs());
    if certain >= STEP_NS.unsigned_abs().max(uncertainty_ns.unsigned_abs()) {
        Correction::Step { offset_ns }
    } else if reading.is_exact() && offset_ns.unsigned_abs() < STEP_NS.unsigned_abs() {
        Correction::Slew { offset_ns }
    } else {
        Correction::None
    }
}

/// Returns the nanoseconds of a time; `None` for one that no clock has.
pub(super) fn nanoseconds(seconds: i64, nanoseconds: u32) -> Option<i64> {
    let nanoseconds = Some(i64::from(nanoseconds)).filter(|nanoseconds| *nanoseconds < 1_000_000_000)?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanoseconds)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_host_that_slept_an_hour_sets_the_clock_and_a_millisecond_is_made_up_for_slowly() {
        let reading = |offset_ns| Reading { offset_ns, uncertainty_ns: 0 };
        assert_eq!(decide(reading(3600 * SECOND)), Correction::Step { offset_ns: 3600 * SECOND });
        assert_eq!(decide(reading(-600 * SECOND)), Correction::Step { offset_ns: -600 * SECOND });
        assert_eq!(decide(reading(SECOND / 10)), Correction::Step { offset_ns: SECOND / 10 });
        assert_eq!(decide(reading(1_000_000)), Correction::Slew { offset_ns: 1_000_000 });
        // An offset of zero reaches the discipline as well: it tells that the rate is right.
        assert_eq!(decide(reading(0)), Correction::Slew { offset_ns: 0 });
    }

    #[test]
    fn a_reading_whose_error_is_larger_than_its_offset_changes_nothing() {
        assert_eq!(decide(Reading { offset_ns: SECOND, uncertainty_ns: 2 * SECOND }), Correction::None);
        assert_eq!(decide(Reading { offset_ns: 10, uncertainty_ns: SECOND / 1000 }), Correction::None);
    }

    #[test]
    fn the_narrowest_of_a_series_counts() {
        // The second reading of the host was made within 2 ns.
        let series = [100, 1200, 200, 1201, 202, 1500, 500];
        assert_eq!(Reading::best_of(&series), Some(Reading { offset_ns: 1000, uncertainty_ns: 1 }));
        assert_eq!(Reading::best_of(&[1, 2]), None);
    }

    proptest! {
        #[test]
        fn a_correction_never_leaves_the_clock_further_off(
            offset in -100 * SECOND..100 * SECOND,
            before in 0..i64::MAX / 2,
            delays in (0..SECOND, 0..SECOND),
        ) {
            // The guest reads its clock, then the host's, then its own: at whatever moments.
            let host = before + delays.0 + offset;
            let reading = Reading::between(before, host, before + delays.0 + delays.1).unwrap();
            prop_assert!((reading.offset_ns - offset).abs() <= reading.uncertainty_ns);
            match decide(reading) {
                Correction::None => {}
                Correction::Step { offset_ns } => {
                    prop_assert!((offset - offset_ns).abs() <= offset.abs());
                    prop_assert!(offset.abs() >= STEP_NS);
                }
                Correction::Slew { offset_ns } => {
                    prop_assert!(offset_ns.abs() < STEP_NS);
                    prop_assert!((offset - offset_ns).abs() <= EXACT_NS);
                }
            }
        }

        #[test]
        fn an_exact_reading_of_a_clock_that_is_off_by_100_ms_always_sets_it(
            offset in prop_oneof![SECOND / 10..i64::MAX / 4, -i64::MAX / 4..-SECOND / 10],
            uncertainty_ns in 0..EXACT_NS,
        ) {
            prop_assert_eq!(decide(Reading { offset_ns: offset, uncertainty_ns }), Correction::Step { offset_ns: offset });
        }

        #[test]
        fn no_readings_panic(series in proptest::collection::vec(any::<i64>(), 0..60), parts in any::<(i64, u32)>()) {
            if let Some(reading) = Reading::best_of(&series) {
                prop_assert!(reading.uncertainty_ns >= 0);
                decide(reading);
            }
            let _ = nanoseconds(parts.0, parts.1);
        }
    }
}
