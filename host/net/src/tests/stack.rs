//! The whole stack between a model of a guest and real servers on the loopback.

use std::{
    collections::VecDeque,
    io::{Read, Write},
    net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    time::{Duration, Instant as Clock},
};

use bulkhead_protocol::Transport;
use proptest::prelude::*;
use smoltcp::{
    iface::{Config, Interface, SocketHandle, SocketSet},
    phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken},
    socket::tcp::{Socket, SocketBuffer, State},
    time::Instant,
    wire::{HardwareAddress, IpAddress, IpCidr, IpProtocol},
};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::{
    addresses::{PREFIX6, example},
    events::{Token, ending},
    frame::{ETHERNET_HEADER, Frame},
    fuzzing::take,
    ip,
    offload::Offload,
    stack::Stack,
};

/// The guest's wire.
#[derive(Default)]
struct Wire {
    incoming: VecDeque<Vec<u8>>,
    outgoing: Vec<Vec<u8>>,
}

struct Packet(Vec<u8>);

impl RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Slot<'a>(&'a mut Vec<Vec<u8>>);

impl TxToken for Slot<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = Frame::ip(len);
        let result = f(&mut frame.bytes[ETHERNET_HEADER..]);
        frame.seal();
        self.0.push(frame.bytes);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Slot<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Packet, Slot<'_>)> {
        self.incoming.pop_front().map(|packet| (Packet(packet), Slot(&mut self.outgoing)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Slot<'_>> {
        Some(Slot(&mut self.outgoing))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = 1500;
        capabilities.checksum = ChecksumCapabilities::ignored();
        capabilities.checksum.ipv4 = smoltcp::phy::Checksum::Both;
        capabilities
    }
}

/// A guest with one interface, and the stack behind it.
struct World {
    stack: Stack,
    epoll: Arc<Epoll>,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    begun: Clock,
    /// Largest frame that the guest was given.
    longest: usize,
}

impl World {
    fn new(segmentation: bool) -> Self {
        let epoll = Arc::new(Epoll::new().unwrap());
        let mut stack = Stack::new(Arc::clone(&epoll), example());
        stack.offload = Offload { checksum: true, segmentation };
        let mut wire = Wire::default();
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut wire, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(example().guest.into(), 24)).unwrap();
            addresses.push(IpCidr::new(example().guest6.into(), PREFIX6)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(example().gateway).unwrap();
        interface.routes_mut().add_default_ipv6_route(example().gateway6).unwrap();
        let sockets = SocketSet::new(Vec::new());
        Self { stack, epoll, wire, interface, sockets, begun: Clock::now(), longest: 0 }
    }

    fn connect(&mut self, address: impl Into<IpAddress>, port: u16, from: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 100_000]);
        let handle = self.sockets.add(Socket::new(buffer(), buffer()));
        let socket = self.sockets.get_mut::<Socket<'_>>(handle);
        socket.connect(self.interface.context(), (address.into(), port), from).unwrap();
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Lets everything run once; the guest takes at most `frames` frames.
    fn turn(&mut self, frames: usize) {
        let now = Instant::from_micros(self.begun.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.wire, &mut self.sockets);
        for frame in self.wire.outgoing.drain(..) {
            self.stack.receive_copy(&frame);
        }
        let mut events = vec![EpollEvent::default(); 16];
        let ready = self.epoll.wait(0, &mut events).unwrap();
        for event in &events[..ready] {
            self.stack.host_ready(Token::unpack(event.data()), ending(event));
        }
        self.stack.run_timers();
        for frame in take(&mut self.stack, frames) {
            self.longest = self.longest.max(frame.bytes.len());
            self.wire.incoming.push_back(frame.bytes[ETHERNET_HEADER..].to_vec());
        }
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Clock::now() + Duration::from_secs(20);
        while !done(self) {
            assert!(Clock::now() < deadline, "not within 20 s: {what}");
            self.turn(64);
            std::thread::yield_now();
        }
    }
}

fn port(listener: &TcpListener) -> u16 {
    listener.local_addr().unwrap().port()
}

/// A server that serves one connection.
fn server<T: Send + 'static>(serve: impl FnOnce(TcpStream) -> T + Send + 'static) -> (u16, std::thread::JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = port(&listener);
    (port, std::thread::spawn(move || serve(listener.accept().unwrap().0)))
}

