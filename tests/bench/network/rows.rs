//! What is measured.

use std::time::Duration;

use super::traffic::Guest;
use crate::Result;

/// One measured quantity.
pub struct Row {
    /// Its name for programs.
    pub key: &'static str,
    /// Its name for people.
    pub label: &'static str,
    unit: &'static str,
    decimals: usize,
    /// Whether more is better.
    pub more: bool,
}

impl Row {
    /// A value with its unit.
    pub fn show(&self, value: f64) -> String {
        format!("{value:.*} {}", self.decimals, self.unit)
    }
}

const fn row(key: &'static str, label: &'static str, unit: &'static str, decimals: usize, more: bool) -> Row {
    Row { key, label, unit, decimals, more }
}

/// In the order of [`measure`]'s result.
pub const ROWS: [Row; 12] = [
    row("to_host", "TCP, guest to host", "MiB/s", 1, true),
    row("to_guest", "TCP, host to guest", "MiB/s", 1, true),
    row("published_to_host", "published port, to host", "MiB/s", 1, true),
    row("published_to_guest", "published port, to guest", "MiB/s", 1, true),
    row("round_trip", "128 bytes there and back", "µs", 0, false),
    row("round_trip_p99", "the same, 99th percentile", "µs", 0, false),
    row("datagrams_to_host", "UDP, guest to host", "/s", 0, true),
    row("datagrams_to_guest", "UDP, host to guest", "/s", 0, true),
    row("cpu_to_host", "CPU, guest to host", "s/GB", 2, false),
    row("cpu_to_guest", "CPU, host to guest", "s/GB", 2, false),
    row("cpu_outside_to_host", "outside of it, to host", "s/GB", 2, false),
    row("cpu_outside_to_guest", "outside of it, to guest", "s/GB", 2, false),
];

/// Measures all rows, each for so long.
pub fn measure(guest: &mut Guest, duration: Duration) -> Result<[Option<f64>; ROWS.len()]> {
    let to_host = guest.bulk_to_host(duration)?;
    let to_guest = guest.bulk_to_guest(duration)?;
    let published_to_host = guest.published_to_host(duration)?;
    let published_to_guest = guest.published_to_guest(duration)?;
    let (median, p99) = guest.round_trip(duration)?;
    let datagrams_to_host = guest.datagrams_to_host(duration)?;
    let datagrams_to_guest = guest.datagrams_to_guest(duration)?;
    Ok([
        to_host.rate(),
        to_guest.rate(),
        published_to_host.rate(),
        published_to_guest.rate(),
        median,
        p99,
        datagrams_to_host,
        datagrams_to_guest,
        to_host.cpu(),
        to_guest.cpu(),
        to_host.cpu_outside(),
        to_guest.cpu_outside(),
    ]
    .map(Some))
}
