//! The guest's name server: answers the two names that exist only here and those in the host's hosts(5), and passes
//! every other query on to the host's servers, as resolv.conf has them at that moment (`127.0.0.53` included).
//!
//! Over UDP, servers are asked one after the other. Over TCP (RFC 1035, 4.2.2; RFC 7766), queries are answered here
//! until the first that has to be passed on; from there on the bytes of the connection go to the first server unread.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::Addresses,
    events::{self, Token},
    frame::Frame,
    hosts::{self, Hosts},
    ip,
    key::Key,
    resolver::{self, Resolver},
    socket,
};

/// Number of queries that wait for a server's answer; one more takes the oldest one's place.
const MAX_PENDING: usize = 512;
/// Time after which the next server is asked.
const SERVER_TIMEOUT: Duration = Duration::from_secs(3);
/// Rounds through the list of servers before a query fails.
const ROUNDS: usize = 2;
/// Longest message that is passed on, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Length of a message's header (RFC 1035, 4.1.1).
const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_PTR: u16 = 12;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// Seconds for which a local answer may be cached: the addresses change with the setting of the guest's network, and
/// with the host's file.
const TTL: u32 = 60;

/// Response codes (RFC 1035, 4.1.1).
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

/// A query that waits for a server's answer.
struct PendingQuery {
    key: Key,
    message: Vec<u8>,
    /// Servers asked before this one, over all rounds.
    attempts: usize,
    socket: UdpSocket,
    deadline: Instant,
}

/// The name server, with its queries to the host's servers.
#[derive(Default)]
pub(super) struct Dns {
    next: u64,
    /// By number, and so by age.
    pending: BTreeMap<u64, PendingQuery>,
    resolver: Resolver,
    hosts: Hosts,
}

/// The names that are answered here.
pub(super) struct Names<'a> {
    addresses: &'a Addresses,
    hosts: &'a mut Hosts,
}

impl Dns {
    /// The names that are answered here.
    pub(super) fn names<'a>(&'a mut self, addresses: &'a Addresses) -> Names<'a> {
        Names { addresses, hosts: &mut self.hosts }
    }

    /// The host's server for queries over TCP.
    pub(super) fn server(&mut self) -> SocketAddr {
        self.resolver.servers().first().copied().unwrap_or(resolver::FALLBACK)
    }

    /// Takes a query of the guest that came over UDP.
    pub(super) fn receive_query(
        &mut self,
        epoll: &Epoll,
        addresses: &Addresses,
        key: Key,
        message: &[u8],
        out: &mut Vec<Frame>,
    ) {
        if let Some(answer) = self.names(addresses).answer(message) {
            out.push(ip::udp(key.peer, key.guest, &answer));
        } else if (HEADER..=MAX_MESSAGE).contains(&message.len()) {
            // Everything else with a header is passed on, understood or not: servers may know more than this file.
            self.forward(epoll, (key, message.to_vec()), 0, Instant::now(), out);
        }
    }

    fn forward(
        &mut self,
        epoll: &Epoll,
        (key, message): (Key, Vec<u8>),
        first: usize,
        now: Instant,
        out: &mut Vec<Frame>,
    ) {
        let servers = self.resolver.servers().to_vec();
        for attempts in first..servers.len() * ROUNDS {
            let server = servers[attempts % servers.len()];
            // A socket for each query: its random port is what a forger has to guess besides the identifier (RFC 5452,
            // 9.2).
            let Ok(socket) = socket::udp(server) else { continue };
            if socket.send(&message).is_err() || events::watch(epoll, &socket, Token::Dns(self.next)).is_err() {
                continue;
            }
            if self.pending.len() >= MAX_PENDING {
                self.pending.pop_first();
            }
            let deadline = now + SERVER_TIMEOUT;
            self.pending.insert(self.next, PendingQuery { key, message, attempts, socket, deadline });
            self.next += 1;
            return;
        }
        // No server is left. SERVFAIL lets the guest's resolver go on at once instead of waiting for its own timeout.
        out.push(ip::udp(key.peer, key.guest, &failure(&message)));
    }

