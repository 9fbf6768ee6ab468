//! A guest's frames into the whole network: neighbours, TCP connections both ways, datagrams, names, pings, published
//! ports. It runs in a network namespace of its own, where nothing but the loopback exists.
#![no_main]

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd, OwnedFd},
    sync::OnceLock,
};

use arbitrary::Arbitrary;
use bulkhead_net::{addresses::Addresses, fuzzing::World};
use libfuzzer_sys::fuzz_target;
use nix::{
    sched::{CloneFlags, unshare},
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
};

/// A TCP server and a UDP server on the loopback; what is published listens on the next one.
const SERVER: u16 = 7;
const PUBLISHED: u16 = 8;
/// The container's end of what is published.
const TARGET: u16 = 80;

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Gateway,
    Host,
    Guest,
    Container,
    Elsewhere(u32),
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// Any bytes.
    Raw(&'a [u8]),
    /// Any packet of a plausible Ethernet type.
    Ip {
        six: bool,
        packet: &'a [u8],
    },
    Arp {
        target: Place,
        rest: [u8; 6],
    },
    Solicitation {
        target: Place,
        source: Place,
        hops: u8,
        rest: &'a [u8],
    },
    Tcp {
        six: bool,
        from: Place,
        to: Place,
        port: u8,
        peer: u16,
        segment: Segment<'a>,
    },
    Udp {
        six: bool,
        from: Place,
        to: Place,
        port: u8,
        peer: u16,
        data: &'a [u8],
    },
    Icmp {
        six: bool,
        from: Place,
        to: Place,
        message: &'a [u8],
    },
    Name {
        message: &'a [u8],
    },
    /// Someone on the host comes to what is published, or writes, or leaves.
    Client {
        udp: bool,
        data: &'a [u8],
        leaves: bool,
    },
    /// The server answers.
    Server {
        data: &'a [u8],
        leaves: bool,
    },
    Forget {
        udp: bool,
    },
    Turn {
        frames: u8,
        pause: bool,
    },
}

#[derive(Arbitrary, Debug)]
struct Segment<'a> {
    flags: u8,
    /// Added to what would be right.
    sequence: i8,
    acknowledgment: i16,
    far: bool,
    window: u16,
    options: &'a [u8],
    data: &'a [u8],
}

/// The state of the guest's end of a connection.
#[derive(Clone, Copy, Default)]
struct End {
    next: u32,
    received: u32,
}

type Ends = (IpAddr, u16, IpAddr, u16);

struct Host {
    server: TcpListener,
    datagrams: UdpSocket,
}

static HOST: OnceLock<Host> = OnceLock::new();

/// Leaves the host's network, so that nothing is sent anywhere.
fn isolate() {
    let flags = if nix::unistd::geteuid().is_root() {
        CloneFlags::CLONE_NEWNET
    } else {
        CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET
    };
    unshare(flags).expect("this target needs a network namespace of its own");
    let control = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::empty(), None).expect("a socket");
    // SAFETY: an all-zero ifreq is valid; the name is set below.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l'.cast_signed(), b'o'.cast_signed()]);
    request.ifr_ifru.ifru_flags = (nix::libc::IFF_UP | nix::libc::IFF_RUNNING) as i16;
    // SAFETY: the request lives throughout the call, which only reads it.
    let up = unsafe { nix::libc::ioctl(control.as_raw_fd(), nix::libc::SIOCSIFFLAGS, &raw const request) };
    assert_eq!(up, 0, "the loopback cannot be brought up");
    let server = TcpListener::bind((Ipv4Addr::LOCALHOST, SERVER)).expect("the namespace is empty");
    server.set_nonblocking(true).expect("a socket");
    let datagrams = UdpSocket::bind((Ipv4Addr::LOCALHOST, SERVER)).expect("the namespace is empty");
    datagrams.set_nonblocking(true).expect("a socket");
    let _ = HOST.set(Host { server, datagrams });
}

