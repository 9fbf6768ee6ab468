//! The guest's interface, by ioctl(2) (netdevice(7)).

use std::{
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// The interface.
const NAME: &[u8] = b"eth0";

/// Mounts /proc, where the kernel's command line is.
pub(crate) fn mount_proc() -> io::Result<()> {
    // SAFETY: the strings end in zeroes and live throughout the call; the file system takes no data.
    check(unsafe { libc::mount(c"proc".as_ptr(), c"/proc".as_ptr(), c"proc".as_ptr(), 0, std::ptr::null()) })
}

/// Gives the interface its address and MTU, brings it up and makes the gateway the way to everywhere.
pub(crate) fn configure(address: Ipv4Addr, prefix: u32, gateway: Ipv4Addr, mtu: i32) -> io::Result<()> {
    // SAFETY: a plain system call.
    let raw = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(raw)?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let mask = Ipv4Addr::from(u32::MAX.checked_shl(32 - prefix).unwrap_or(0));
    let address_of = |address| libc::__c_anonymous_ifr_ifru { ifru_addr: sockaddr(address) };
    set(&socket, libc::SIOCSIFADDR, address_of(address))?;
    set(&socket, libc::SIOCSIFNETMASK, address_of(mask))?;
    set(&socket, libc::SIOCSIFMTU, libc::__c_anonymous_ifr_ifru { ifru_mtu: mtu })?;
    let flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    set(&socket, libc::SIOCSIFFLAGS, libc::__c_anonymous_ifr_ifru { ifru_flags: flags })?;
    // SAFETY: all zeroes are a valid route; what matters is set below.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    route.rt_dst = sockaddr(Ipv4Addr::UNSPECIFIED);
    route.rt_genmask = sockaddr(Ipv4Addr::UNSPECIFIED);
    route.rt_gateway = sockaddr(gateway);
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    // SAFETY: the route lives throughout the call, which only reads it.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) })
}

fn set(socket: &OwnedFd, request: libc::Ioctl, value: libc::__c_anonymous_ifr_ifru) -> io::Result<()> {
    let mut name = [0; libc::IFNAMSIZ];
    for (to, from) in name.iter_mut().zip(NAME) {
        *to = from.cast_signed();
    }
    let request_of = libc::ifreq { ifr_name: name, ifr_ifru: value };
    // SAFETY: the request lives throughout the call, which only reads it.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw const request_of) })
}

fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0; 14];
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from.cast_signed();
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
