//! The line protocol of the hybrid socket: the client sends `CONNECT <port>\n` and receives `OK <host port>\n`.

/// Maximum length of a line in bytes, with its terminator. The longest useful one has 19.
pub(super) const MAX_LINE: usize = 32;

/// The state of a line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// No line feed yet.
    Partial,
    /// The line is complete and names a port of the guest.
    Connect { port: u32 },
    /// The line is too long or not a request.
    Invalid,
}

/// Collects a request that may arrive in pieces, at most [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
pub(super) struct ConnectParser {
    line: [u8; MAX_LINE],
    len: usize,
}

impl ConnectParser {
    /// Consumes bytes up to and including the first line feed, and returns their number and the state of the line.
    /// Bytes behind the line feed belong to the stream and are not consumed.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> (usize, Progress) {
        for (index, &byte) in bytes.iter().enumerate() {
            if byte == b'\n' {
                let progress = match parse(&self.line[..self.len]) {
                    Some(port) => Progress::Connect { port },
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

/// Returns the port of a request without its line feed. A carriage return before that and the command's case are
/// ignored.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    // `parse` would also accept a sign.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (words.next().is_none() && command.eq_ignore_ascii_case("connect") && digits).then(|| port.parse().ok())?
}

/// Returns the line that the client receives once the guest has accepted the connection.
pub(super) fn answer(host_port: u32) -> Vec<u8> {
    format!("OK {host_port}\n").into_bytes()
}
