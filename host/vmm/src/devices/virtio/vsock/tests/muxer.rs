//! Many connections, and packets that belong to none.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tempfile::TempDir;
use vmm_sys_util::epoll::{EpollEvent, EventSet};

use crate::devices::virtio::vsock::{
    connection::REQUEST_TIMEOUT,
    muxer::{Endpoint, FIRST_TOKEN, Muxer},
    offers::Offers,
    packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM},
    stream::SocketStream,
};

const CID: u64 = 42;
const LISTENER: u64 = 1;

struct Bench {
    muxer: Muxer,
    offers: Arc<Offers>,
    directory: TempDir,
    now: Instant,
}

impl Bench {
    fn new(max_connections: usize) -> Self {
        Self::with(max_connections, true)
    }

    /// A device of an isolated VM.
    fn without_listeners(max_connections: usize) -> Self {
        Self::with(max_connections, false)
    }

    fn with(max_connections: usize, clients_listen: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let offers = Arc::new(Offers::new());
        let endpoint = Endpoint {
            guest_cid: CID,
            offers: Arc::clone(&offers),
            listener: Arc::new(listener),
            clients_listen,
            max_connections,
        };
        Self { muxer: Muxer::new(endpoint, LISTENER).unwrap(), offers, directory, now: Instant::now() }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Handles all events and deadlines that are due.
    fn turn(&mut self) {
        let mut events = [EpollEvent::default(); 32];
        loop {
            let count = self.muxer.epoll().wait(0, &mut events).unwrap();
            for event in &events[..count] {
                match event.data() {
                    LISTENER => self.muxer.accept(self.now),
                    token => self.muxer.event(token, event.event_set(), self.now),
                }
            }
            if count == 0 {
                return;
            }
        }
    }

    /// The next packet and its payload.
    fn packet(&mut self) -> Option<(Header, Vec<u8>)> {
        self.turn();
        let mut buffer = [0; 4096];
        let header = self.muxer.next_packet(&[buffer.as_mut_slice().into()], self.now)?;
        Some((header, buffer[..header.len as usize].to_vec()))
    }

    fn op(&mut self) -> Option<Op> {
        self.packet().and_then(|(header, _)| Op::from_wire(header.op))
    }

    fn send(&mut self, header: Header, payload: &mut [u8]) {
        self.muxer.transmit(&header, Some(&[payload.into()]), self.now);
    }

    /// Connects a client to the hybrid socket, which sends this.
    fn client(&mut self, line: &[u8]) -> UnixStream {
        let mut client = UnixStream::connect(self.path().join("v")).unwrap();
        client.write_all(line).unwrap();
        self.turn();
        client
    }

    /// Offers a stream for the guest's next connection to this port of the host.
    fn offer(&self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.offers.put(port, theirs.into());
        ours
    }

    fn connect(&mut self, port: u32) -> UnixStream {
        let (ours, theirs) = UnixStream::pair().unwrap();
        self.muxer.connect(port, SocketStream::new(theirs.into()), false, self.now);
        ours
    }
}

/// From a port of the guest to a port of the host.
fn header(guest_port: u32, host_port: u32, op: Op) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op.to_wire(),
        buf_alloc: 256 << 10,
        ..Header::default()
    }
}

/// The answer of the guest to a packet.
fn answer(to: &Header, op: Op) -> Header {
    header(to.dst_port, to.src_port, op)
}

#[test]
fn a_packet_for_no_connection_is_answered_with_rst_to_its_sender() {
    let mut bench = Bench::new(4);
    for op in [Op::Response, Op::Rw, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest] {
        bench.send(header(7, 70, op), &mut []);
        let (reset, _) = bench.packet().unwrap();
        assert_eq!((reset.src_cid, reset.src_port, reset.dst_cid, reset.dst_port), (HOST_CID, 70, CID, 7));
        assert_eq!((reset.op, reset.kind), (Op::Rst.to_wire(), TYPE_STREAM));
    }
    bench.send(header(7, 70, Op::Rst), &mut []);
    assert_eq!(bench.packet(), None, "an RST is never answered");
}

