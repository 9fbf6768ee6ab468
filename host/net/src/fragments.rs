//! Reassembles datagrams that a container sends in fragments (RFC 791, 3.2; RFC 8200, 4.5).
//!
//! Only datagrams larger than a container's MTU come in fragments. Memory is bounded by three limits: datagrams under
//! way, fragments of each, and time.

use std::{
    collections::{BTreeMap, VecDeque},
    net::IpAddr,
    time::{Duration, Instant},
};

use smoltcp::wire::{IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, Ipv4Packet, Ipv6Packet};

/// Number of datagrams that wait for fragments; one more takes the oldest one's place.
const MAX_DATAGRAMS: usize = 32;
/// Number of fragments of one datagram.
const MAX_FRAGMENTS: usize = 128;
/// Time that a datagram has for all its fragments (RFC 8200, 4.5; RFC 1122, 3.3.2 allows 60 to 120 s).
const REASSEMBLY_TIMEOUT: Duration = Duration::from_secs(60);
/// Length of IPv6's fragment header.
const FRAGMENT_HEADER: usize = 8;

/// The fields that the fragments of one datagram have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    source: IpAddr,
    destination: IpAddr,
    protocol: IpProtocol,
    identification: u32,
}

#[derive(Debug)]
struct Fragment<'a> {
    key: Key,
    /// Offset of its data in the datagram, in bytes.
    offset: usize,
    more: bool,
    data: &'a [u8],
}

impl<'a> Fragment<'a> {
    /// Reads a fragment; `None` for all other packets.
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => {
                let ip = Ipv4Packet::new_checked(bytes).ok()?;
                let header = usize::from(ip.header_len());
                // Options would have to be kept for the whole datagram, and nobody sends them with one.
                let fragment = header == IPV4_HEADER_LEN && (ip.more_frags() || ip.frag_offset() != 0);
                fragment.then_some(Self {
                    key: Key {
                        source: ip.src_addr().into(),
                        destination: ip.dst_addr().into(),
                        protocol: ip.next_header(),
                        identification: ip.ident().into(),
                    },
                    offset: usize::from(ip.frag_offset()),
                    more: ip.more_frags(),
                    data: bytes.get(header..usize::from(ip.total_len()))?,
                })
            }
            6 => {
                let ip = Ipv6Packet::new_checked(bytes).ok()?;
                let payload = bytes.get(IPV6_HEADER_LEN..ip.total_len())?;
                // The fragment header is only looked for directly behind IPv6's own, where every sender puts it.
                let (header, data) = payload.split_at_checked(FRAGMENT_HEADER)?;
                if ip.next_header() != IpProtocol::Ipv6Frag {
                    return None;
                }
                // Offset in units of 8 bytes, two reserved bits, and the flag "more fragments".
                let place = u16::from_be_bytes([header[2], header[3]]);
                Some(Self {
                    key: Key {
                        source: ip.src_addr().into(),
                        destination: ip.dst_addr().into(),
                        protocol: header[0].into(),
                        identification: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
                    },
                    offset: usize::from(place & !7),
                    more: place & 1 == 1,
                    data,
                })
            }
            _ => None,
        }
    }
}

/// A datagram that is not complete.
struct Assembly {
    key: Key,
    started: Instant,
    /// Data by its offset, without overlaps.
    pieces: BTreeMap<usize, Vec<u8>>,
    /// Length of the datagram, known from its last fragment.
    len: Option<usize>,
}

