//! The proof that the engine answers: one `GET /_ping` on the way that clients take, through the gate.

use std::{io::Write, os::unix::net::UnixStream, sync::mpsc::Sender, time::Duration};

use bulkhead_guest_common::bounded;

use crate::{
    error::Error,
    event::{Event, spawn},
};

/// The gate's socket for processes of the guest itself.
pub(crate) const GATE: &str = "/run/bulkhead/gate.sock";

const PATIENCE: Duration = Duration::from_secs(60);

/// Judges the start of an HTTP answer.
fn judge(answer: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(answer);
    let status = text.lines().next().unwrap_or("");
    match status.split(' ').nth(1) {
        Some("200") => Ok(()),
        Some(_) => {
            let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body.trim());
            Err(format!("the engine answers a ping with {status:?} {body}"))
        }
        None => Err("the gate closed the connection of a ping".to_owned()),
    }
}

fn ping() -> Result<(), String> {
    let exchange = || -> std::io::Result<Vec<u8>> {
        let mut stream = UnixStream::connect(GATE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")?;
        bounded::read(stream, 4096)
    };
    judge(&exchange().map_err(|error| format!("no ping through the gate: {error}"))?)
}

/// Pings once, on a thread of its own.
pub(crate) fn send(events: Sender<Event>) -> Result<(), Error> {
    spawn("ping", move || {
        let _ = events.send(Event::Ping(ping()));
    })
}

#[cfg(test)]
mod tests {
    use super::judge;

    #[test]
    fn only_a_status_of_200_is_an_engine() {
        assert_eq!(judge(b"HTTP/1.1 200 OK\r\n\r\nOK"), Ok(()));
        let refused = judge(b"HTTP/1.1 503 Service Unavailable\r\n\r\n{\"message\":\"starting\"}").unwrap_err();
        assert!(refused.contains("503") && refused.contains("starting"), "{refused}");
        assert!(judge(b"").is_err());
        assert!(judge(b"garbage").is_err());
    }
}
