//! The measured quantities.

use std::time::Duration;

use super::traffic::Guest;
use crate::{Result, comparison::Row};

/// The rows; [`STEPS`] name them by their place.
pub const ROWS: [Row; 12] = [
    Row::new("to_host", "TCP, guest to host", "MiB/s", 1, true),
    Row::new("to_guest", "TCP, host to guest", "MiB/s", 1, true),
    Row::new("published_to_host", "published port, to host", "MiB/s", 1, true),
    Row::new("published_to_guest", "published port, to guest", "MiB/s", 1, true),
    Row::new("round_trip", "128 bytes there and back", "µs", 0, false),
    Row::new("round_trip_p99", "the same, 99th percentile", "µs", 0, false),
    Row::new("datagrams_to_host", "UDP, guest to host", "/s", 0, true),
    Row::new("datagrams_to_guest", "UDP, host to guest", "/s", 0, true),
    Row::new("cpu_to_host", "CPU, guest to host", "s/GB", 2, false),
    Row::new("cpu_to_guest", "CPU, host to guest", "s/GB", 2, false),
    Row::new("cpu_outside_to_host", "outside of it, to host", "s/GB", 2, false),
    Row::new("cpu_outside_to_guest", "outside of it, to guest", "s/GB", 2, false),
];

/// Values by row.
type Values = Vec<(usize, f64)>;

/// A measurement of the given duration, which yields one or more rows.
type Step = fn(&mut Guest, Duration) -> Result<Values>;

/// The measurements, which together yield all rows.
pub const STEPS: [Step; 7] = [
    |guest, duration| {
        guest.bulk_to_host(duration).map(|bulk| vec![(0, bulk.rate()), (8, bulk.cpu()), (10, bulk.cpu_outside())])
    },
    |guest, duration| {
        guest.bulk_to_guest(duration).map(|bulk| vec![(1, bulk.rate()), (9, bulk.cpu()), (11, bulk.cpu_outside())])
    },
    |guest, duration| guest.published_to_host(duration).map(|bulk| vec![(2, bulk.rate())]),
    |guest, duration| guest.published_to_guest(duration).map(|bulk| vec![(3, bulk.rate())]),
    |guest, duration| guest.round_trip(duration).map(|(median, p99)| vec![(4, median), (5, p99)]),
    |guest, duration| guest.datagrams_to_host(duration).map(|rate| vec![(6, rate)]),
    |guest, duration| guest.datagrams_to_guest(duration).map(|rate| vec![(7, rate)]),
];