impl Assembly {
    /// Adds a fragment; false if the datagram has to be discarded.
    fn add(&mut self, fragment: &Fragment<'_>) -> bool {
        // No overflow: an offset has 16 bits, and data fits into a packet.
        let Fragment { offset, more, data, .. } = *fragment;
        let end = offset + data.len();
        let before = self.pieces.range(..=offset).next_back().map_or(0, |(at, piece)| at + piece.len());
        let after = self.pieces.range(offset..).next().map_or(usize::MAX, |(at, _)| *at);
        if self.pieces.get(&offset).is_some_and(|piece| piece == data) {
            // An exact repetition is harmless (RFC 8200, 4.5).
            return true;
        }
        // Overlaps are an attack: what a filter saw in one fragment another one replaces (RFC 5722, RFC 8200, 4.5). So
        // are two different ends, and data beyond an end. All fragments but the last have a multiple of 8 bytes,
        // because offsets count in such units.
        let fits = !data.is_empty()
            && before <= offset
            && end <= after
            && end <= usize::from(u16::MAX) - IPV6_HEADER_LEN
            && self.len.is_none_or(|len| end <= len && more)
            && (!more || data.len() % 8 == 0)
            && self.pieces.len() < MAX_FRAGMENTS;
        if !more {
            self.len = Some(end);
        }
        self.pieces.insert(offset, data.to_vec());
        // An end that comes after data beyond it.
        let last = self.pieces.last_key_value().map_or(0, |(at, piece)| at + piece.len());
        fits && self.len.is_none_or(|len| last <= len)
    }

    /// The payload, if it is complete.
    fn whole(&self) -> Option<Vec<u8>> {
        let len = self.len?;
        // Without overlaps, and with nothing beyond the end, equal lengths mean no holes.
        let there: usize = self.pieces.values().map(Vec::len).sum();
        (there == len).then(|| self.pieces.values().flatten().copied().collect())
    }
}

/// All incomplete datagrams, the oldest first.
#[derive(Default)]
pub(super) struct Fragments(VecDeque<Assembly>);

impl Fragments {
    /// Takes a packet if it is a fragment; returns the reassembled packet if this one was missing last.
    pub(super) fn take(&mut self, bytes: &[u8], now: Instant) -> Option<Vec<u8>> {
        let fragment = Fragment::parse(bytes)?;
        while self.0.front().is_some_and(|first| now.duration_since(first.started) > REASSEMBLY_TIMEOUT) {
            self.0.pop_front();
        }
        // A linear search: the list is short by its bound.
        let place = self.0.iter().position(|one| one.key == fragment.key).unwrap_or_else(|| {
            if self.0.len() >= MAX_DATAGRAMS {
                self.0.pop_front();
            }
            self.0.push_back(Assembly { key: fragment.key, started: now, pieces: BTreeMap::new(), len: None });
            self.0.len() - 1
        });
        let assembly = self.0.get_mut(place)?;
        if !assembly.add(&fragment) {
            // Later fragments of it start another assembly, which never completes and expires.
            self.0.remove(place);
            return None;
        }
        let payload = assembly.whole()?;
        self.0.remove(place);
        packet(&fragment.key, &payload)
    }
}