#[test]
fn a_refused_connection_is_refused_and_a_forbidden_one_too() {
    let mut world = World::new(true);
    let free = port(&TcpListener::bind("127.0.0.1:0").unwrap());
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    for (index, (address, port)) in [
        (example().host, free),
        (Ipv4Addr::new(192, 168, 65, 77), port(&open)),
        (Ipv4Addr::new(224, 0, 0, 1), port(&open)),
    ]
    .into_iter()
    .enumerate()
    {
        let handle = world.connect(address, port, 1000 + index as u16);
        if address.is_multicast() {
            // smoltcp does not connect to a multicast address, so nothing has to refuse it.
            continue;
        }
        world.until("a refusal", |world| world.socket(handle).state() == State::Closed);
    }
    assert!(world.stack.is_empty());
}

#[test]
fn a_server_that_answers_after_the_end_of_the_request_is_heard() {
    let (port, server) = server(|mut stream| {
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        request.reverse();
        stream.write_all(&request).unwrap();
    });
    let mut world = World::new(true);
    let handle = world.connect(example().host, port, 1000);
    world.until("a connection", |world| world.socket(handle).may_send());
    world.socket(handle).send_slice(b"abc").unwrap();
    world.socket(handle).close();
    world.until("the answer", |world| world.socket(handle).recv_queue() == 3);
    let mut answer = [0; 3];
    world.socket(handle).recv_slice(&mut answer).unwrap();
    assert_eq!(&answer, b"cba");
    server.join().unwrap();
    world.until("the end", |world| world.stack.is_empty());
}