fn address(place: Place, six: bool, addresses: &Addresses) -> IpAddr {
    let (four, long): (Ipv4Addr, Ipv6Addr) = match place {
        Place::Gateway => (addresses.gateway, addresses.gateway6),
        Place::Host => (addresses.host, addresses.host6),
        Place::Guest => (addresses.guest, addresses.guest6),
        Place::Container => (Ipv4Addr::new(172, 17, 0, 2), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2)),
        Place::Elsewhere(any) => (any.into(), Ipv6Addr::from(u128::from(any) << 96 | 1)),
    };
    if six { long.into() } else { four.into() }
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words = bytes.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// An Ethernet frame with an IP packet; the payload's checksum lies at `sum`, if it has one.
fn packet(from: IpAddr, to: IpAddr, protocol: u8, hops: u8, mut payload: Vec<u8>, sum: Option<usize>) -> Vec<u8> {
    let (source, destination) = (octets(from), octets(to));
    if let Some(at) = sum {
        let pseudo = [&source[..], &destination, &(payload.len() as u32).to_be_bytes(), &[0, 0, 0, protocol]].concat();
        let whole = if protocol == 1 { checksum(&[&payload]) } else { checksum(&[&pseudo, &payload]) };
        if let Some(place) = payload.get_mut(at..at + 2) {
            place.copy_from_slice(&whole.to_be_bytes());
        }
    }
    let mut frame = vec![2; 12];
    let len = payload.len();
    if from.is_ipv4() {
        let mut header = vec![0x45, 0];
        header.extend(((20 + len) as u16).to_be_bytes());
        header.extend([0, 0, 0, 0, hops, protocol, 0, 0]);
        header.extend(source);
        header.extend(destination);
        let sum = checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        frame.extend([8, 0]);
        frame.extend(header);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((len as u16).to_be_bytes());
        frame.extend([protocol, hops]);
        frame.extend(source);
        frame.extend(destination);
    }
    frame.extend(payload);
    frame
}

/// A port of a peer: mostly one where somebody is.
fn peer_port(port: u16) -> u16 {
    match port % 8 {
        0..5 => SERVER,
        5 => 53,
        _ => port,
    }
}