    /// Takes a server's answer.
    pub(super) fn receive_answer(&mut self, epoll: &Epoll, id: u64, out: &mut Vec<Frame>) {
        let Some(query) = self.pending.get(&id) else { return };
        let mut buffer = [0; MAX_MESSAGE];
        match query.socket.recv(&mut buffer) {
            // The identifier is the guest's own; another one belongs to no query of this socket (RFC 5452, 9.1).
            Ok(len) if len >= HEADER && buffer[..2] == query.message[..2] => {
                out.push(ip::udp(query.key.peer, query.key.guest, &buffer[..len]));
                self.pending.remove(&id);
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // "Port unreachable" and the like: waiting for the timeout would gain nothing.
            Err(_) => self.ask_next_server(epoll, id, Instant::now(), out),
        }
    }

    fn ask_next_server(&mut self, epoll: &Epoll, id: u64, now: Instant, out: &mut Vec<Frame>) {
        if let Some(query) = self.pending.remove(&id) {
            self.forward(epoll, (query.key, query.message), query.attempts + 1, now, out);
        }
    }

    /// The time for [`Self::expire`].
    pub(super) fn deadline(&self) -> Option<Instant> {
        // All have the same timeout, so the oldest is due first.
        self.pending.first_key_value().map(|(_, query)| query.deadline)
    }

    /// Asks the next server for every query whose server has not answered in time.
    pub(super) fn expire(&mut self, epoll: &Epoll, now: Instant, out: &mut Vec<Frame>) {
        while let Some((id, query)) = self.pending.first_key_value()
            && query.deadline <= now
        {
            let id = *id;
            self.ask_next_server(epoll, id, now, out);
        }
    }
}

/// The next step of a TCP connection to the name server.
pub(super) enum Next {
    /// Wait for the rest of a query.
    Wait,
    /// Send these bytes, an answer behind its length.
    Answer(Vec<u8>),
    /// Leave this query and all later ones to the host's server.
    Forward,
}

/// Queries that came over TCP, each behind its length (RFC 1035, 4.2.2), and are not answered yet.
#[derive(Default)]
pub(super) struct QueryStream(Vec<u8>);

impl QueryStream {
    /// Bytes that [`Self::push`] takes: up to one whole query is held.
    pub(super) fn room(&self) -> usize {
        2 + MAX_MESSAGE - self.0.len()
    }

    /// Appends bytes, at most as many as there is room for.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next step; an answered query is removed.
    pub(super) fn next(&mut self, names: &mut Names<'_>) -> Next {
        let Some(len) = self.0.get(..2).map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))) else {
            return Next::Wait;
        };
        // Never held whole, so never answered here.
        if len > MAX_MESSAGE {
            return Next::Forward;
        }
        let Some(message) = self.0.get(2..2 + len) else { return Next::Wait };
        let Some(answer) = names.answer(message) else { return Next::Forward };
        let mut bytes = (answer.len() as u16).to_be_bytes().to_vec();
        bytes.extend(answer);
        self.0.drain(..2 + len);
        Next::Answer(bytes)
    }

    /// All bytes that are not answered.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Name (in lower case), type and class of a query's only question, and the offset of its end (RFC 1035, 4.1).
fn question(message: &[u8]) -> Option<(String, u16, u16, usize)> {
    let header = message.get(..HEADER)?;
    // Flags: a query (QR 0) with the standard opcode 0. QDCOUNT: one question.
    if header[2] & 0xf8 != 0 || header[4..6] != [0, 1] {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => break,
            // Labels compare without regard to case (RFC 1035, 2.3.3; RFC 4343).
            1..=63 => {
                let label = message.get(at..at + len)?;
                name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
                name.push('.');
                at += len;
            }
            // A compression pointer (RFC 1035, 4.1.4): the first name of a message has nothing to point to. Refusing it
            // also means that no message can make this loop run in circles.
            _ => return None,
        }
        // A name has 255 bytes at most (RFC 1035, 2.3.4); `char`s above 127 take two here.
        if name.len() > 512 {
            return None;
        }
    }
    let rest = message.get(at..at + 4)?;
    Some((name, u16::from_be_bytes([rest[0], rest[1]]), u16::from_be_bytes([rest[2], rest[3]]), at + 4))
}

