//! The host side's line protocol: `CONNECT <port>\n` in, `OK <host port>\n` out.

/// Longest line accepted, terminator included; the longest meaningful one has 19 bytes.
pub(super) const MAX_LINE: usize = 32;

/// How far a line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// No line feed yet.
    Partial,
    /// The client wants this port of the guest.
    Connect {
        /// Guest port.
        port: u32,
    },
    /// Too long, or not a request.
    Invalid,
}

/// Collects a request that arrives in pieces, and never holds more than [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
pub(super) struct ConnectParser {
    line: [u8; MAX_LINE],
    len: usize,
}

impl ConnectParser {
    /// Takes bytes up to and including the first line feed; returns how many, and what came of it. Bytes behind the
    /// line feed belong to the stream and stay the caller's.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> (usize, Progress) {
        for (index, &byte) in bytes.iter().enumerate() {
            if byte == b'\n' {
                let progress = match parse(&self.line[..self.len]) {
                    Some(port) => Progress::Connect { port },
                    None => Progress::Invalid,
                };
                return (index + 1, progress);
            }
            if self.len == MAX_LINE - 1 {
                return (index + 1, Progress::Invalid);
            }
            self.line[self.len] = byte;
            self.len += 1;
        }
        (bytes.len(), Progress::Partial)
    }
}

/// The port of a request without its line feed; a carriage return before it and the command's case do not matter.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (command, port) = (words.next()?, words.next()?);
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    (words.next().is_none() && command.eq_ignore_ascii_case("connect") && digits).then(|| port.parse().ok())?
}

/// The answer once the guest accepted.
pub(super) fn answer(host_port: u32) -> Vec<u8> {
    format!("OK {host_port}\n").into_bytes()
}