#[test]
fn a_client_can_go_on_talking_after_the_server_has_ended() {
    let (port, server) = server(|mut stream| {
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let mut world = World::new(true);
    let handle = world.connect(example().host, port, 1000);
    world.until("the server's end", |world| world.socket(handle).state() == State::CloseWait);
    world.socket(handle).send_slice(b"bye").unwrap();
    world.socket(handle).close();
    world.until("the end", |world| world.stack.is_empty());
    assert_eq!(server.join().unwrap(), b"bye");
}

#[test]
fn a_reset_reaches_the_other_side_both_ways() {
    let (port, server) = server(|mut stream| stream.read(&mut [0; 8]).map_err(|error| error.kind()));
    let mut world = World::new(true);
    let handle = world.connect(example().host, port, 1000);
    world.until("a connection", |world| world.socket(handle).may_send());
    world.socket(handle).abort();
    world.until("the end", |world| world.stack.is_empty());
    assert_eq!(server.join().unwrap(), Err(std::io::ErrorKind::ConnectionReset));
    let (port, server) = self::server(crate::socket::reset);
    let handle = world.connect(example().host, port, 1001);
    world.until("the reset", |world| world.socket(handle).state() == State::Closed);
    server.join().unwrap();
    world.until("the end", |world| world.stack.is_empty());
}

#[test]
fn a_guest_that_takes_nothing_stops_the_server_within_the_bounds() {
    const SENT: usize = 64 << 20;
    let (port, server) = server(|mut stream| {
        stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let block = vec![7; 1 << 16];
        let mut sent = 0;
        while sent < SENT {
            match stream.write(&block) {
                Ok(len) => sent += len,
                Err(_) => break,
            }
        }
        sent
    });
    let mut world = World::new(true);
    let handle = world.connect(example().host, port, 1000);
    world.until("a connection", |world| world.socket(handle).may_send());
    while !server.is_finished() {
        world.turn(0);
    }
    let sent = server.join().unwrap();
    assert!(sent < SENT, "the server was never stopped");
    let mut received = 0;
    world.until("the rest", |world| {
        let socket = world.socket(handle);
        received += socket.recv(|data| (data.len(), data.len())).unwrap_or(0);
        !socket.may_recv()
    });
    assert_eq!(received, sent);
    assert!(world.longest > 32_768, "segments of {} bytes are not bulk", world.longest);
}

#[test]
fn without_segmentation_by_the_guest_no_segment_is_longer_than_it_takes() {
    let (port, server) = server(|mut stream| stream.write_all(&vec![1; 100_000]).unwrap());
    let mut world = World::new(false);
    let handle = world.connect(example().host, port, 1000);
    let mut received = 0;
    world.until("everything", |world| {
        received += world.socket(handle).recv(|data| (data.len(), data.len())).unwrap_or(0);
        received == 100_000
    });
    server.join().unwrap();
    assert!(world.longest <= ETHERNET_HEADER + 1500, "{}", world.longest);
}

/// A published port, and a guest that serves one connection on it.
fn publish(world: &mut World, target: SocketAddr) -> (SocketAddr, SocketHandle) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    world.stack.publish(9, Transport::Tcp, listener.into(), target);
    let buffer = || SocketBuffer::new(vec![0; 100_000]);
    let handle = world.sockets.add(Socket::new(buffer(), buffer()));
    world.socket(handle).listen(target.port()).unwrap();
    (address, handle)
}

#[test]
fn a_published_ports_client_and_the_guest_may_each_end_first() {
    for guest in [IpAddr::from(example().guest), example().guest6.into()] {
        for client_first in [true, false] {
            let mut world = World::new(true);
            let (address, handle) = publish(&mut world, SocketAddr::new(guest, 80));
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(b"question").unwrap();
            if client_first {
                client.shutdown(Shutdown::Write).unwrap();
            }
            world.until("the question", |world| world.socket(handle).recv_queue() == 8);
            let gateway: IpAddr = if guest.is_ipv4() { example().gateway.into() } else { example().gateway6.into() };
            let remote = world.socket(handle).remote_endpoint().unwrap();
            assert_eq!(IpAddr::from(remote.addr), gateway);
            let answer = vec![3; 300_000];
            let mut sent = 0;
            let reader = std::thread::spawn(move || {
                let mut text = Vec::new();
                client.read_to_end(&mut text).unwrap();
                if !client_first {
                    client.write_all(b"bye").unwrap();
                }
                text
            });
            world.until("the answer", |world| {
                let socket = world.socket(handle);
                sent += socket.send_slice(&answer[sent..]).unwrap();
                sent == answer.len()
            });
            world.socket(handle).close();
            world.until("the end", |world| world.stack.is_empty());
            assert!(reader.join().unwrap() == answer);
            let rest = if client_first { 8 } else { 11 };
            assert_eq!(world.socket(handle).recv_queue(), rest);
        }
    }
}

#[test]
fn a_client_sees_a_refusal_as_a_reset_and_a_forgotten_port_as_an_end() {
    let mut world = World::new(true);
    let (address, handle) = publish(&mut world, SocketAddr::new(example().guest.into(), 80));
    world.socket(handle).abort();
    let mut client = TcpStream::connect(address).unwrap();
    world.until("the refusal", |world| {
        world.stack.is_empty()
            && client.set_nonblocking(true).is_ok()
            && client.read(&mut [0]).is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
    });
    world.socket(handle).listen(80).unwrap();
    let mut client = TcpStream::connect(address).unwrap();
    world.until("a connection", |world| world.socket(handle).state() == State::Established);
    world.stack.forget(9);
    world.until("the guest's reset", |world| world.socket(handle).state() == State::Closed);
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    // Another test's child may have the listener open until it executes its program.
    world.until("nobody to listen", |_| {
        TcpStream::connect(address).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
    });
    assert!(world.stack.is_empty());
}

#[test]
fn data_that_a_container_sent_before_its_end_still_reaches_the_client() {
    let mut world = World::new(true);
    let (address, handle) = publish(&mut world, SocketAddr::new(example().guest.into(), 80));
    let mut client = TcpStream::connect(address).unwrap();
    world.until("a connection", |world| world.socket(handle).may_send());
    // More than the host's socket takes of a client that does not read.
    let sent: Vec<u8> = (0..6_000_000_u32).map(|index| (index ^ index >> 9) as u8).collect();
    let mut from = 0;
    let mut still = 0;
    while from < sent.len() && still < 200 {
        let before = from;
        from += world.socket(handle).send_slice(&sent[from..]).unwrap();
        world.turn(64);
        still = if from == before { still + 1 } else { 0 };
    }
    let waiting = world.socket(handle).send_queue();
    let whole = from - waiting;
    // The guest's end vanishes.
    world.sockets.remove(handle);
    world.stack.forget(9);
    let reader = std::thread::spawn(move || {
        let (mut received, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
        while let Ok(len @ 1..) = client.read(&mut buffer) {
            received.extend_from_slice(&buffer[..len]);
        }
        received
    });
    let deadline = Clock::now() + Duration::from_secs(20);
    while !world.stack.is_empty() {
        assert!(Clock::now() < deadline, "the connection does not end");
        world.turn(0);
    }
    let received = reader.join().unwrap();
    assert!(
        received.len() >= whole.saturating_sub(1) && received[..] == sent[..received.len()],
        "{} of {whole}",
        received.len()
    );
}

#[test]
fn a_guest_reaches_the_hosts_loopback_over_ipv6() {
    let listener = TcpListener::bind("[::1]:0").unwrap();
    let port = port(&listener);
    let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(&vec![5; 200_000]).unwrap());
    let mut world = World::new(true);
    let handle = world.connect(example().host6, port, 1000);
    let mut received = 0;
    world.until("everything", |world| {
        received += world.socket(handle).recv(|data| (data.len(), data.len())).unwrap_or(0);
        received == 200_000
    });
    server.join().unwrap();
    world.socket(handle).close();
    world.until("the end", |world| world.stack.is_empty());
}

#[test]
fn the_name_server_answers_over_tcp_too() {
    let mut world = World::new(true);
    let handle = world.connect(example().gateway, 53, 1000);
    world.until("a connection", |world| world.socket(handle).may_send());
    let mut question = vec![0, 38, 1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 4];
    question.extend(b"host\x06docker\x08internal\x00\x00\x01\x00\x01");
    for _ in 0..2 {
        world.socket(handle).send_slice(&question).unwrap();
        world.until("an answer", |world| world.socket(handle).recv_queue() == question.len() + 16);
        let mut answer = vec![0; question.len() + 16];
        world.socket(handle).recv_slice(&mut answer).unwrap();
        assert_eq!(answer[answer.len() - 4..], example().host.octets());
    }
    world.socket(handle).close();
    world.until("the end", |world| world.stack.is_empty());
}

#[test]
fn connections_in_sequence_leave_nothing_behind() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = port(&listener);
    let descriptors = || std::fs::read_dir("/proc/self/task/self/fd").map_or(0, Iterator::count);
    let server = std::thread::spawn(move || {
        for stream in listener.incoming().take(300) {
            stream.unwrap().write_all(b"x").unwrap();
        }
    });
    let mut world = World::new(true);
    let before = descriptors();
    for index in 0..300 {
        let handle = world.connect(example().host, port, 1000 + index);
        world.until("a byte", |world| world.socket(handle).recv_queue() == 1);
        world.socket(handle).close();
        world.until("the end", |world| world.stack.is_empty());
        world.sockets.remove(handle);
    }
    server.join().unwrap();
    assert!(descriptors() <= before + 50);
}