impl Names<'_> {
    /// Returns the answer to a query for a name that is known here.
    fn answer(&mut self, message: &[u8]) -> Option<Vec<u8>> {
        let (name, kind, class, end) = question(message)?;
        let address: Ipv4Addr = match name.as_str() {
            "host.docker.internal." => self.addresses.host,
            "gateway.docker.internal." => self.addresses.gateway,
            _ => return self.answer_from_file(message, (&name, kind, class, end)),
        };
        if !self.addresses.host_loopback {
            return Some(reply_to(message, end, NXDOMAIN));
        }
        let mut answer = reply_to(message, end, 0);
        // A query for another type gets an empty answer: the name exists, such a record does not (RFC 2308, 2.2). IPv4
        // only: services on the host's loopback often do not listen on ::1, and clients would try that first.
        if kind == TYPE_A && class == CLASS_IN {
            add_record(&mut answer, kind, &address.octets());
        }
        Some(answer)
    }

    /// Returns the answer to a query for a name or an address in the host's file, as the host's resolver gives it: from
    /// the file alone, also for the kind of address that the file does not have. Queries for other types go on.
    fn answer_from_file(
        &mut self,
        message: &[u8],
        (name, kind, class, end): (&str, u16, u16, usize),
    ) -> Option<Vec<u8>> {
        if class != CLASS_IN || ![TYPE_A, TYPE_AAAA, TYPE_PTR].contains(&kind) {
            return None;
        }
        self.hosts.refresh();
        let mut answer = reply_to(message, end, 0);
        if kind == TYPE_PTR {
            let name = hosts::reverse(name).and_then(|address| self.hosts.name(address))?;
            add_record(&mut answer, kind, &encode(name));
            return Some(answer);
        }
        let mut known = Vec::new();
        for address in self.hosts.addresses(name)?.iter().filter_map(|address| self.reachable(*address)) {
            if !known.contains(&address) {
                known.push(address);
            }
        }
        if known.is_empty() {
            return None;
        }
        for address in known {
            match address {
                IpAddr::V4(address) if kind == TYPE_A => add_record(&mut answer, kind, &address.octets()),
                IpAddr::V6(address) if kind == TYPE_AAAA => add_record(&mut answer, kind, &address.octets()),
                _ => {}
            }
        }
        Some(answer)
    }

    /// The address by which the guest reaches what an address means on the host; `None` if it cannot. The guest's own
    /// loopback is another one.
    fn reachable(&self, address: IpAddr) -> Option<IpAddr> {
        if address.to_canonical().is_loopback() {
            return self.addresses.host_loopback.then_some(self.addresses.host.into());
        }
        Some(address)
    }
}

/// Appends a record with the question's name to an answer, which has fewer than 256.
fn add_record(answer: &mut Vec<u8>, kind: u16, data: &[u8]) {
    // ANCOUNT; the record's name is a pointer to the question's.
    answer[7] += 1;
    answer.extend([0xc0, HEADER as u8]);
    answer.extend(kind.to_be_bytes());
    answer.extend(CLASS_IN.to_be_bytes());
    answer.extend(TTL.to_be_bytes());
    answer.extend((data.len() as u16).to_be_bytes());
    answer.extend(data);
}

/// Returns a name of valid labels with a dot at its end in the form of a message (RFC 1035, 3.1).
fn encode(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 1);
    for label in name.trim_end_matches('.').split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

/// The answer when no server could be asked.
fn failure(message: &[u8]) -> Vec<u8> {
    let end = question(message).map_or(HEADER, |(.., end)| end);
    reply_to(message, end, SERVFAIL)
}