struct Guest {
    world: World,
    addresses: Addresses,
    connections: HashMap<Ends, End>,
    servers: Vec<TcpStream>,
    client: Option<TcpStream>,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self {
            world: World::new(true),
            addresses: World::addresses(),
            connections: HashMap::new(),
            servers: Vec::new(),
            client: None,
        };
        let target = SocketAddr::new(address(Place::Container, false, &guest.addresses), TARGET);
        if let Ok(listener) = TcpListener::bind((Ipv4Addr::LOCALHOST, PUBLISHED)) {
            listener.set_nonblocking(true).expect("a socket");
            guest.world.publish(1, false, OwnedFd::from(listener), target);
        }
        if let Ok(socket) = UdpSocket::bind((Ipv4Addr::LOCALHOST, PUBLISHED)) {
            socket.set_nonblocking(true).expect("a socket");
            guest.world.publish(2, true, OwnedFd::from(socket), target);
        }
        guest
    }

    fn segment(&mut self, ends: Ends, segment: &Segment) {
        let end = self.connections.entry(ends).or_default();
        let far = if segment.far { 0x4000_0000 } else { 0 };
        let sequence = end.next.wrapping_add_signed(segment.sequence.into()).wrapping_add(far);
        let acknowledgment = end.received.wrapping_add_signed(segment.acknowledgment.into());
        let options = &segment.options[..segment.options.len().min(40) / 4 * 4];
        let (from, port, to, peer) = ends;
        let mut bytes = [port.to_be_bytes(), peer.to_be_bytes()].concat();
        bytes.extend(sequence.to_be_bytes());
        bytes.extend(acknowledgment.to_be_bytes());
        bytes.extend([((5 + options.len() / 4) as u8) << 4, segment.flags]);
        bytes.extend(segment.window.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(options);
        bytes.extend(segment.data);
        if segment.sequence == 0 && !segment.far {
            let control = (segment.flags & 1) + (segment.flags >> 1 & 1);
            end.next = end.next.wrapping_add(segment.data.len() as u32 + u32::from(control));
        }
        self.world.receive(&packet(from, to, 6, 64, bytes, Some(16)));
    }

    /// Takes frames and learns sequence numbers from them.
    fn turn(&mut self, frames: usize) {
        for frame in self.world.turn(frames) {
            assert!(frame.len() >= 14 && frame.len() <= 14 + 65_535);
            let (header, ends): (usize, (IpAddr, IpAddr)) = match frame[12..14] {
                [8, 0] => {
                    assert_eq!(usize::from(u16::from_be_bytes([frame[16], frame[17]])), frame.len() - 14);
                    let at = |at: usize| Ipv4Addr::from([0, 1, 2, 3].map(|byte| frame[at + byte]));
                    (34, (at(30).into(), at(26).into()))
                }
                [0x86, 0xdd] => {
                    assert_eq!(usize::from(u16::from_be_bytes([frame[18], frame[19]])), frame.len() - 54);
                    let at =
                        |at: usize| Ipv6Addr::from(<[u8; 16]>::try_from(&frame[at..at + 16]).expect("sixteen bytes"));
                    (54, (at(38).into(), at(22).into()))
                }
                _ => continue,
            };
            let protocol = if header == 34 { frame[23] } else { frame[20] };
            if protocol != 6 {
                continue;
            }
            let word = |at: usize| u32::from_be_bytes([0, 1, 2, 3].map(|byte| frame[header + at + byte]));
            let port = |at: usize| u16::from_be_bytes([frame[header + at], frame[header + at + 1]]);
            let (offset, flags) = (usize::from(frame[header + 12] >> 4) * 4, frame[header + 13]);
            let data = frame.len() - header - offset;
            let key = (ends.0, port(2), ends.1, port(0));
            let end = self.connections.entry(key).or_default();
            end.received = word(4).wrapping_add(data as u32 + u32::from(flags & 1) + u32::from(flags >> 1 & 1));
            if flags & 0x10 != 0 {
                end.next = word(8);
            }
        }
    }

    fn step(&mut self, step: Step) {
        let place = |place, six| address(place, six, &World::addresses());
        match step {
            Step::Raw(bytes) => self.world.receive(bytes),
            Step::Ip { six, packet } => {
                let kind: [u8; 2] = if six { [0x86, 0xdd] } else { [8, 0] };
                self.world.receive(&[&[2; 12][..], &kind, packet].concat());
            }
            Step::Arp { target, rest } => {
                let mut frame = vec![2; 12];
                frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
                frame.extend(rest);
                frame.extend([1; 10]);
                frame.extend(octets(place(target, false)));
                self.world.receive(&frame);
            }
            Step::Solicitation { target, source, hops, rest } => {
                let mut message = vec![135, 0, 0, 0, 0, 0, 0, 0];
                message.extend(octets(place(target, true)));
                message.extend(rest);
                let hops = if hops % 2 == 0 { 255 } else { hops };
                let (from, to) = (place(source, true), place(target, true));
                self.world.receive(&packet(from, to, 58, hops, message, Some(2)));
            }
            Step::Tcp { six, from, to, port, peer, segment } => {
                let known = self.connections.keys().nth(usize::from(port) % 16).copied();
                let ends = match known {
                    Some(ends) if port >= 16 => ends,
                    _ => (place(from, six), u16::from(port), place(to, six), peer_port(peer)),
                };
                self.segment(ends, &segment);
            }
            Step::Udp { six, from, to, port, peer, data } => {
                let mut datagram = [u16::from(port).to_be_bytes(), peer_port(peer).to_be_bytes()].concat();
                datagram.extend(((8 + data.len()) as u16).to_be_bytes());
                datagram.extend([0, 0]);
                datagram.extend(data);
                self.world.receive(&packet(place(from, six), place(to, six), 17, 64, datagram, Some(6)));
            }
            Step::Icmp { six, from, to, message } => {
                let protocol = if six { 58 } else { 1 };
                let frame = packet(place(from, six), place(to, six), protocol, 64, message.to_vec(), Some(2));
                self.world.receive(&frame);
            }
            Step::Name { message } => {
                let mut datagram = [0x1000_u16.to_be_bytes(), 53_u16.to_be_bytes()].concat();
                datagram.extend(((8 + message.len()) as u16).to_be_bytes());
                datagram.extend([0, 0]);
                datagram.extend(message);
                let (from, to) = (place(Place::Guest, false), place(Place::Gateway, false));
                self.world.receive(&packet(from, to, 17, 64, datagram, Some(6)));
            }
            Step::Client { udp, data, leaves } => self.client(udp, data, leaves),
            Step::Server { data, leaves } => self.serve(data, leaves),
            Step::Forget { udp } => self.world.forget(if udp { 2 } else { 1 }),
            Step::Turn { frames, pause } => {
                if pause {
                    self.world.pause();
                }
                self.turn(usize::from(frames));
            }
        }
    }

    fn client(&mut self, udp: bool, data: &[u8], leaves: bool) {
        let published = SocketAddr::from((Ipv4Addr::LOCALHOST, PUBLISHED));
        if udp {
            if let Some(host) = HOST.get() {
                let _ = host.datagrams.send_to(data, published);
            }
            return;
        }
        if self.client.is_none() {
            self.client = TcpStream::connect(published).ok();
        }
        if let Some(client) = &mut self.client {
            let _ = client.set_nonblocking(true);
            let _ = client.write(data);
            let _ = client.read(&mut [0; 4096]);
        }
        if leaves {
            self.client = None;
        }
    }

    fn serve(&mut self, data: &[u8], leaves: bool) {
        let Some(host) = HOST.get() else { return };
        while let Ok((stream, _)) = host.server.accept() {
            let _ = stream.set_nonblocking(true);
            self.servers.push(stream);
        }
        let mut buffer = [0; 4096];
        for server in &mut self.servers {
            let _ = server.read(&mut buffer);
            let _ = server.write(data);
        }
        if leaves {
            self.servers.pop();
        }
        if let Ok((_, from)) = host.datagrams.recv_from(&mut buffer) {
            let _ = host.datagrams.send_to(data, from);
        }
    }
}

fuzz_target!(
    init: isolate(),
    |steps: Vec<Step>| {
        let mut guest = Guest::new();
        for step in steps.into_iter().take(48) {
            guest.step(step);
        }
        guest.turn(usize::MAX);
    }
);
