//! The questions about network devices that [`crate::network`] asks the kernel (rtnetlink(7)).
//!
//! A message is a header, a fixed part for its type (`linux/rtnetlink.h`), and attributes. All numbers are in the byte
//! order of the machine.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

/// `struct nlmsghdr`: length (u32), type (u16), flags (u16), sequence number (u32), port id (u32).
const HEADER: usize = 16;

/// `struct ifinfomsg`: family (u8), padding (u8), type (u16), index (i32), flags (u32), changes (u32).
const INTERFACE: usize = 16;

/// `struct rtgenmsg`: family (u8), padded.
const GENERIC: usize = 4;

/// Bits of an attribute's type that are its type (`NLA_TYPE_MASK`).
const TYPE: u16 = 0x3fff;

/// Room for the messages that the kernel sends at once.
const BUFFER: usize = 64 * 1024;

/// `linux/net_namespace.h`, which libc leaves out.
const RTM_NEWNSID: u16 = 88;
const RTM_GETNSID: u16 = 90;
const NETNSA_NSID: u16 = 1;
const NETNSA_FD: u16 = 3;

/// A network device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Device {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// The driver of a virtual device (`veth`, `macvlan`); hardware and the loopback have none.
    pub(crate) kind: Option<String>,
    pub(crate) is_loopback: bool,
    /// The device below it, or the other end of a wire.
    pub(crate) lower: Option<Lower>,
}

/// Another device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lower {
    pub(crate) index: u32,
    /// The number of its network namespace; `None` in the same one.
    pub(crate) namespace: Option<i32>,
}

/// A socket, which stays in the network namespace in which it was made.
#[derive(Debug)]
pub(crate) struct Netlink(OwnedFd);

impl Netlink {
    /// Opens a socket in the network namespace of this process.
    pub(crate) fn open() -> io::Result<Self> {
        // The protocol is 0, NETLINK_ROUTE.
        Ok(Self(socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?))
    }

    /// All devices.
    pub(crate) fn devices(&self) -> io::Result<Vec<Device>> {
        self.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; INTERFACE])?;
        let mut devices = Vec::new();
        loop {
            let answer = self.answer()?;
            for message in messages(&answer) {
                match message? {
                    Message::Done => return Ok(devices),
                    message @ Message::Other { .. } => devices.push(message.device()?),
                }
            }
        }
    }

    /// The device with this number.
    pub(crate) fn device(&self, index: u32) -> io::Result<Device> {
        let mut body = [0; INTERFACE];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        self.ask(libc::RTM_GETLINK, 0, &body)?;
        self.single()?.device()
    }

    /// The number that the socket's namespace has for another; `None` if it has none.
    pub(crate) fn number_of(&self, namespace: impl AsFd) -> io::Result<Option<i32>> {
        let mut body = vec![0; GENERIC];
        body.extend(8_u16.to_ne_bytes());
        body.extend(NETNSA_FD.to_ne_bytes());
        body.extend(namespace.as_fd().as_raw_fd().to_ne_bytes());
        self.ask(RTM_GETNSID, 0, &body)?;
        let Message::Other { kind: RTM_NEWNSID, body } = self.single()? else { return Err(malformed()) };
        let number = attribute(body.get(GENERIC..).ok_or_else(malformed)?, NETNSA_NSID)?;
        let number = number.map(word).transpose()?.map(u32::cast_signed);
        Ok(number.filter(|number| *number >= 0))
    }

    fn ask(&self, kind: u16, flags: libc::c_int, body: &[u8]) -> io::Result<()> {
        let mut message = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend(((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
        // One request at a time, so the next message is its answer; the kernel fills in the port.
        message.extend([0; 8]);
        message.extend(body);
        send(&self.0, &message, SendFlags::empty())?;
        Ok(())
    }

    fn answer(&self) -> io::Result<Vec<u8>> {
        let mut buffer = vec![0; BUFFER];
        let (_, length) = rustix::io::retry_on_intr(|| recv(&self.0, &mut *buffer, RecvFlags::TRUNC))?;
        if length > buffer.len() {
            return Err(malformed());
        }
        buffer.truncate(length);
        Ok(buffer)
    }

    fn single(&self) -> io::Result<Message> {
        messages(&self.answer()?).next().ok_or_else(malformed)?
    }
}

/// A message of the kernel's other than an error.
#[derive(Debug, PartialEq, Eq)]
enum Message {
    /// The end of a list.
    Done,
    Other {
        kind: u16,
        body: Vec<u8>,
    },
}

impl Message {
    fn device(&self) -> io::Result<Device> {
        let Self::Other { kind: libc::RTM_NEWLINK, body } = self else { return Err(malformed()) };
        let attributes = body.get(INTERFACE..).ok_or_else(malformed)?;
        let text = |value: &[u8]| String::from_utf8_lossy(value.strip_suffix(b"\0").unwrap_or(value)).into_owned();
        let kind = match attribute(attributes, libc::IFLA_LINKINFO)? {
            Some(info) => attribute(info, libc::IFLA_INFO_KIND)?.map(text),
            None => None,
        };
        let index = attribute(attributes, libc::IFLA_LINK)?.map(word).transpose()?;
        let namespace = attribute(attributes, libc::IFLA_LINK_NETNSID)?.map(word).transpose()?;
        Ok(Device {
            index: word(&body[4..8])?,
            name: attribute(attributes, libc::IFLA_IFNAME)?.map(text).ok_or_else(malformed)?,
            kind,
            is_loopback: body[2..4] == libc::ARPHRD_LOOPBACK.to_ne_bytes(),
            lower: index.map(|index| Lower { index, namespace: namespace.map(u32::cast_signed) }),
        })
    }
}

/// Splits what was received.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = io::Result<Message>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let parse = || {
            let (length, header) = (word(bytes.get(..4)?).ok()? as usize, bytes.get(..HEADER)?);
            let message = bytes.get(HEADER..length)?;
            Some((
                length,
                u16::from_ne_bytes([header[4], header[5]]),
                u16::from_ne_bytes([header[6], header[7]]),
                message,
            ))
        };
        let Some((length, kind, flags, body)) = parse() else {
            bytes = &[];
            return Some(Err(malformed()));
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        // The list has changed meanwhile, and may lack a device.
        if libc::c_int::from(flags) & libc::NLM_F_DUMP_INTR != 0 {
            return Some(Err(io::ErrorKind::Interrupted.into()));
        }
        Some(match libc::c_int::from(kind) {
            libc::NLMSG_DONE => Ok(Message::Done),
            libc::NLMSG_ERROR => Err(word(body.get(..4).unwrap_or_default()).map_or_else(
                |error| error,
                |number| io::Error::from_raw_os_error(number.cast_signed().saturating_neg()),
            )),
            _ => Ok(Message::Other { kind, body: body.to_vec() }),
        })
    })
}