/// The header of a reply, with the query's question if `end` is the end of one.
fn reply_to(message: &[u8], end: usize, code: u8) -> Vec<u8> {
    let mut reply = message.get(..end).unwrap_or_default().to_vec();
    reply.resize(end.max(HEADER), 0);
    // QR 1; RD is copied from the query; RA is set, because the host's server recurses for all other names.
    reply[2] = 0x80 | reply[2] & 1;
    reply[3] = 0x80 | code;
    // Without a question that was understood, QDCOUNT is 0. The other three counts start at 0.
    let questions = u8::from(end > HEADER);
    reply[4..12].copy_from_slice(&[0, questions, 0, 0, 0, 0, 0, 0]);
    reply
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing {
    use super::{Addresses, Dns, failure, question};

    /// Reads a question and makes the answers that are made here.
    pub fn dns_question(message: &[u8], addresses: &Addresses) {
        let known = question(message);
        for answer in Dns::default().names(addresses).answer(message).into_iter().chain([failure(message)]) {
            // A response to this question (RFC 1035, 4.1.1).
            assert!(answer.len() >= 12 && answer[2] & 0x80 != 0);
            if known.is_some() {
                assert_eq!(answer[..2], message[..2]);
                assert_eq!(question(&[&message[..2], &[0, 0], &answer[4..]].concat()), known);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addresses::example;

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut message = vec![0xab, 0xcd, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            message.push(label.len() as u8);
            message.extend(label.bytes());
        }
        message.push(0);
        message.extend(kind.to_be_bytes());
        message.extend([0, 1]);
        message
    }

    fn answer_locally(message: &[u8], addresses: &Addresses) -> Option<Vec<u8>> {
        Names { addresses, hosts: &mut Hosts::fixed("") }.answer(message)
    }

    /// The records of an answer from this file: the response code, and the data of each record.
    fn from_file(file: &str, message: &[u8], addresses: &Addresses) -> Option<(u8, Vec<Vec<u8>>)> {
        let answer = Names { addresses, hosts: &mut Hosts::fixed(file) }.answer(message)?;
        let (mut at, mut records) = (message.len(), Vec::new());
        for _ in 0..answer[7] {
            assert_eq!(
                (&answer[at..at + 2], &answer[at + 2..at + 4]),
                (&[0xc0, 12][..], &message[message.len() - 4..][..2])
            );
            let len = usize::from(u16::from_be_bytes([answer[at + 10], answer[at + 11]]));
            records.push(answer[at + 12..at + 12 + len].to_vec());
            at += 12 + len;
        }
        assert_eq!((at, answer.len() <= 512), (answer.len(), true));
        Some((answer[3] & 15, records))
    }

    #[test]
    fn names_in_the_hosts_file_are_answered_from_it_and_others_are_not() {
        let file = "10.0.0.5 Build.example build\nfd00::5 build\n10.0.0.6 build\n";
        let ask = |name, kind| from_file(file, &query(name, kind), &example());
        assert_eq!(ask("BUILD", TYPE_A), Some((0, vec![vec![10, 0, 0, 5], vec![10, 0, 0, 6]])));
        assert_eq!(ask("build", TYPE_AAAA).unwrap().1, [std::net::Ipv6Addr::from(0xfd00_u128 << 112 | 5).octets()]);
        // The name exists, and its other address does not.
        assert_eq!(ask("build.example", TYPE_AAAA), Some((0, vec![])));
        assert_eq!(ask("5.0.0.10.in-addr.arpa", TYPE_PTR), Some((0, vec![b"\x05build\x07example\0".to_vec()])));
        assert_eq!(ask("7.0.0.10.in-addr.arpa", TYPE_PTR), None);
        assert_eq!(ask("other", TYPE_A), None);
        // Mail and service records are a server's.
        assert_eq!(ask("build", 15), None);
    }

    #[test]
    fn a_name_on_the_hosts_loopback_leads_there_and_not_to_the_guests_own() {
        let file = "127.0.0.1 app.test\n::1 app.test\n127.0.1.1 app.test\n";
        let ask = |addresses: &Addresses| from_file(file, &query("app.test", TYPE_A), addresses);
        assert_eq!(ask(&example()), Some((0, vec![example().host.octets().to_vec()])));
        assert_eq!(ask(&Addresses { host_loopback: false, ..example() }), None);
    }

    #[test]
    fn the_longest_answer_fits_into_a_datagram_of_512_bytes() {
        let name = [&"a".repeat(63); 3].map(String::as_str).join(".") + "." + &"b".repeat(61);
        let lines: Vec<_> = (0..20).map(|number| format!("fd00::{number} {name}\n10.0.0.{number} {name}")).collect();
        let file = lines.join("\n");
        assert_eq!(from_file(&file, &query(&name, TYPE_AAAA), &example()).unwrap().1.len(), 8);
        let (_, names) = from_file(&file, &query("1.0.0.10.in-addr.arpa", TYPE_PTR), &example()).unwrap();
        assert_eq!(names[0].len(), 255);
    }

    #[test]
    fn the_hosts_names_are_answered_in_any_case_and_only_with_ipv4() {
        for (name, address) in
            [("host.docker.internal", example().host), ("Gateway.Docker.INTERNAL", example().gateway)]
        {
            let answer = answer_locally(&query(name, TYPE_A), &example()).unwrap();
            assert_eq!((&answer[..4], &answer[4..8]), (&[0xab, 0xcd, 0x81, 0x80][..], &[0, 1, 0, 1][..]));
            assert_eq!(answer[answer.len() - 4..], address.octets());
            let none = answer_locally(&query(name, 28), &example()).unwrap();
            assert_eq!((none[3], none[7], none.len()), (0x80, 0, query(name, 28).len()));
        }
        assert_eq!(answer_locally(&query("docker.internal", TYPE_A), &example()), None);
    }

    #[test]
    fn a_question_goes_to_the_hosts_server_and_its_answer_comes_back() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut dns = Dns { resolver: Resolver::fixed(vec![server.local_addr().unwrap()]), ..Dns::default() };
        let epoll = Epoll::new().unwrap();
        let key = Key { guest: "192.168.65.3:999".parse().unwrap(), peer: "192.168.65.1:53".parse().unwrap() };
        let mut out = Vec::new();
        dns.receive_query(&epoll, &example(), key, &query("example.org", TYPE_A), &mut out);
        let mut buffer = [0; 512];
        let (len, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..len], query("example.org", TYPE_A));
        server.send_to(&[&[0xff, 0xff], &buffer[2..len]].concat(), from).unwrap();
        server.send_to(&[&buffer[..len], b"!"].concat(), from).unwrap();
        dns.receive_answer(&epoll, 0, &mut out);
        assert!(out.is_empty(), "an answer to another question");
        dns.receive_answer(&epoll, 0, &mut out);
        assert_eq!(out, [ip::udp(key.peer, key.guest, &[&buffer[..len], b"!"].concat())]);
        assert!(dns.deadline().is_none());
    }

    #[test]
    fn a_silent_server_is_followed_by_the_next_and_then_by_a_failure() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let second = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut dns = Dns {
            resolver: Resolver::fixed(vec![silent.local_addr().unwrap(), second.local_addr().unwrap()]),
            ..Dns::default()
        };
        let epoll = Epoll::new().unwrap();
        let key = Key { guest: "192.168.65.3:999".parse().unwrap(), peer: "192.168.65.1:53".parse().unwrap() };
        let mut out = Vec::new();
        dns.receive_query(&epoll, &example(), key, &query("example.org", TYPE_A), &mut out);
        let mut now = Instant::now();
        for _ in 0..4 {
            assert!(out.is_empty());
            now += SERVER_TIMEOUT * 2;
            dns.expire(&epoll, now, &mut out);
        }
        assert!(second.recv(&mut [0; 512]).is_ok());
        let mut failed = query("example.org", TYPE_A);
        failed[2..4].copy_from_slice(&[0x81, 0x82]);
        assert_eq!(out, [ip::udp(key.peer, key.guest, &failed)]);
    }

    #[test]
    fn queries_over_tcp_are_answered_here_up_to_the_first_foreign_one() {
        let framed = |name| {
            let message = query(name, TYPE_A);
            [(message.len() as u16).to_be_bytes().to_vec(), message].concat()
        };
        let stream =
            [framed("host.docker.internal"), framed("example.org"), framed("gateway.docker.internal")].concat();
        let (mut queries, addresses, mut hosts) = (QueryStream::default(), example(), Hosts::fixed(""));
        let mut names = Names { addresses: &addresses, hosts: &mut hosts };
        let mut answered = 0;
        for byte in &stream[..stream.len() - 30] {
            queries.push(&[*byte]);
            match queries.next(&mut names) {
                Next::Answer(bytes) => {
                    assert_eq!(usize::from(bytes[1]), bytes.len() - 2);
                    assert_eq!(bytes[bytes.len() - 4..], example().host.octets());
                    answered += 1;
                }
                Next::Wait => {}
                Next::Forward => break,
            }
        }
        assert_eq!((answered, queries.into_bytes()), (1, framed("example.org")));
    }

    #[test]
    fn the_hosts_names_do_not_exist_where_its_services_are_closed() {
        let closed = Addresses { host_loopback: false, ..example() };
        let answer = answer_locally(&query("host.docker.internal", TYPE_A), &closed).unwrap();
        assert_eq!((answer[3] & 15, answer[7]), (NXDOMAIN, 0));
    }

    proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), plausible in any::<bool>()) {
            let mut bytes = bytes;
            if plausible && bytes.len() > 12 {
                bytes[2..6].copy_from_slice(&[1, 0, 0, 1]);
            }
            let _ = answer_locally(&bytes, &example());
            let (mut queries, addresses, mut hosts) = (QueryStream::default(), example(), Hosts::fixed("10.0.0.1 a"));
            let mut names = Names { addresses: &addresses, hosts: &mut hosts };
            queries.push(&bytes);
            while let Next::Answer(_) = queries.next(&mut names) {}
            prop_assert!(queries.into_bytes().len() <= bytes.len());
            prop_assert!(failure(&bytes).len() >= 12);
        }
    }
}