#[test]
fn a_packet_of_unknown_type_or_operation_gets_an_rst_of_its_type() {
    let mut bench = Bench::new(4);
    bench.send(Header { kind: 2, ..header(7, 70, Op::Request) }, &mut []);
    let (reset, _) = bench.packet().unwrap();
    assert_eq!((reset.op, reset.kind), (Op::Rst.to_wire(), 2));
    bench.send(Header { op: 99, ..header(7, 70, Op::Request) }, &mut []);
    assert_eq!(bench.op(), Some(Op::Rst));
}

#[test]
fn a_packet_for_another_machine_is_refused_one_from_another_dropped() {
    let mut bench = Bench::new(4);
    bench.send(Header { dst_cid: 43, ..header(7, 70, Op::Request) }, &mut []);
    let (reset, _) = bench.packet().unwrap();
    assert_eq!((reset.src_cid, reset.op), (43, Op::Rst.to_wire()));
    bench.send(Header { src_cid: 43, ..header(7, 70, Op::Request) }, &mut []);
    assert_eq!(bench.packet(), None);
}

#[test]
fn a_packet_longer_than_its_buffers_ends_its_connection() {
    let mut bench = Bench::new(4);
    let mut host = bench.connect(5);
    let (request, _) = bench.packet().unwrap();
    bench.send(answer(&request, Op::Response), &mut []);
    bench.muxer.transmit(&Header { len: 100, ..answer(&request, Op::Rw) }, None, bench.now);
    assert_eq!(bench.op(), Some(Op::Rst));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    bench.muxer.transmit(&header(7, 70, Op::Request), None, bench.now);
    assert_eq!(bench.op(), Some(Op::Rst));
}

#[test]
fn a_connection_of_the_guest_takes_the_stream_that_is_offered_for_its_port() {
    let mut bench = Bench::new(4);
    let mut host = bench.offer(70);
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    bench.send(Header { len: 2, ..header(7, 70, Op::Rw) }, &mut b"hi".to_vec());
    let mut bytes = [0; 2];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hi");
    host.write_all(b"ho").unwrap();
    assert_eq!(bench.packet().unwrap().1, b"ho");

    bench.send(header(8, 71, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst), "nothing is offered for 71");
}