/// The packet as it was before it was fragmented.
fn packet(key: &Key, payload: &[u8]) -> Option<Vec<u8>> {
    let mut bytes = match (key.source, key.destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            let mut bytes = vec![0; IPV4_HEADER_LEN];
            let mut ip = Ipv4Packet::new_unchecked(&mut bytes);
            ip.set_version(4);
            ip.set_header_len(IPV4_HEADER_LEN as u8);
            ip.set_total_len(u16::try_from(IPV4_HEADER_LEN + payload.len()).ok()?);
            ip.set_hop_limit(64);
            ip.set_next_header(key.protocol);
            ip.set_src_addr(source);
            ip.set_dst_addr(destination);
            bytes
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            let mut bytes = vec![0; IPV6_HEADER_LEN];
            let mut ip = Ipv6Packet::new_unchecked(&mut bytes);
            ip.set_version(6);
            ip.set_payload_len(u16::try_from(payload.len()).ok()?);
            ip.set_hop_limit(64);
            ip.set_next_header(key.protocol);
            ip.set_src_addr(source);
            ip.set_dst_addr(destination);
            bytes
        }
        // `Fragment::parse` takes both addresses from one header.
        _ => return None,
    };
    // IPv4's header checksum stays zero: `Packet::parse` does not look at it.
    bytes.extend(payload);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ip::Packet;

    const PROTOCOL: IpProtocol = IpProtocol::Udp;

    fn fragment(v6: bool, identification: u8, offset: usize, more: bool, data: &[u8]) -> Vec<u8> {
        let key = Key {
            source: if v6 { "fd00::1".parse().unwrap() } else { "10.0.0.1".parse().unwrap() },
            destination: if v6 { "fd00::2".parse().unwrap() } else { "10.0.0.2".parse().unwrap() },
            protocol: if v6 { IpProtocol::Ipv6Frag } else { PROTOCOL },
            identification: 0,
        };
        if v6 {
            let place = (offset as u16 | u16::from(more)).to_be_bytes();
            let header = [PROTOCOL.into(), 0, place[0], place[1], 0, 0, 0, identification];
            packet(&key, &[&header, data].concat()).unwrap()
        } else {
            let mut bytes = packet(&key, data).unwrap();
            bytes[5] = identification;
            bytes[6..8].copy_from_slice(&((offset as u16 / 8) | (u16::from(more) << 13)).to_be_bytes());
            bytes
        }
    }

    fn payload(bytes: Option<Vec<u8>>) -> Option<Vec<u8>> {
        bytes.map(|bytes| Packet::parse(&bytes).unwrap().payload().to_vec())
    }

    #[test]
    fn overlapping_fragments_spoil_the_datagram() {
        let now = Instant::now();
        let mut fragments = Fragments::default();
        assert_eq!(fragments.take(&fragment(false, 1, 0, true, &[1; 16]), now), None);
        assert_eq!(fragments.take(&fragment(false, 1, 8, true, &[2; 16]), now), None);
        assert!(fragments.0.is_empty());
        assert_eq!(fragments.take(&fragment(false, 1, 16, false, &[3; 3]), now), None);
    }

    #[test]
    fn what_waits_is_bounded_in_number_and_in_time() {
        let now = Instant::now();
        let mut fragments = Fragments::default();
        for identification in 0..=255 {
            fragments.take(&fragment(false, identification, 0, true, &[1; 8]), now);
            assert!(fragments.0.len() <= MAX_DATAGRAMS);
        }
        fragments.take(&fragment(true, 0, 0, true, &[1; 8]), now + REASSEMBLY_TIMEOUT * 2);
        assert_eq!(fragments.0.len(), 1);
        for offset in (0..2000).map(|index| index * 16) {
            fragments.take(&fragment(true, 0, offset, true, &[1; 8]), now + REASSEMBLY_TIMEOUT * 2);
            assert!(fragments.0.iter().all(|one| one.pieces.len() <= MAX_FRAGMENTS));
        }
    }

    proptest! {
        #[test]
        fn fragments_in_any_order_are_the_datagram(data in prop::collection::vec(any::<u8>(), 9..5000), cut in 1_usize..200, v6 in any::<bool>(), seed in any::<u64>()) {
            let size = (data.len().div_ceil(cut.min(100))).next_multiple_of(8);
            let mut pieces: Vec<_> = data.chunks(size).enumerate().map(|(index, piece)| {
                fragment(v6, 7, index * size, (index + 1) * size < data.len(), piece)
            }).collect();
            prop_assume!(pieces.len() > 1);
            let (now, mut state) = (Instant::now(), seed);
            for index in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                pieces.swap(index, (state >> 33) as usize % (index + 1));
            }
            let mut fragments = Fragments::default();
            let (last, others) = pieces.split_last().unwrap();
            for piece in others {
                prop_assert_eq!(fragments.take(piece, now), None);
                // A repetition changes nothing.
                prop_assert_eq!(fragments.take(piece, now), None);
            }
            prop_assert_eq!(payload(fragments.take(last, now)), Some(data));
            prop_assert!(fragments.0.is_empty());
        }

        #[test]
        fn no_bytes_make_it_panic(packets in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..100), any::<bool>()), 0..40)) {
            let mut fragments = Fragments::default();
            for (mut bytes, v6) in packets {
                if bytes.len() > 60 {
                    let len = bytes.len() as u16;
                    if v6 {
                        bytes[0] = 0x60;
                        bytes[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                        bytes[6] = 44;
                        bytes[8..44].fill(7);
                    } else {
                        bytes[0] = 0x45;
                        bytes[2..4].copy_from_slice(&len.to_be_bytes());
                        bytes[4..6].fill(1);
                        bytes[8..20].fill(7);
                    }
                }
                if let Some(whole) = fragments.take(&bytes, Instant::now()) {
                    prop_assert!(Packet::parse(&whole).is_some());
                }
            }
        }
    }
}
