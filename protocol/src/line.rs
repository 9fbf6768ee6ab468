//! Bounded framing: one JSON object a line.

use std::io::{self, BufRead, BufReader, Read};

use serde::{Serialize, de::DeserializeOwned};

use crate::MAX_LINE;

/// An error of reading or writing a line.
#[derive(Debug, thiserror::Error)]
pub enum LineError {
    /// The stream failed, or ended within a line.
    #[error("the stream failed")]
    Io(#[from] io::Error),
    /// The line is longer than [`MAX_LINE`] bytes.
    #[error("a message is longer than {MAX_LINE} bytes")]
    TooLong,
    /// The line is not the JSON of a message. It has been read whole, so the next line can be read.
    #[error("invalid message")]
    Syntax(#[from] serde_json::Error),
}

/// Encodes a message as one line, line feed included.
///
/// # Errors
/// If the line would be longer than [`MAX_LINE`] bytes.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, LineError> {
    // Compact JSON escapes line feeds in strings, so the only one is the last byte.
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    if line.len() > MAX_LINE {
        return Err(LineError::TooLong);
    }
    Ok(line)
}

/// Reads messages from a blocking stream. It never holds more than [`MAX_LINE`] bytes of an unfinished one.
#[derive(Debug)]
pub struct LineReader<R> {
    inner: BufReader<R>,
}

impl<R: Read> LineReader<R> {
    /// Reads from `stream`.
    pub fn new(stream: R) -> Self {
        Self { inner: BufReader::new(stream) }
    }

    /// Returns the next message, or `None` at an end of the stream between two messages.
    ///
    /// # Errors
    /// After [`LineError::Syntax`] reading can go on; every other error is final.
    pub fn read<T: DeserializeOwned>(&mut self) -> Result<Option<T>, LineError> {
        let mut line = Vec::new();
        // A peer can send without a line feed forever: `take` ends the read, and so bounds the line, before it is
        // parsed. One byte more than allowed, to tell a line of the maximum length from a longer one.
        let read = (&mut self.inner).take(MAX_LINE as u64 + 1).read_until(b'\n', &mut line)?;
        if read == 0 {
            return Ok(None);
        }
        if line.len() > MAX_LINE {
            return Err(LineError::TooLong);
        }
        // The stream ended within a line: what is there may be half a message, so it is not parsed.
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
