//! Ports of this machine.

use std::net::{Ipv4Addr, TcpListener};

/// `count` ports in a row that are free now, below those that clients get.
pub fn free(count: u16) -> u16 {
    let is_free = |port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok();
    (20_000..32_000).step_by(16).find(|first| (*first..first + count).all(is_free)).unwrap()
}
