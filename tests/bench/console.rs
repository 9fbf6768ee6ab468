//! Reads the guest's console and takes the time when init says that it runs.

use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::Sender,
    },
    thread::{self, JoinHandle},
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};

use crate::{
    Result,
    process::{self, Exits},
    round::Happening,
};

/// init's first line.
const MARKER: &[u8] = b"bulkhead-init: started";
/// Time until the thread notices that it must end, in milliseconds; output of the console wakes it at once.
const STOP_INTERVAL_MS: u16 = 200;
/// Bytes kept to explain a run that failed.
const MAX_TAIL: usize = 2000;

/// The console's FIFO, open at both ends so that neither side waits for the other.
pub struct Console {
    fifo: File,
}

/// The thread that reads the console; ended when dropped.
pub struct Reader {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Console {
    /// Makes the FIFO.
    pub fn make(path: &Path) -> Result<Self> {
        mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        Ok(Self { fifo: OpenOptions::new().read(true).write(true).open(path)? })
    }

    /// Reads from now on and reports init's start, with the exits that process `pid` had had by then.
    pub fn watch(self, pid: u32, happenings: Sender<Happening>) -> Reader {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = thread::spawn(move || follow(self.fifo, pid, &seen, &happenings));
        Reader { stop, thread: Some(thread) }
    }
}

fn follow(mut fifo: File, pid: u32, stop: &AtomicBool, happenings: &Sender<Happening>) {
    let mut text = Vec::new();
    let mut piece = [0; 4096];
    let mut found = false;
    while !stop.load(Ordering::Relaxed) {
        match poll(&mut [PollFd::new(fifo.as_fd(), PollFlags::POLLIN)], PollTimeout::from(STOP_INTERVAL_MS)) {
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(_) => return,
        }
        let Ok(len) = fifo.read(&mut piece) else { return };
        let at = Instant::now();
        text.extend_from_slice(&piece[..len]);
        if !found && text.windows(MARKER.len()).any(|window| window == MARKER) {
            found = true;
            let exits: Option<Exits> = process::exits(pid);
            let _ = happenings.send(Happening::Init { at, exits });
        }
        text.drain(..text.len().saturating_sub(MAX_TAIL));
    }
    let _ = happenings.send(Happening::Console(String::from_utf8_lossy(&text).into_owned()));
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
