//! The pipe on which dockerd waits for the outcome: `0` and a line feed, or `1`, a line feed and the reason.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// The pipe's number, by convention with dockerd.
const FD: RawFd = 3;

/// The writing end; dockerd waits until it is closed.
#[derive(Debug)]
pub(crate) struct Parent {
    pipe: File,
}

impl Parent {
    /// Takes the descriptor, if it is open. To be called once, before anything else is opened.
    pub(crate) fn inherited() -> Option<Self> {
        // SAFETY: F_SETFD passes integers only, and fails when the number is not open.
        if unsafe { libc::fcntl(FD, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return None;
        }
        // SAFETY: the descriptor is open, and by the convention with dockerd nobody else's.
        Some(Self { pipe: File::from(unsafe { OwnedFd::from_raw_fd(FD) }) })
    }

    /// Tells the outcome and closes the pipe.
    pub(crate) fn tell(mut self, outcome: &Result<(), String>) -> io::Result<()> {
        self.pipe.write_all(&text(outcome))
    }
}

fn text(outcome: &Result<(), String>) -> Vec<u8> {
    match outcome {
        Ok(()) => b"0\n".to_vec(),
        Err(reason) => format!("1\n{reason}").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn the_first_two_bytes_are_the_outcome_and_the_rest_the_reason() {
        assert_eq!(text(&Ok(())), b"0\n");
        assert_eq!(text(&Err("listen tcp4 …".to_owned())), "1\nlisten tcp4 …".as_bytes());
    }
}
