//! The clients of the hybrid socket that wait for connections of the guest.
//!
//! Only they decide what the guest reaches: this process connects to nothing, and each of them takes one connection.

use std::collections::{HashMap, VecDeque};

/// Tokens of clients by the port of the host at which they wait, in the order in which they came.
#[derive(Debug, Default)]
pub(super) struct Listeners(HashMap<u32, VecDeque<u64>>);

impl Listeners {
    pub(super) fn add(&mut self, host_port: u32, token: u64) {
        self.0.entry(host_port).or_default().push_back(token);
    }

    /// Takes the client that has waited longest at this port.
    pub(super) fn take(&mut self, host_port: u32) -> Option<u64> {
        let token = self.0.get_mut(&host_port)?.pop_front();
        self.remove_if_empty(host_port);
        token
    }

    /// Removes a client that waits no longer.
    pub(super) fn remove(&mut self, host_port: u32, token: u64) {
        if let Some(tokens) = self.0.get_mut(&host_port) {
            tokens.retain(|other| *other != token);
        }
        self.remove_if_empty(host_port);
    }

    fn remove_if_empty(&mut self, host_port: u32) {
        if self.0.get(&host_port).is_some_and(VecDeque::is_empty) {
            self.0.remove(&host_port);
        }
    }
}
