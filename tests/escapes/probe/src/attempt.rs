//! An attempt: run in a process of its own, so that it can end as badly as it likes.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd},
};

use crate::sys;

/// The reason that an attempt did not succeed.
#[derive(Debug)]
pub(crate) enum Blocked {
    /// Something said no.
    Refused(String),
    /// Its target does not exist.
    Absent(String),
}

impl Blocked {
    /// From the kernel's answer to `what`.
    pub(crate) fn at(what: &str, error: &io::Error) -> Self {
        let text = format!("{what}: {error}");
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::ENOENT | libc::ENODEV | libc::ENXIO | libc::EAFNOSUPPORT) => Self::Absent(text),
            _ => Self::Refused(text),
        }
    }
}

impl fmt::Display for Blocked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Refused(text) | Self::Absent(text)) = self;
        f.write_str(text)
    }
}

/// The target that was reached, or the reason that it was not.
pub(crate) type Outcome = Result<String, Blocked>;

/// Names the purpose of a call that failed.
pub(crate) trait At<T> {
    /// See [`Blocked::at`].
    fn at(self, what: &str) -> Result<T, Blocked>;
}

impl<T> At<T> for io::Result<T> {
    fn at(self, what: &str) -> Result<T, Blocked> {
        self.map_err(|error| Blocked::at(what, &error))
    }
}

/// A name and what it does.
pub(crate) type Named = (&'static str, fn() -> Outcome);

/// Tries several ways; the first that succeeds counts.
pub(crate) fn any(ways: impl IntoIterator<Item = Outcome>) -> Outcome {
    let mut reasons = Vec::new();
    let mut refused = false;
    for way in ways {
        match way {
            Ok(done) => return Ok(done),
            Err(blocked) => {
                refused |= matches!(blocked, Blocked::Refused(_));
                reasons.push(blocked.to_string());
            }
        }
    }
    let text = if reasons.is_empty() { "nothing to try".to_owned() } else { reasons.join("; ") };
    Err(if refused { Blocked::Refused(text) } else { Blocked::Absent(text) })
}

/// Seconds that an attempt may take.
const LIMIT: u32 = 60;

/// Runs an attempt and prints one line: name, `open`, `refused` or `absent`, and the detail.
pub(crate) fn report(name: &str, attempt: impl FnOnce() -> Outcome) {
    let (word, detail) = match in_child(attempt) {
        Ok(text) => text.split_once('\t').map_or(("absent".to_owned(), text.clone()), |(a, b)| (a.into(), b.into())),
        Err(error) => ("absent".to_owned(), format!("could not be tried: {error}")),
    };
    let detail: String = detail.chars().map(|c| if c.is_control() { ' ' } else { c }).take(300).collect();
    println!("{name}\t{word}\t{detail}");
}

fn in_child(attempt: impl FnOnce() -> Outcome) -> io::Result<String> {
    let mut pipe = [0_i32; 2];
    sys::call(libc::SYS_pipe2, &[&pipe.as_mut_ptr(), &libc::O_CLOEXEC])?;
    // SAFETY: pipe2 just made both descriptors.
    let [mut reader, writer] = pipe.map(|fd| unsafe { File::from_raw_fd(fd) });
    // SAFETY: this process has one thread, so the child may go on as it is.
    let child = unsafe { libc::fork() };
    if child < 0 {
        return Err(io::Error::last_os_error());
    }
    if child == 0 {
        drop(reader);
        // SAFETY: takes an integer; the signal ends an attempt that hangs.
        unsafe { libc::alarm(LIMIT) };
        let text = match attempt() {
            Ok(detail) => format!("open\t{detail}"),
            Err(Blocked::Refused(why)) => format!("refused\t{why}"),
            Err(Blocked::Absent(why)) => format!("absent\t{why}"),
        };
        let text: String = text.chars().take(1000).collect();
        // An attempt may have closed it.
        let _ = (&writer).write_all(text.as_bytes());
        // SAFETY: ends the child without the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    drop(writer);
    let status = wait(child);
    // A grandchild that lives on keeps the pipe open: what is in it by now is all.
    // SAFETY: sets a flag of a descriptor of our own.
    unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) };
    let mut bytes = Vec::new();
    let _ = reader.read_to_end(&mut bytes);
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(if text.is_empty() { format!("absent\t{status}") } else { text })
}

/// Waits for a child and says how it ended.
pub(crate) fn wait(child: i32) -> String {
    let mut status = 0;
    // SAFETY: waits for a child of ours and writes to a live integer.
    unsafe { libc::waitpid(child, &raw mut status, 0) };
    if libc::WIFSIGNALED(status) {
        format!("ended by signal {}", libc::WTERMSIG(status))
    } else {
        format!("ended with status {}", libc::WEXITSTATUS(status))
    }
}