#[test]
fn an_offer_serves_one_connection_and_a_later_one_replaces_it() {
    let mut bench = Bench::new(4);
    let mut replaced = bench.offer(70);
    let _host = bench.offer(70);
    assert_eq!(replaced.read(&mut [0]).unwrap(), 0, "the first stream is closed");
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    // The guest may ask as often as it likes: without an offer each request costs an RST and nothing else.
    for port in 8..1000 {
        bench.send(header(port, 70, Op::Request), &mut []);
        assert_eq!(bench.op(), Some(Op::Rst), "{port}");
        assert_eq!(bench.muxer.len(), 1);
    }
    let _again = bench.offer(70);
    bench.send(header(8, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
}

#[test]
fn an_unreserved_port_of_the_guest_reaches_no_host_program() {
    let mut bench = Bench::new(4);
    let mut host = bench.offer(70);
    host.set_nonblocking(true).unwrap();
    for port in [1024, 1025, 1 << 30, u32::MAX] {
        bench.send(header(port, 70, Op::Request), &mut []);
        assert_eq!(bench.op(), Some(Op::Rst), "{port}");
        assert!(host.read(&mut [0]).is_err(), "{port}: the offer is still there");
    }
    bench.send(header(1023, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
}

#[test]
fn a_connection_of_the_guest_takes_a_client_that_listens_at_its_port() {
    let mut bench = Bench::new(4);
    let mut client = bench.client(b"LISTEN 5000\nearly");
    client.set_nonblocking(true).unwrap();
    assert!(client.read(&mut [0]).is_err(), "no connection yet");
    bench.send(header(1024, 5001, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst), "nothing listens at 5001");
    bench.send(header(1024, 5000, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    bench.send(Header { len: 2, ..header(1024, 5000, Op::Rw) }, &mut b"hi".to_vec());
    let mut bytes = [0; 10];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"OK 1024\nhi");
    assert_eq!(bench.packet().unwrap().1, b"early");
    bench.send(header(1025, 5000, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst), "a client takes one connection");
}

#[test]
fn clients_that_listen_at_a_port_have_their_turns_and_those_that_leave_are_forgotten() {
    let mut bench = Bench::new(4);
    let mut first = bench.client(b"LISTEN 5000\n");
    let gone = bench.client(b"LISTEN 5000\nbytes");
    // Its end arrives together with its line.
    drop(UnixStream::connect(bench.path().join("v")).map(|mut client| client.write_all(b"LISTEN 5000\n")));
    let mut last = bench.client(b"LISTEN 5000\n");
    drop(gone);
    bench.turn();
    assert_eq!(bench.muxer.len(), 2);
    for (guest_port, client) in [(2000, &mut first), (2001, &mut last)] {
        bench.send(header(guest_port, 5000, Op::Request), &mut []);
        assert_eq!(bench.op(), Some(Op::Response), "{guest_port}");
        let mut line = [0; 8];
        client.read_exact(&mut line).unwrap();
        assert_eq!(line, *format!("OK {guest_port}\n").as_bytes());
    }
    bench.send(header(2002, 5000, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst));
}

#[test]
fn a_client_waits_for_programs_that_are_not_the_vms_own_and_as_long_as_it_likes() {
    let mut bench = Bench::new(1);
    let mut client = bench.client(b"LISTEN 1025\n");
    bench.now += REQUEST_TIMEOUT * 2;
    bench.muxer.expire(bench.now);
    bench.send(header(1022, 1025, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst), "the agent must not be taken for a container");
    // All places are taken, of which this client has the one that it needs.
    bench.send(header(1024, 1025, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    let mut line = [0; 8];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1024\n");
}

#[test]
fn no_client_listens_where_none_may() {
    let mut bench = Bench::without_listeners(4);
    assert_eq!(bench.client(b"LISTEN 5000\n").read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.muxer.len(), 0);
    bench.send(header(1024, 5000, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst));
}

#[test]
fn no_client_listens_at_the_ports_of_connections_from_the_host() {
    let mut bench = Bench::new(4);
    assert_eq!(bench.client(b"LISTEN 1073741824\n").read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.muxer.len(), 0);
    let _client = bench.client(b"LISTEN 1073741823\n");
    assert_eq!(bench.muxer.len(), 1);
}

#[test]
fn a_second_request_for_a_connection_ends_it() {
    let mut bench = Bench::new(4);
    let mut host = bench.offer(70);
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst));
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.muxer.len(), 0);
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new(8);
    let mut hosts: Vec<UnixStream> = (0..4).map(|_| bench.connect(5)).collect();
    for _ in 0..4 {
        let (request, _) = bench.packet().unwrap();
        bench.send(answer(&request, Op::Response), &mut []);
    }
    for host in &mut hosts {
        host.write_all(&[1; 3 * 4096]).unwrap();
    }
    let ports: Vec<u32> = std::iter::from_fn(|| bench.packet()).map(|(header, _)| header.src_port).collect();
    assert_eq!(ports.len(), 12);
    let (first, rest) = ports.split_at(4);
    assert!(rest.chunks(4).all(|turn| turn == first), "{ports:?}");
}

#[test]
fn when_all_places_are_taken_everyone_else_is_refused_until_one_is_free() {
    let mut bench = Bench::new(2);
    let _offered = bench.offer(70);
    let _hosts = [bench.connect(5), bench.connect(5)];
    assert_eq!(bench.op(), Some(Op::Request));
    let (request, _) = bench.packet().unwrap();
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Rst));
    assert_eq!(bench.connect(5).read(&mut [0]).unwrap(), 0, "a stream handed in is closed");
    let mut client = bench.client(b"");
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "a client is turned away");
    bench.send(answer(&request, Op::Rst), &mut []);
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response), "the offer was not used up by the request that was refused");
}

#[test]
fn waiting_resets_are_bounded_and_stall_the_guest_instead_of_being_lost() {
    let mut bench = Bench::new(4);
    let mut sent = 0;
    while !bench.muxer.is_stalled() {
        bench.send(header(7, sent, Op::Rw), &mut []);
        sent += 1;
    }
    assert!(sent <= 256);
    for port in 0..sent {
        assert_eq!(bench.packet().unwrap().0.src_port, port);
    }
    assert!(!bench.muxer.is_stalled() && !bench.muxer.has_output());
}

