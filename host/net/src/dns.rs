//! The guest's name server: answers the two names that only exist here, and passes every other question on to the
//! servers that the host uses at that moment.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use vmm_sys_util::epoll::Epoll;

use super::{
    addresses::Addresses,
    events::{self, Token},
    frame::Frame,
    ip,
    resolver::{self, Resolver},
    socket,
    tcp::Key,
};

/// Most questions that wait for an answer; beyond that the oldest is dropped.
const MOST: usize = 512;
/// How long a server may take before the next one is asked.
const PATIENCE: Duration = Duration::from_secs(3);
/// Rounds through the servers.
const ROUNDS: usize = 2;
/// Longest question that is passed on.
const LONGEST: usize = 4096;

const TYPE_A: u16 = 1;
const CLASS_IN: u16 = 1;
/// Seconds that a local answer may be kept.
const TTL: u32 = 60;

/// Response codes (RFC 1035, 4.1.1).
const SERVFAIL: u8 = 2;
const NXDOMAIN: u8 = 3;

struct Question {
    key: Key,
    message: Vec<u8>,
    attempts: usize,
    socket: UdpSocket,
    deadline: Instant,
}

/// All questions under way.
#[derive(Default)]
pub(super) struct Dns {
    next: u64,
    questions: BTreeMap<u64, Question>,
    resolver: Resolver,
}

impl Dns {
    /// The server to be asked over TCP.
    pub(super) fn server(&mut self) -> SocketAddr {
        self.resolver.servers().first().copied().unwrap_or(resolver::FALLBACK)
    }

    /// A question of the guest.
    pub(super) fn ask(&mut self, epoll: &Epoll, addresses: &Addresses, key: Key, message: &[u8], out: &mut Vec<Frame>) {
        if let Some(answer) = answer_locally(message, addresses) {
            out.push(ip::udp(key.peer, key.guest, &answer));
        } else if (12..=LONGEST).contains(&message.len()) {
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
            // A socket for each question: its port is what a forger has to guess.
            let Ok(socket) = socket::udp(server) else { continue };
            if socket.send(&message).is_err() || events::watch(epoll, &socket, Token::Dns(self.next)).is_err() {
                continue;
            }
            if self.questions.len() >= MOST {
                self.questions.pop_first();
            }
            let deadline = now + PATIENCE;
            self.questions.insert(self.next, Question { key, message, attempts, socket, deadline });
            self.next += 1;
            return;
        }
        out.push(ip::udp(key.peer, key.guest, &failure(&message)));
    }

    /// Something arrived from a server.
    pub(super) fn receive(&mut self, epoll: &Epoll, id: u64, out: &mut Vec<Frame>) {
        let Some(question) = self.questions.get(&id) else { return };
        let mut buffer = [0; LONGEST];
        match question.socket.recv(&mut buffer) {
            Ok(len) if len >= 12 && buffer[..2] == question.message[..2] => {
                out.push(ip::udp(question.key.peer, question.key.guest, &buffer[..len]));
                self.questions.remove(&id);
            }
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            // Nobody listens there.
            Err(_) => self.again(epoll, id, Instant::now(), out),
        }
    }

    fn again(&mut self, epoll: &Epoll, id: u64, now: Instant, out: &mut Vec<Frame>) {
        if let Some(question) = self.questions.remove(&id) {
            self.forward(epoll, (question.key, question.message), question.attempts + 1, now, out);
        }
    }

    /// When the next server is to be asked.
    pub(super) fn deadline(&self) -> Option<Instant> {
        // All have the same patience: the oldest is the first.
        self.questions.first_key_value().map(|(_, question)| question.deadline)
    }

    /// Asks the next server where the last one was silent.
    pub(super) fn sweep(&mut self, epoll: &Epoll, now: Instant, out: &mut Vec<Frame>) {
        while let Some((id, question)) = self.questions.first_key_value()
            && question.deadline <= now
        {
            let id = *id;
            self.again(epoll, id, now, out);
        }
    }
}

/// What is to be done about the first question of a TCP connection to the name server.
pub(super) enum Next {
    /// It has not arrived whole.
    Wait,
    /// Answer with these bytes.
    Answer(Vec<u8>),
    /// The host's server has to answer it, and all that follow.
    Forward,
}

/// Questions that came over TCP, each behind its length (RFC 1035, 4.2.2), and were not answered.
#[derive(Default)]
pub(super) struct Questions(Vec<u8>);

impl Questions {
    /// Bytes that can be taken.
    pub(super) fn room(&self) -> usize {
        2 + LONGEST - self.0.len()
    }

    /// Takes bytes, at most as many as there is room for.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The first question is removed when it is answered.
    pub(super) fn next(&mut self, addresses: &Addresses) -> Next {
        let Some(len) = self.0.get(..2).map(|bytes| usize::from(u16::from_be_bytes([bytes[0], bytes[1]]))) else {
            return Next::Wait;
        };
        if len > LONGEST {
            return Next::Forward;
        }
        let Some(message) = self.0.get(2..2 + len) else { return Next::Wait };
        let Some(answer) = answer_locally(message, addresses) else { return Next::Forward };
        let mut bytes = (answer.len() as u16).to_be_bytes().to_vec();
        bytes.extend(answer);
        self.0.drain(..2 + len);
        Next::Answer(bytes)
    }

