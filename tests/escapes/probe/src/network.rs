//! The engine and the agent over the network and over Unix sockets.

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::{
        linux::net::SocketAddrExt,
        unix::net::{SocketAddr as UnixAddress, UnixStream},
    },
    time::Duration,
};

use crate::attempt::{At, Blocked, Outcome, any};

/// The lowest ports, of which services mostly are, and those that engines are known to use.
const LOW: u16 = 1100;
const KNOWN: &[u16] = &[2375, 2376, 2377, 4243, 4244, 5000, 7946, 8080, 8125, 9323, 10250, 34567];

const CONNECT_TIMEOUT: Duration = Duration::from_millis(300);

/// Addresses of the VM: the routers of each network, and its own when its network is shared.
fn addresses() -> Vec<Ipv4Addr> {
    let table = fs::read_to_string("/proc/net/route").unwrap_or_default();
    let routers = table.lines().skip(1).filter_map(|line| {
        let word = line.split_whitespace().nth(2)?;
        let address = u32::from_str_radix(word, 16).ok().filter(|address| *address != 0)?;
        Some(Ipv4Addr::from(address.to_le_bytes()))
    });
    let named = std::env::var("VM_ADDRESSES").unwrap_or_default();
    let mut all: Vec<_> = routers.chain(named.split(' ').filter_map(|text| text.parse().ok())).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Open TCP ports of the VM.
pub(crate) fn tcp() -> Outcome {
    let addresses = addresses();
    if addresses.is_empty() {
        return Err(Blocked::Absent("no address of the VM is known".into()));
    }
    let mut open = Vec::new();
    let mut unanswered = 0;
    for address in &addresses {
        for port in (1..=LOW).chain(KNOWN.iter().copied()) {
            match TcpStream::connect_timeout(&SocketAddr::from((*address, port)), CONNECT_TIMEOUT) {
                Ok(_) => open.push(format!("{address}:{port}")),
                Err(error) if error.kind() == std::io::ErrorKind::TimedOut => unanswered += 1,
                Err(_) => {}
            }
            // An address that swallows everything is not worth the time.
            if unanswered > 20 {
                break;
            }
        }
    }
    if open.is_empty() {
        return Err(Blocked::Refused(format!("nothing listens on {addresses:?}")));
    }
    Ok(open.join(" "))
}

/// Everything that listens in this network namespace: for the VM's own, to be sure that nothing was left out.
pub(crate) fn listeners() -> Outcome {
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        let text = fs::read_to_string(format!("/proc/net/{table}")).at(table)?;
        for line in text.lines().skip(1) {
            let words: Vec<_> = line.split_whitespace().collect();
            if words.get(3) == Some(&"0A") {
                found.push(format!("{table} {}", words[1]));
            }
        }
    }
    if found.is_empty() { Err(Blocked::Refused("nothing listens".into())) } else { Ok(found.join(" ")) }
}

/// Unix sockets without a file, which belong to the network namespace.
pub(crate) fn abstract_sockets() -> Outcome {
    let table = fs::read_to_string("/proc/net/unix").at("/proc/net/unix")?;
    let mut names: Vec<_> = table.lines().filter_map(|line| line.split_once(" @").map(|(_, name)| name)).collect();
    names.sort_unstable();
    names.dedup();
    if names.is_empty() {
        return Err(Blocked::Refused("there are none in this network".into()));
    }
    any(names.into_iter().map(|name| {
        let address = UnixAddress::from_abstract_name(name).at(name)?;
        UnixStream::connect_addr(&address).at(name).map(|_| format!("connected to @{name}"))
    }))
}

/// The engine's sockets where they would be if a mount or a root of the VM brought them here.
pub(crate) fn engine_sockets() -> Outcome {
    let mut ways = Vec::new();
    for root in ["", "/host", "/run-of-vm", "/proc/1/root"] {
        for path in [
            "/run/docker.sock",
            "/var/run/docker.sock",
            "/run/bulkhead/engine/dockerd.sock",
            "/bulkhead/dockerd.sock",
            "/docker.sock",
            "/run/containerd/containerd.sock",
            "/containerd/containerd.sock",
        ] {
            let path = format!("{root}{path}");
            ways.push(UnixStream::connect(&path).at(&path).map(|_| format!("connected to {path}")));
        }
    }
    any(ways)
}