#[test]
fn a_client_asks_for_a_port_in_pieces_and_its_data_follows_at_once() {
    let mut bench = Bench::new(4);
    let mut client = bench.client(b"CONN");
    assert_eq!(bench.packet(), None);
    client.write_all(b"ECT 1024\nGET /").unwrap();
    let (request, _) = bench.packet().unwrap();
    assert_eq!((request.op, request.dst_port), (Op::Request.to_wire(), 1024));
    assert_eq!(request.src_port, 1 << 30);
    bench.send(answer(&request, Op::Response), &mut []);
    let mut line = [0; 14];
    client.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"OK 1073741824\n");
    assert_eq!(bench.packet().unwrap().1, b"GET /");
}

#[test]
fn a_client_that_talks_nonsense_or_nothing_is_turned_away() {
    let mut bench = Bench::new(4);
    let mut nonsense = bench.client(b"GET / HTTP/1.1\n");
    assert_eq!(nonsense.read(&mut [0]).unwrap(), 0);
    let mut silent = bench.client(b"");
    let _gone = bench.client(b"");
    assert!(bench.muxer.timeout(bench.now).is_some_and(|timeout| timeout <= REQUEST_TIMEOUT));
    bench.now += REQUEST_TIMEOUT + Duration::from_secs(1);
    bench.muxer.expire(bench.now);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert_eq!(bench.muxer.len(), 0);
    assert_eq!(bench.packet(), None);
}

#[test]
fn a_reused_port_does_not_meet_bytes_of_its_old_connection() {
    let mut bench = Bench::new(4);
    let mut slow = bench.offer(70);
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    let mut total = 0;
    // More than the socket buffer of the host takes.
    for _ in 0..14 {
        bench.send(Header { len: 32 << 10, ..header(7, 70, Op::Rw) }, &mut vec![1; 32 << 10]);
        total += 32 << 10;
    }
    bench.send(Header { flags: SHUTDOWN_BOTH, ..header(7, 70, Op::Shutdown) }, &mut []);
    bench.send(header(7, 70, Op::Rst), &mut []);
    assert_eq!(bench.muxer.len(), 1, "the old connection still has bytes for its reader");

    let mut fresh = bench.offer(70);
    bench.send(header(7, 70, Op::Request), &mut []);
    assert_eq!(bench.op(), Some(Op::Response));
    bench.send(Header { len: 3, ..header(7, 70, Op::Rw) }, &mut b"new".to_vec());
    let mut bytes = [0; 3];
    fresh.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"new");

    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        slow.read_to_end(&mut bytes).map(|_| bytes)
    });
    while !reader.is_finished() {
        bench.turn();
        std::thread::yield_now();
    }
    let bytes = reader.join().unwrap().unwrap();
    assert!(bytes.len() == total && bytes.iter().all(|&byte| byte == 1), "{} of {total} bytes", bytes.len());
    bench.turn();
    assert_eq!(bench.muxer.len(), 1);
}

#[test]
fn bytes_that_the_guest_did_not_read_do_not_turn_the_end_into_an_error() {
    let mut bench = Bench::new(4);
    let mut host = bench.connect(5);
    let (request, _) = bench.packet().unwrap();
    bench.send(answer(&request, Op::Response), &mut []);
    bench.turn();
    host.write_all(b"never read").unwrap();
    bench.send(Header { len: 6, ..answer(&request, Op::Rw) }, &mut b"answer".to_vec());
    bench.send(Header { flags: SHUTDOWN_BOTH, ..answer(&request, Op::Shutdown) }, &mut []);
    assert_eq!(bench.op(), Some(Op::Rst));
    let mut bytes = Vec::new();
    host.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"answer");
}

#[test]
fn connections_that_end_while_the_guest_takes_no_packet_leave_nothing() {
    let mut bench = Bench::new(4);
    for _ in 0..100 {
        drop(bench.connect(5));
        bench.turn();
    }
    assert_eq!(bench.muxer.len(), 0);
    assert!(!bench.muxer.has_output());
}

#[test]
fn an_event_for_a_stream_that_is_gone_is_ignored() {
    let mut bench = Bench::new(4);
    bench.muxer.event(FIRST_TOKEN + 5, EventSet::IN | EventSet::HANG_UP, bench.now);
    assert_eq!(bench.packet(), None);
}
