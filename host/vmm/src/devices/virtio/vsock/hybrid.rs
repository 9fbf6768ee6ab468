//! The line protocol of the hybrid socket. A client that sends `CONNECT <port>\n` receives `OK <host port>\n` once the
//! guest has accepted; one that sends `LISTEN <port>\n` receives `OK <guest port>\n` once the guest has connected.

/// Maximum length of a line in bytes, with its terminator. The longest useful one has 19.
pub(super) const MAX_LINE: usize = 32;

/// The state of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// No line feed yet.
    Partial,
    /// The line is complete.
    Complete(Request),
    /// The line is too long or not a request.
    Invalid,
}

/// A client's request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// To connect to a port of the guest.
    Connect { port: u32 },
    /// To be connected to by the guest, at a port of the host.
    Listen { port: u32 },
}

/// Collects a request that may arrive in pieces, at most [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
pub(super) struct RequestParser {
    line: [u8; MAX_LINE],
    len: usize,
}

impl RequestParser {
    /// Consumes bytes up to and including the first line feed, and returns their number and the state of the line.
    /// Bytes behind the line feed belong to the stream and are not consumed.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> (usize, Progress) {
        for (index, &byte) in bytes.iter().enumerate() {
            if byte == b'\n' {
                let progress = match parse(&self.line[..self.len]) {
                    Some(request) => Progress::Complete(request),
                    None => Progress::Invalid,
                };
                return (index + 1, progress);
            }
            // No room for this byte and a terminator: a client that never ends its line is turned away early.
            if self.len == MAX_LINE - 1 {
                return (index + 1, Progress::Invalid);
            }
            self.line[self.len] = byte;
            self.len += 1;
        }
        (bytes.len(), Progress::Partial)
    }
}

/// Parses a request without its line feed. A carriage return before that and the command's case are ignored.
fn parse(line: &[u8]) -> Option<Request> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    // `parse` would also accept a sign.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    let port = port.parse().ok().filter(|_| digits && words.next().is_none())?;
    match command.to_ascii_lowercase().as_str() {
        "connect" => Some(Request::Connect { port }),
        "listen" => Some(Request::Listen { port }),
        _ => None,
    }
}

/// Returns the line that the client receives once there is a connection, with the port that it did not name.
pub(super) fn answer(port: u32) -> Vec<u8> {
    format!("OK {port}\n").into_bytes()
}
