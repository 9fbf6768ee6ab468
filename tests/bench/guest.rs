//! A guest whose only process measures something and prints a line for each row, and the processes that serve it.

use std::{
    fs::{File, OpenOptions},
    io::Read,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    process::Child,
    time::{Duration, Instant, SystemTime},
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::Mode,
    unistd::mkfifo,
};

use crate::{
    Result,
    process::{self, Cpu, Exits},
};

/// The processes of a guest; killed when dropped.
pub struct Processes {
    /// The VMM.
    pub vmm: Child,
    /// The servers of its devices.
    pub helpers: Vec<Child>,
    /// Ours end with their control sockets.
    pub _controls: Vec<OwnedFd>,
}

impl Drop for Processes {
    fn drop(&mut self) {
        for child in std::iter::once(&mut self.vmm).chain(&mut self.helpers) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A row that the guest has measured.
pub struct Measured {
    /// Its name.
    pub key: String,
    /// The number of things that were done in it.
    pub count: f64,
    /// The time that it took, in seconds.
    pub seconds: f64,
    /// The VM's exits meanwhile, if they can be read.
    pub exits: Option<f64>,
    /// CPU time of all processes meanwhile.
    pub cpu: Cpu,
    /// Its begin and its end on the host's clock.
    pub span: [SystemTime; 2],
}

/// A guest that runs.
pub struct Running {
    processes: Processes,
    console: File,
    seen: Vec<u8>,
    /// Exits, CPU time and the time at the begin of the row.
    begin: (Option<Exits>, Cpu, SystemTime),
}

impl Running {
    /// Starts a guest by `start`, which gets the path of its console, and hands each row that it prints to `row` until
    /// that returns false.
    pub fn measure(
        directory: &Path,
        timeout: Duration,
        start: impl FnOnce(&Path) -> Result<Processes>,
        mut row: impl FnMut(Measured) -> Result<bool>,
    ) -> Result<()> {
        let path = directory.join("console");
        mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let run = || {
            // Open at both ends, so that neither side waits for the other.
            let console = OpenOptions::new().read(true).write(true).open(&path)?;
            let begin = (None, Cpu::default(), SystemTime::now());
            let mut running = Self { processes: start(&path)?, console, seen: Vec::new(), begin };
            let deadline = Instant::now() + timeout;
            while row(running.next(deadline)?)? {}
            Ok(())
        };
        let result = run();
        std::fs::remove_file(&path)?;
        result
    }

    fn cpu(&self) -> Result<Cpu> {
        let mut sum = Cpu::read(self.processes.vmm.id())?;
        for helper in self.processes.helpers.iter().flat_map(|helper| process::family(helper.id())) {
            sum += Cpu::read(helper)?;
        }
        Ok(sum)
    }

    fn next(&mut self, deadline: Instant) -> Result<Measured> {
        loop {
            let words = self.words(deadline)?;
            let (exits, cpu) = (process::exits(self.processes.vmm.id()), self.cpu()?);
            let words: Vec<_> = words.iter().map(String::as_str).collect();
            match words[..] {
                ["begin", _] => self.begin = (exits, cpu, SystemTime::now()),
                [key, count, microseconds] => {
                    let both = exits.zip(self.begin.0.take());
                    return Ok(Measured {
                        key: key.to_owned(),
                        count: count.parse()?,
                        seconds: microseconds.parse::<f64>()? / 1e6,
                        exits: both.map(|(now, before)| (now.total - before.total) as f64),
                        cpu: cpu - self.begin.1,
                        span: [self.begin.2, SystemTime::now()],
                    });
                }
                _ => return Err(format!("the guest prints {words:?}").into()),
            }
        }
    }

    /// The words of the guest's next line that begins with `bench`, without that.
    fn words(&mut self, deadline: Instant) -> Result<Vec<String>> {
        loop {
            while let Some(end) = self.seen.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.seen.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line);
                if let Some(rest) = line.trim().strip_prefix("bench ") {
                    return Ok(rest.split(' ').map(str::to_owned).collect());
                }
            }
            let left = deadline.saturating_duration_since(Instant::now()).as_millis().min(1000) as u16;
            if left == 0 {
                let printed = String::from_utf8_lossy(&self.seen);
                return Err(format!("the guest is too slow; it printed {printed:?}").into());
            }
            if let Some(status) = self.processes.vmm.try_wait()? {
                return Err(format!("the VMM ended early: {status}").into());
            }
            let mut fds = [PollFd::new(self.console.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::from(left))? > 0 {
                let mut bytes = [0; 4096];
                let length = self.console.read(&mut bytes)?;
                self.seen.extend_from_slice(&bytes[..length]);
            }
        }
    }
}
