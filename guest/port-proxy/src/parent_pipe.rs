//! The pipe on which dockerd waits for the result: `0` and a line feed, or `1`, a line feed and the reason.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{FromRawFd, OwnedFd, RawFd},
};

/// The pipe's number, as dockerd passes it (the first of Go's `ExtraFiles`).
const PIPE_FD: RawFd = 3;

/// The writing end. dockerd waits until it is closed.
#[derive(Debug)]
pub(crate) struct ParentPipe {
    pipe: File,
}

impl ParentPipe {
    /// Takes the descriptor over, if it is open. Call this once, before anything else is opened.
    ///
    /// It is absent when a user runs the program by hand.
    pub(crate) fn inherited() -> Option<Self> {
        // SAFETY: F_SETFD passes integers only, and fails when the number is not open.
        if unsafe { libc::fcntl(PIPE_FD, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return None;
        }
        // SAFETY: the descriptor is open, and by the convention with dockerd nobody else's.
        Some(Self { pipe: File::from(unsafe { OwnedFd::from_raw_fd(PIPE_FD) }) })
    }

    /// Writes the result and closes the pipe.
    pub(crate) fn report(mut self, result: &Result<(), String>) -> io::Result<()> {
        self.pipe.write_all(&text(result))
    }
}

fn text(result: &Result<(), String>) -> Vec<u8> {
    match result {
        // dockerd compares the first two bytes, and shows the rest as the error of `docker run`.
        Ok(()) => b"0\n".to_vec(),
        Err(reason) => format!("1\n{reason}").into_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::text;

    #[test]
    fn the_first_two_bytes_are_the_result_and_the_rest_the_reason() {
        assert_eq!(text(&Ok(())), b"0\n");
        assert_eq!(text(&Err("listen tcp4 …".to_owned())), "1\nlisten tcp4 …".as_bytes());
    }
}