    /// Everything that was not answered.
    pub(super) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Name, type and class of a message's only question, and where the question ends (RFC 1035, 4.1).
fn question(message: &[u8]) -> Option<(String, u16, u16, usize)> {
    let header = message.get(..12)?;
    // A query with the standard opcode and one question.
    if header[2] & 0xf8 != 0 || header[4..6] != [0, 1] {
        return None;
    }
    let mut name = String::new();
    let mut at = 12;
    loop {
        let len = usize::from(*message.get(at)?);
        at += 1;
        match len {
            0 => break,
            1..=63 => {
                let label = message.get(at..at + len)?;
                name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
                name.push('.');
                at += len;
            }
            // A question has nothing to point to.
            _ => return None,
        }
        if name.len() > 512 {
            return None;
        }
    }
    let rest = message.get(at..at + 4)?;
    Some((name, u16::from_be_bytes([rest[0], rest[1]]), u16::from_be_bytes([rest[2], rest[3]]), at + 4))
}

/// The answer to a question for a name that only exists here.
fn answer_locally(message: &[u8], addresses: &Addresses) -> Option<Vec<u8>> {
    let (name, kind, class, end) = question(message)?;
    let address: Ipv4Addr = match name.as_str() {
        "host.docker.internal." => addresses.host,
        "gateway.docker.internal." => addresses.gateway,
        _ => return None,
    };
    if !addresses.host_loopback {
        return Some(reply_to(message, end, NXDOMAIN));
    }
    // IPv4 only: what serves on the host's loopback often does not on ::1, and clients try that first.
    let known = kind == TYPE_A && class == CLASS_IN;
    let mut answer = reply_to(message, end, 0);
    // These names have no other records.
    if known {
        answer[7] = 1;
        answer.extend([0xc0, 12]);
        answer.extend(TYPE_A.to_be_bytes());
        answer.extend(CLASS_IN.to_be_bytes());
        answer.extend(TTL.to_be_bytes());
        answer.extend([0, 4]);
        answer.extend(address.octets());
    }
    Some(answer)
}

/// "No server could be asked."
fn failure(message: &[u8]) -> Vec<u8> {
    let end = question(message).map_or(12, |(.., end)| end);
    reply_to(message, end, SERVFAIL)
}

/// The header of a reply, with the question if `end` is behind one.
fn reply_to(message: &[u8], end: usize, code: u8) -> Vec<u8> {
    let mut reply = message.get(..end).unwrap_or_default().to_vec();
    reply.resize(end.max(12), 0);
    // A response; recursion desired is echoed, recursion is available.
    reply[2] = 0x80 | reply[2] & 1;
    reply[3] = 0x80 | code;
    let questions = u8::from(end > 12);
    reply[4..12].copy_from_slice(&[0, questions, 0, 0, 0, 0, 0, 0]);
    reply
}

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod fuzzing {
    use super::{Addresses, answer_locally, failure, question};

    /// Reads a question and makes the answers that are made here.
    pub fn dns_question(message: &[u8], addresses: &Addresses) {
        let known = question(message);
        for answer in answer_locally(message, addresses).into_iter().chain([failure(message)]) {
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
        dns.ask(&epoll, &example(), key, &query("example.org", TYPE_A), &mut out);
        let mut buffer = [0; 512];
        let (len, from) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..len], query("example.org", TYPE_A));
        server.send_to(&[&[0xff, 0xff], &buffer[2..len]].concat(), from).unwrap();
        server.send_to(&[&buffer[..len], b"!"].concat(), from).unwrap();
        dns.receive(&epoll, 0, &mut out);
        assert!(out.is_empty(), "an answer to another question");
        dns.receive(&epoll, 0, &mut out);
        assert_eq!(out, [ip::udp(key.peer, key.guest, &[&buffer[..len], b"!"].concat())]);
        assert!(dns.deadline().is_none());
    }

    #[test]
    fn a_silent_server_is_followed_by_the_next_and_in_the_end_by_a_failure() {
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let second = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut dns = Dns {
            resolver: Resolver::fixed(vec![silent.local_addr().unwrap(), second.local_addr().unwrap()]),
            ..Dns::default()
        };
        let epoll = Epoll::new().unwrap();
        let key = Key { guest: "192.168.65.3:999".parse().unwrap(), peer: "192.168.65.1:53".parse().unwrap() };
        let mut out = Vec::new();
        dns.ask(&epoll, &example(), key, &query("example.org", TYPE_A), &mut out);
        let mut now = Instant::now();
        for _ in 0..4 {
            assert!(out.is_empty());
            now += PATIENCE * 2;
            dns.sweep(&epoll, now, &mut out);
        }
        assert!(second.recv(&mut [0; 512]).is_ok());
        let mut failed = query("example.org", TYPE_A);
        failed[2..4].copy_from_slice(&[0x81, 0x82]);
        assert_eq!(out, [ip::udp(key.peer, key.guest, &failed)]);
    }

    #[test]
    fn questions_over_tcp_are_answered_in_turn_and_the_first_foreign_one_goes_on_with_all_others() {
        let framed = |name| {
            let message = query(name, TYPE_A);
            [(message.len() as u16).to_be_bytes().to_vec(), message].concat()
        };
        let stream =
            [framed("host.docker.internal"), framed("example.org"), framed("gateway.docker.internal")].concat();
        let mut questions = Questions::default();
        let mut answered = 0;
        for byte in &stream[..stream.len() - 30] {
            questions.take(&[*byte]);
            match questions.next(&example()) {
                Next::Answer(bytes) => {
                    assert_eq!(usize::from(bytes[1]), bytes.len() - 2);
                    assert_eq!(bytes[bytes.len() - 4..], example().host.octets());
                    answered += 1;
                }
                Next::Wait => {}
                Next::Forward => break,
            }
        }
        assert_eq!((answered, questions.into_bytes()), (1, framed("example.org")));
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
            let mut questions = Questions::default();
            questions.take(&bytes);
            while let Next::Answer(_) = questions.next(&example()) {}
            prop_assert!(questions.into_bytes().len() <= bytes.len());
            prop_assert!(failure(&bytes).len() >= 12);
        }
    }
}
