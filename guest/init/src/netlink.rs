//! The three rtnetlink requests that one interface needs (rtnetlink(7)).
//!
//! A message is a header, a fixed part for its type (`linux/rtnetlink.h`), and attributes. All numbers are in the byte
//! order of the machine, addresses in network order. The crates for this protocol are asynchronous, or far larger than
//! three requests.

use std::{
    io,
    net::IpAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// `struct nlmsghdr`: length (u32), type (u16), flags (u16), sequence number (u32), port id (u32).
const HEADER_BYTES: usize = 16;
/// Offset of the error number in `NLMSG_ERROR`, whose body starts with it.
const ERROR_OFFSET: usize = HEADER_BYTES;

/// No duplicate address detection (`linux/if_addr.h`); IPv4 ignores the flag.
const IFA_F_NODAD: u8 = 2;

fn family(address: IpAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// A netlink socket.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
}

impl Netlink {
    /// Opens a socket, which can send requests at once.
    pub(crate) fn open() -> io::Result<Self> {
        // SAFETY: socket(2) takes integers only.
        let raw = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_ROUTE) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `raw` was just returned by socket(2) and has no other owner.
        Ok(Self { socket: unsafe { OwnedFd::from_raw_fd(raw) }, sequence: 0 })
    }

    /// Sets the interface's MTU and brings it up.
    pub(crate) fn bring_up(&mut self, interface: u32, mtu: u32) -> io::Result<()> {
        // struct ifinfomsg: family, padding and type, which are zero here, index, flags, and the mask of flags to
        // change.
        let up = libc::IFF_UP.cast_unsigned();
        let mut body = vec![0; 4];
        for word in [interface, up, up] {
            body.extend(word.to_ne_bytes());
        }
        attribute(&mut body, libc::IFLA_MTU, &mtu.to_ne_bytes());
        self.request(libc::RTM_NEWLINK, 0, body)
    }

    /// Adds an address.
    pub(crate) fn add_address(&mut self, interface: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        // struct ifaddrmsg: family, prefix length, flags, scope, index. The network has no other guest that could have
        // the same address, and without the detection IPv6 works at once instead of a second later.
        let mut body = vec![family(address), prefix, IFA_F_NODAD, libc::RT_SCOPE_UNIVERSE];
        body.extend(interface.to_ne_bytes());
        // On a broadcast interface both are the own address; IPv4 reads IFA_LOCAL, IPv6 either.
        attribute(&mut body, libc::IFA_LOCAL, &octets(address));
        attribute(&mut body, libc::IFA_ADDRESS, &octets(address));
        self.request(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, body)
    }

    /// Adds the route to everywhere.
    pub(crate) fn add_default_route(&mut self, interface: u32, gateway: IpAddr) -> io::Result<()> {
        // struct rtmsg: family, lengths of destination and source prefix, type of service, table, protocol, scope,
        // type; then 32 bits of flags. A destination of length 0 is every address.
        let mut body = vec![
            family(gateway),
            0,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_UNICAST,
        ];
        body.extend([0; 4]);
        attribute(&mut body, libc::RTA_GATEWAY, &octets(gateway));
        attribute(&mut body, libc::RTA_OIF, &interface.to_ne_bytes());
        self.request(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_REPLACE, body)
    }

    /// Sends one request and waits for its acknowledgement.
    fn request(&mut self, kind: u16, flags: libc::c_int, body: Vec<u8>) -> io::Result<()> {
        // One request at a time and no subscription to groups, so the next message is the answer to this one.
        self.sequence += 1;
        let message = message(kind, libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags, self.sequence, &body);
        // SAFETY: the pointer and length are those of `message`.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut answer = [0_u8; 4096];
        // SAFETY: the pointer and length are those of `answer`.
        let got = unsafe { libc::recv(self.socket.as_raw_fd(), answer.as_mut_ptr().cast(), answer.len(), 0) };
        let got = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
        acknowledged(answer.get(..got).unwrap_or_default())
    }
}

/// Puts the header before a body. The port id is 0: the kernel fills in the socket's own.
fn message(kind: u16, flags: libc::c_int, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut message = ((HEADER_BYTES + body.len()) as u32).to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend((flags as u16).to_ne_bytes());
    message.extend(sequence.to_ne_bytes());
    message.extend([0; 4]);
    message.extend(body);
    message
}

/// Appends an attribute: length and type, 16 bits each, then the value, padded to four bytes. The length does not
/// include the padding.
fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    body.extend((4 + value.len() as u16).to_ne_bytes());
    body.extend(kind.to_ne_bytes());
    body.extend(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Returns the error that an acknowledgement contains; number 0 is success (netlink(7)).
fn acknowledged(answer: &[u8]) -> io::Result<()> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let kind =
        answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(malformed)?;
    let number =
        answer.get(ERROR_OFFSET..ERROR_OFFSET + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (libc::c_int::from(kind), number) {
        (libc::NLMSG_ERROR, Some(0)) => Ok(()),
        (libc::NLMSG_ERROR, Some(number)) => Err(io::Error::from_raw_os_error(number.saturating_neg())),
        _ => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    #[test]
    fn attributes_are_padded_and_their_length_is_not() {
        let mut body = Vec::new();
        attribute(&mut body, 3, b"abcde");
        assert_eq!(body, [9, 0, 3, 0, b'a', b'b', b'c', b'd', b'e', 0, 0, 0]);
    }

    #[test]
    fn an_error_of_the_kernel_is_the_error() {
        let answer = |number: i32| message(libc::NLMSG_ERROR as u16, 0, 1, &number.to_ne_bytes());
        assert!(acknowledged(&answer(0)).is_ok());
        assert_eq!(acknowledged(&answer(-libc::EEXIST)).unwrap_err().raw_os_error(), Some(libc::EEXIST));
        assert!(acknowledged(&answer(0)[..18]).is_err() && acknowledged(&[]).is_err());
    }

    #[test]
    fn the_kernel_understands_the_requests() {
        // Without privileges it refuses them after it has read them; interface 0 exists nowhere.
        let mut netlink = Netlink::open().unwrap();
        for result in [
            netlink.add_address(0, Ipv4Addr::LOCALHOST.into(), 8),
            netlink.add_address(0, Ipv6Addr::LOCALHOST.into(), 64),
            netlink.bring_up(u32::MAX >> 1, 1500),
        ] {
            let error = result.unwrap_err().raw_os_error();
            assert!(matches!(error, Some(libc::EPERM | libc::ENODEV)), "{error:?}");
        }
    }
}
