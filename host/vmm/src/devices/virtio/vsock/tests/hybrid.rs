//! The line protocol.

use proptest::prelude::*;

use crate::devices::virtio::vsock::hybrid::{MAX_LINE, Progress, Request, RequestParser, answer};

fn whole(line: &[u8]) -> Progress {
    RequestParser::default().feed(line).1
}

#[test]
fn a_request_names_the_port() {
    assert_eq!(whole(b"CONNECT 1024\n"), Progress::Complete(Request::Connect { port: 1024 }));
    assert_eq!(whole(b"connect 4294967295\r\n"), Progress::Complete(Request::Connect { port: u32::MAX }));
    assert_eq!(whole(b"LISTEN 1024\n"), Progress::Complete(Request::Listen { port: 1024 }));
    assert_eq!(whole(b"Listen 1024\r\n"), Progress::Complete(Request::Listen { port: 1024 }));
}

#[test]
fn other_lines_are_invalid() {
    for line in [
        &b"\n"[..],
        b"CONNECT\n",
        b"CONNECT \n",
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT +1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 1 2\n",
        b"LISTEN\n",
        b"LISTEN +1\n",
        b"LISTEN 1 2\n",
        b"LISTENCONNECT 1\n",
        b"CONNECT\xff 1\n",
        b"GET / HTTP/1.1\r\n",
    ] {
        assert_eq!(whole(line), Progress::Invalid, "{line:?}");
    }
}

#[test]
fn a_line_without_end_is_refused_and_not_held() {
    let mut parser = RequestParser::default();
    assert_eq!(parser.feed(&[b' '; MAX_LINE - 1]), (MAX_LINE - 1, Progress::Partial));
    assert_eq!(parser.feed(b" "), (1, Progress::Invalid));
}

#[test]
fn the_answer_is_the_one_that_clients_of_other_monitors_expect() {
    assert_eq!(answer(1_073_741_824), b"OK 1073741824\n");
}

proptest! {
    #[test]
    fn a_request_in_any_pieces_is_understood_and_nothing_behind_it_is_taken(
        listens: bool,
        port in any::<u32>(),
        tail in prop::collection::vec(any::<u8>(), 0..64),
        pieces in prop::collection::vec(1_usize..9, 64),
    ) {
        let (word, request) =
            if listens { ("LISTEN", Request::Listen { port }) } else { ("CONNECT", Request::Connect { port }) };
        let line = format!("{word} {port}\n").into_bytes();
        let mut input = line.clone();
        input.extend(&tail);
        let mut parser = RequestParser::default();
        let mut at = 0;
        for piece in pieces {
            let (used, progress) = parser.feed(&input[at..input.len().min(at + piece)]);
            at += used;
            if progress != Progress::Partial {
                prop_assert_eq!(progress, Progress::Complete(request));
                break;
            }
        }
        prop_assert_eq!(at, line.len());
    }

    #[test]
    fn no_bytes_make_the_parser_panic_or_take_more_than_a_line(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        let (used, progress) = RequestParser::default().feed(&bytes);
        prop_assert!(used <= bytes.len() && used <= MAX_LINE);
        prop_assert!(progress != Progress::Partial || used == bytes.len());
    }
}