// RFC 9293, 3.9.2.3 (MUST-57): a segment to a broadcast or multicast address is silently discarded.
#[test]
fn a_segment_to_a_group_or_to_nobody_is_discarded() {
    let mut world = World::new(true);
    let guests: [IpAddr; 2] = [example().guest.into(), example().guest6.into()];
    for destination in ["224.0.0.1", "255.255.255.255", "0.0.0.0", "ff02::1", "::"] {
        let destination: IpAddr = destination.parse().unwrap();
        let source = guests[usize::from(destination.is_ipv6())];
        for flags in [2, 16] {
            let frame = ip::frame(source, destination, IpProtocol::Tcp, 20, |tcp| {
                tcp[1] = 9;
                tcp[3] = 80;
                tcp[12..14].copy_from_slice(&[5 << 4, flags]);
            });
            world.stack.receive_copy(&frame.bytes);
            assert!(world.stack.is_empty() && world.stack.out.is_empty(), "{destination}");
        }
    }
}

#[test]
fn tcp_to_a_group_is_not_answered() {
    for (version, group) in [(4, [224_u8; 16]), (4, [255; 16]), (4, [0; 16]), (6, [255; 16]), (6, [0; 16])] {
        let mut world = World::new(true);
        let (from, to): (IpAddr, IpAddr) = if version == 4 {
            (example().guest.into(), <[u8; 4]>::try_from(&group[..4]).unwrap().into())
        } else {
            (example().guest6.into(), group.into())
        };
        let syn = ip::frame(from, to, IpProtocol::Tcp, 20, |tcp| {
            tcp[..14].copy_from_slice(&[1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 80, 2]);
        });
        world.stack.receive_copy(&syn.bytes);
        assert!(world.stack.is_empty() && world.stack.out.is_empty(), "{to}");
    }
}

