//! Bounded framing: one JSON object a line.

use std::io::{self, BufRead, BufReader, Read};

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_LINE;

/// Why a line could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The stream failed.
    #[error("the stream failed")]
    Io(#[from] io::Error),
    /// The peer sent more than [`MAX_LINE`] bytes without a line feed.
    #[error("a line is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The line is not the expected JSON.
    #[error("a line is not a message")]
    Syntax(#[from] serde_json::Error),
}

/// Encodes a message as one line, terminator included.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, LineError> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(LineError::TooLong);
    }
    Ok(line)
}

/// Reads messages and never holds more than [`MAX_LINE`] bytes of an unfinished one.
#[derive(Debug)]
pub struct LineReader<R> {
    inner: BufReader<R>,
}

impl<R: Read> LineReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self { inner: BufReader::new(stream) }
    }

    /// The next message, or `None` at a clean end between two messages.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LineError> {
        let mut line = Vec::new();
        let read = (&mut self.inner).take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        if line.len() > MAX_LINE {
            return Err(LineError::TooLong);
        }
        if line.last() != Some(&b'\n') {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{GuestMessage, Stage};

    #[test]
    fn what_is_encoded_reads_back() {
        let message = GuestMessage::Reached { stage: Stage::Disk, uptime_us: 7 };
        let line = encode(&message).unwrap();
        let mut reader = LineReader::new(&line[..]);
        assert_eq!(reader.read::<GuestMessage>().unwrap(), Some(message));
        assert!(reader.read::<GuestMessage>().unwrap().is_none());
    }

    #[test]
    fn an_endless_line_is_refused_and_not_held() {
        let mut reader = LineReader::new(io::repeat(b'x'));
        assert!(matches!(reader.read::<GuestMessage>(), Err(LineError::TooLong)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let mut reader = LineReader::new(&bytes[..]);
            while let Ok(Some(_)) = reader.read::<GuestMessage>() {}
        }
    }
}