/// The value of the first attribute of a type: length and type, 16 bits each, then the value, padded to four bytes.
fn attribute(mut bytes: &[u8], wanted: u16) -> io::Result<Option<&[u8]>> {
    while !bytes.is_empty() {
        let [a, b, c, d] = *bytes.first_chunk().ok_or_else(malformed)?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = bytes.get(4..length).ok_or_else(malformed)?;
        if u16::from_ne_bytes([c, d]) & TYPE == wanted {
            return Ok(Some(value));
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(None)
}

fn word(bytes: &[u8]) -> io::Result<u32> {
    bytes.try_into().map(u32::from_ne_bytes).map_err(|_| malformed())
}

fn malformed() -> io::Error {
    io::ErrorKind::InvalidData.into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernel_answers() {
        let netlink = Netlink::open().unwrap();
        let devices = netlink.devices().unwrap();
        let loopback = devices.iter().find(|device| device.name == "lo").unwrap();
        assert!(loopback.is_loopback && loopback.kind.is_none() && loopback.lower.is_none());
        assert_eq!(netlink.device(loopback.index).unwrap(), *loopback);
        assert_eq!(netlink.device(u32::MAX >> 1).unwrap_err().raw_os_error(), Some(libc::ENODEV));
        // A namespace has no number for itself, as nothing has needed one.
        netlink.number_of(std::fs::File::open("/proc/self/ns/net").unwrap()).unwrap();
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind: u16) {
            let message = Message::Other { kind: libc::RTM_NEWLINK, body: bytes.clone() };
            let _ = (message.device(), attribute(&bytes, kind), messages(&bytes).count());
        }

        #[test]
        fn a_cut_message_is_an_error_and_never_less(cut in 1_usize..100) {
            let netlink = Netlink::open().unwrap();
            netlink.ask(libc::RTM_GETLINK, libc::NLM_F_DUMP, &[0; INTERFACE]).unwrap();
            let answer = netlink.answer().unwrap();
            let whole = messages(&answer).count();
            let cut: Vec<_> = messages(&answer[..answer.len() - cut]).collect();
            prop_assert!(cut.len() <= whole && cut.last().is_none_or(|last| last.is_err() || cut.len() < whole));
        }
    }
}
