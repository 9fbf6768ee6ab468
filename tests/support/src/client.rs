//! HTTP over a Unix socket by hand, with nothing between the test and the bytes.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

/// Time for one answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// A connection whose reads and writes end.
pub fn connect(socket: &Path) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    Ok(stream)
}

/// Writes a request without a body.
pub fn request(stream: &mut impl Write, method: &str, path: &str) -> io::Result<()> {
    // With HTTP/1.0 the server closes after the answer, so its end is the stream's and nothing is chunked.
    stream.write_all(format!("{method} {path} HTTP/1.0\r\nHost: bulkhead\r\n\r\n").as_bytes())
}

/// Reads an answer until the server closes: status and body.
pub fn answer(stream: &mut impl Read) -> io::Result<(u16, String)> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let bad = || io::Error::new(io::ErrorKind::InvalidData, format!("no HTTP answer: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(bad)?;
    Ok((status, body.to_owned()))
}

/// One request and its answer.
pub fn ask(socket: &Path, method: &str, path: &str) -> io::Result<(u16, String)> {
    let mut stream = connect(socket)?;
    request(&mut stream, method, path)?;
    answer(&mut stream)
}

/// The stream of a backend's states.
pub struct Events {
    lines: mpsc::Receiver<Value>,
}

impl Events {
    /// Follows the backend behind a control socket.
    pub fn follow(control: &Path) -> Self {
        let mut stream = UnixStream::connect(control).unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nHost: bulkhead\r\n\r\n").unwrap();
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            // The sizes of the chunks are lines as well, but not JSON objects.
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if line.starts_with('{') && sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { lines }
    }

    /// The next status for which `wanted` holds; those before it are dropped.
    #[track_caller]
    pub fn until(&self, what: &str, limit: Duration, wanted: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + limit;
        let mut last = Value::Null;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(status) if wanted(&status) => return status,
                Ok(status) => last = status,
                Err(error) => panic!("{what}: {error}; the last status was {last}"),
            }
        }
    }

    /// Waits for the end of the stream, which ends with the backend.
    #[track_caller]
    pub fn end(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("the backend did not end within {limit:?}"),
            }
        }
    }
}
