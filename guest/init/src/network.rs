//! Host name, loopback interface, network device and name server.

use std::{
    fs,
    io::{self, Write},
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

use bulkhead_protocol::Network;

use crate::{error::Error, netlink::Netlink};

/// The kernel's name for the only network device.
const INTERFACE: &str = "eth0";

/// Gives the network device its address and the guest its default route and name server.
pub(crate) fn configure(network: &Network) -> Result<(), Error> {
    let interface = nix::net::if_::if_nametoindex(INTERFACE).map_err(Error::system("find the network device"))?;
    // The backend has chosen the addresses, so DHCP would only cost time.
    let mut netlink = Netlink::open().map_err(system("open a netlink socket"))?;
    netlink.bring_up(interface, network.mtu.into()).map_err(system("bring the network device up"))?;
    let mut reach = |address: IpAddr, prefix, gateway: IpAddr| {
        netlink.add_address(interface, address, prefix).map_err(system("set the network device's address"))?;
        netlink.add_default_route(interface, gateway).map_err(system("set the default route"))
    };
    reach(network.address.into(), network.prefix, network.gateway.into())?;
    if let Some(ipv6) = &network.ipv6 {
        reach(ipv6.address.into(), ipv6.prefix, ipv6.gateway.into())?;
    }
    // dockerd derives the containers' own file from this one.
    let path = "/etc/resolv.conf";
    fs::write(path, format!("nameserver {}\n", network.nameserver)).map_err(Error::file("write", path))?;
    if network.hosts_file {
        // Another name server than Bulkhead's own does not know the host's names: the VM's programs find them here.
        let path = "/etc/hosts";
        let line = format!("{}\thost.docker.internal gateway.docker.internal\n", network.host);
        let file = fs::OpenOptions::new().append(true).open(path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).map_err(Error::file("write", path))?;
    }
    Ok(())
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::System { action, source }
}

/// Brings `lo` up; the kernel adds its addresses itself. Needs no configuration, so that a VM without a network has it
/// as well.
pub(crate) fn loopback_up() -> Result<(), Error> {
    let failed = || Error::System { action: "bring the loopback interface up", source: io::Error::last_os_error() };
    // SAFETY: socket(2) takes no pointers.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    if raw < 0 {
        return Err(failed());
    }
    // SAFETY: `raw` was just returned by socket(2) and has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = libc::c_char::from_ne_bytes([*from]);
    }
    // SAFETY: SIOCGIFFLAGS reads the name from and writes the flags to `request`, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) } < 0 {
        return Err(failed());
    }
    // SAFETY: SIOCGIFFLAGS has just set this member of the union.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads name and flags from `request`, which outlives the call.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) } < 0 {
        return Err(failed());
    }
    Ok(())
}

/// Returns whether the kernel and `/etc/hosts` accept the name: RFC 1123 characters, at most 63.
fn valid_host_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && !name.starts_with(['-', '.'])
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'.')
}

/// Sets the host name and writes the files that contain it; an invalid name is replaced by `bulkhead`.
pub(crate) fn set_host_name(wanted: &str) -> Result<(), Error> {
    let name = if valid_host_name(wanted) { wanted } else { "bulkhead" };
    nix::unistd::sethostname(name).map_err(Error::system("set the host name"))?;
    let hosts = format!("127.0.0.1\tlocalhost\n127.0.1.1\t{name}\n::1\tlocalhost ip6-localhost ip6-loopback\n");
    for (path, text) in [("/etc/hostname", format!("{name}\n")), ("/etc/hosts", hosts)] {
        fs::write(path, text).map_err(Error::file("write", path))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::valid_host_name;

    #[test]
    fn host_names_that_would_break_etc_hosts_are_refused() {
        for name in ["", "a b", "a\nb", "-a", ".a", &"x".repeat(64)] {
            assert!(!valid_host_name(name), "{name:?}");
        }
        assert!(valid_host_name("bulkhead-2.local"));
    }
}
