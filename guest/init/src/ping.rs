//! One `GET /_ping` of the Docker API on the clients' own way, through the gate: the proof that the engine answers.

use std::{io::Write, os::unix::net::UnixStream, sync::mpsc::Sender, time::Duration};

use bulkhead_guest_common::bounded;

use crate::{
    error::Error,
    event::{Event, spawn},
};

/// The gate's socket for processes of the guest itself.
pub(crate) const GATE: &str = "/run/bulkhead/gate.sock";

/// Timeout of each read and write; generous, because tests run the guest under emulation.
const PING_TIMEOUT: Duration = Duration::from_secs(60);

/// Checks the start of an HTTP response.
fn check_response(answer: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(answer);
    // The status line is `HTTP/1.1 200 OK`.
    let status = text.lines().next().unwrap_or("");
    match status.split(' ').nth(1) {
        Some("200") => Ok(()),
        Some(_) => {
            let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim());
            Err(format!("the engine answered a ping with {status:?} {body}"))
        }
        None => Err("the gate closed the connection without answering a ping".to_owned()),
    }
}

fn ping() -> Result<(), String> {
    let exchange = || -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(GATE)?;
        stream.set_read_timeout(Some(PING_TIMEOUT))?;
        stream.set_write_timeout(Some(PING_TIMEOUT))?;
        stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")?;
        // `Connection: close` makes the end of the stream the end of the response.
        bounded::read(stream, 4096)
    };
    check_response(&exchange().map_err(|error| format!("cannot ping the engine through the gate: {error}"))?)
}

/// Pings once, on a thread of its own that ends with [`Event::Pinged`].
pub(crate) fn start(events: Sender<Event>) -> Result<(), Error> {
    spawn("ping", move || {
        let _ = events.send(Event::Pinged(ping()));
    })
}

#[cfg(test)]
mod tests {
    use super::check_response;

    #[test]
    fn only_a_status_of_200_is_an_engine() {
        assert_eq!(check_response(b"HTTP/1.1 200 OK\r\n\r\nOK"), Ok(()));
        let refused =
            check_response(b"HTTP/1.1 503 Service Unavailable\r\n\r\n{\"message\":\"starting\"}").unwrap_err();
        assert!(refused.contains("503") && refused.contains("starting"), "{refused}");
        assert!(check_response(b"").is_err());
        assert!(check_response(b"garbage").is_err());
    }
}