#[test]
fn what_a_stranger_sends_gets_no_answer() {
    let mut world = World::new(true);
    let syn = |source: Ipv4Addr| {
        let mut frame = ip::udp(SocketAddr::from((source, 9)), "192.168.65.1:53".parse().unwrap(), b"");
        frame.bytes[ETHERNET_HEADER + 9] = 6;
        frame.bytes
    };
    world.stack.receive_copy(&syn(Ipv4Addr::new(192, 168, 65, 4)));
    assert!(world.stack.is_empty() && world.stack.out.is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn data_is_neither_lost_nor_reordered_nor_doubled(
        sizes in prop::collection::vec(1_usize..40_000, 1..20),
        frames in prop::collection::vec(0_usize..20, 1..20),
        reads in prop::collection::vec(1_usize..30_000, 1..20),
        (segmentation, checksum) in any::<(bool, bool)>(),
        server_chunk in 1_usize..70_000,
    ) {
        let (port, server) = server(move |mut stream| {
            let mut buffer = vec![0; server_chunk];
            loop {
                match stream.read(&mut buffer).unwrap() {
                    0 => return,
                    len => stream.write_all(&buffer[..len]).unwrap(),
                }
            }
        });
        let sent: Vec<u8> = (0..sizes.iter().sum()).map(|index: usize| (index ^ index >> 8 ^ index >> 16) as u8).collect();
        let mut world = World::new(segmentation);
        world.stack.offload.checksum = checksum;
        let handle = world.connect(example().host, port, 1000);
        let (mut from, mut received, mut chunks) = (0, Vec::<u8>::new(), sizes.iter().cycle());
        let (mut frames, mut reads) = (frames.iter().cycle(), reads.iter().cycle());
        let deadline = Clock::now() + Duration::from_secs(20);
        for turn in 0_usize.. {
            prop_assert!(Clock::now() < deadline, "{} of {} bytes", received.len(), sent.len());
            let socket = world.socket(handle);
            if socket.can_send() && from < sent.len() {
                let end = sent.len().min(from + chunks.next().unwrap());
                from += socket.send_slice(&sent[from..end]).unwrap();
                if from == sent.len() {
                    socket.close();
                }
            }
            let mut buffer = vec![0; *reads.next().unwrap()];
            if socket.can_recv() {
                let len = socket.recv_slice(&mut buffer).unwrap();
                received.extend(&buffer[..len]);
            } else if from == sent.len() && !socket.may_recv() {
                break;
            }
            // One frame in three turns also when the case takes none, or a case of zeros alone would never end.
            world.turn(*frames.next().unwrap() + usize::from(turn % 3 == 0));
        }
        server.join().unwrap();
        prop_assert!(received == sent);
        world.until("the end", |world| world.stack.is_empty());
    }

    #[test]
    fn no_frames_make_the_stack_panic(
        frames in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..120), any::<bool>(), any::<u8>()), 0..20),
        protocol in 0_usize..3,
        v6 in any::<bool>(),
    ) {
        let mut world = World::new(true);
        for (mut frame, near, group) in frames {
            if frame.len() > 80 {
                // Mostly plausible: a packet of the guest, often to one of our addresses, sometimes to a group.
                let total = frame.len() - ETHERNET_HEADER;
                if v6 {
                    frame[12..15].copy_from_slice(&[0x86, 0xdd, 0x60]);
                    frame[18..20].copy_from_slice(&(total as u16 - 40).to_be_bytes());
                    frame[20] = [58, 6, 17][protocol];
                    frame[22..38].copy_from_slice(&example().guest6.octets());
                    if near {
                        frame[38..54].copy_from_slice(&example().host6.octets());
                    } else if group & 1 == 0 {
                        frame[38] = 0xff;
                    }
                } else {
                    frame[12..15].copy_from_slice(&[8, 0, 0x45]);
                    frame[16..18].copy_from_slice(&(total as u16).to_be_bytes());
                    frame[20..22].copy_from_slice(&[0, 0]);
                    frame[23] = [1, 6, 17][protocol];
                    frame[26..30].copy_from_slice(&example().guest.octets());
                    if near {
                        frame[30..34].copy_from_slice(&example().gateway.octets());
                    } else if group & 1 == 0 {
                        frame[30..34].copy_from_slice(&[[255; 4], [0; 4], [224, 0, 0, 1]][usize::from(group) % 3]);
                    }
                }
            }
            world.stack.receive_copy(&frame);
            world.turn(9);
        }
    }
}
