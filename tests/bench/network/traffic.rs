//! The measuring program's end of the traffic.

use std::{
    io::{self, BufRead, BufReader, ErrorKind, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    time::{Duration, Instant},
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::contender::Running;
use crate::{Result, process::Cpu};

/// Time for the guest to boot, to connect and to answer.
const IO_TIMEOUT: Duration = Duration::from_secs(120);
/// Bytes of one read or write.
const BLOCK: usize = 256 * 1024;
/// Traffic before the measured part.
const WARM_UP: Duration = Duration::from_millis(300);
/// The last byte of what the guest receives, and no other.
const END: u8 = 0xff;
/// Bytes of a request and of its answer.
const MESSAGE: usize = 128;
/// Bytes of a datagram, as much as fits into everybody's packets.
const DATAGRAM: usize = 1400;

/// A guest that makes traffic on command.
pub struct Guest {
    running: Running,
    commands: TcpStream,
    answers: BufReader<TcpStream>,
}

/// A measured transfer.
#[derive(Clone, Copy, Debug)]
pub struct Bulk {
    bytes: u64,
    seconds: f64,
    cpu: Cpu,
}

impl Bulk {
    /// MiB in a second.
    pub fn rate(&self) -> f64 {
        self.bytes as f64 / self.seconds / f64::from(1 << 20)
    }

    /// CPU seconds of the host's processes for each gigabyte.
    pub fn cpu(&self) -> f64 {
        self.cpu.total / (self.bytes as f64 / 1e9)
    }

    /// The part of it that the vCPUs did not spend in the guest.
    pub fn cpu_outside(&self) -> f64 {
        (self.cpu.total - self.cpu.guest).max(0.0) / (self.bytes as f64 / 1e9)
    }
}

fn accept(listener: &TcpListener) -> Result<TcpStream> {
    let timeout = PollTimeout::try_from(IO_TIMEOUT).map_err(io::Error::other)?;
    if poll(&mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
        return Err("the guest did not connect".into());
    }
    let (stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(IO_TIMEOUT))?;
    stream.set_write_timeout(Some(IO_TIMEOUT))?;
    Ok(stream)
}

/// Takes for so long, without the beginning.
fn take(stream: &mut TcpStream, duration: Duration, running: &Running) -> Result<Bulk> {
    let mut block = vec![0; BLOCK];
    let warm = Instant::now() + WARM_UP;
    while Instant::now() < warm {
        if stream.read(&mut block)? == 0 {
            return Err("the guest stopped sending".into());
        }
    }
    let (before, begun, mut bytes) = (running.cpu()?, Instant::now(), 0);
    while begun.elapsed() < duration {
        match stream.read(&mut block)? {
            0 => return Err("the guest stopped sending".into()),
            len => bytes += len as u64,
        }
    }
    Ok(Bulk { bytes, seconds: begun.elapsed().as_secs_f64(), cpu: running.cpu()? - before })
}

/// Gives for so long, and waits until all of it has arrived.
fn give(mut stream: TcpStream, duration: Duration, running: &Running) -> Result<Bulk> {
    let block = vec![7; BLOCK];
    let (before, begun) = (running.cpu()?, Instant::now());
    while begun.elapsed() < duration {
        stream.write_all(&block)?;
    }
    // Not by the end of the stream, which gvproxy does not pass on for one direction alone.
    stream.write_all(&[END])?;
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    let cpu = running.cpu()? - before;
    Ok(Bulk { bytes: u64::from_be_bytes(count), seconds: begun.elapsed().as_secs_f64(), cpu })
}

impl Guest {
    /// Waits for the guest.
    pub fn meet(listener: &TcpListener, running: Running) -> Result<Self> {
        let commands =
            accept(listener).map_err(|error| format!("{error}\nthe guest's last output:\n{}", running.last_words()))?;
        let answers = BufReader::new(commands.try_clone()?);
        Ok(Self { running, commands, answers })
    }

    /// The end of its console.
    pub fn last_words(&self) -> String {
        self.running.last_words()
    }

    fn command(&mut self, line: &str) -> Result<()> {
        Ok(self.commands.write_all(format!("{line}\n").as_bytes())?)
    }

    fn done(&mut self) -> Result<(u64, u64)> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let numbers: Vec<_> = line.split_ascii_whitespace().skip(1).filter_map(|word| word.parse().ok()).collect();
        match numbers[..] {
            [first, second] => Ok((first, second)),
            _ => Err("the guest failed".into()),
        }
    }

    /// The guest connects out to do `verb`.
    fn connect(&mut self, verb: &str) -> Result<TcpStream> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        self.command(&format!("{verb} {}", listener.local_addr()?.port()))?;
        accept(&listener)
    }

    /// The guest sends over a connection that it made.
    pub fn bulk_to_host(&mut self, duration: Duration) -> Result<Bulk> {
        let mut stream = self.connect("send")?;
        let bulk = take(&mut stream, duration, &self.running)?;
        drop(stream);
        self.done()?;
        Ok(bulk)
    }

    /// The guest receives over a connection that it made.
    pub fn bulk_to_guest(&mut self, duration: Duration) -> Result<Bulk> {
        let stream = self.connect("receive")?;
        let bulk = give(stream, duration, &self.running)?;
        self.done()?;
        Ok(bulk)
    }

    fn published(&self, kind: u8) -> Result<TcpStream> {
        let mut stream = TcpStream::connect(self.running.published)?;
        stream.set_read_timeout(Some(IO_TIMEOUT))?;
        stream.set_write_timeout(Some(IO_TIMEOUT))?;
        stream.write_all(&[kind])?;
        Ok(stream)
    }

    /// The guest sends over a connection to its published port.
    pub fn published_to_host(&mut self, duration: Duration) -> Result<Bulk> {
        take(&mut self.published(b'r')?, duration, &self.running)
    }

    /// The guest receives over a connection to its published port.
    pub fn published_to_guest(&mut self, duration: Duration) -> Result<Bulk> {
        give(self.published(b's')?, duration, &self.running)
    }

    /// Microseconds from a request to its answer: median and 99th percentile.
    pub fn round_trip(&mut self, duration: Duration) -> Result<(f64, f64)> {
        let mut stream = self.connect("echo")?;
        let mut message = [7; MESSAGE];
        let mut times = Vec::new();
        let warm = Instant::now() + WARM_UP;
        while warm.elapsed() < duration {
            let begun = Instant::now();
            stream.write_all(&message)?;
            stream.read_exact(&mut message)?;
            if begun > warm {
                times.push(begun.elapsed().as_secs_f64() * 1e6);
            }
        }
        drop(stream);
        self.done()?;
        times.sort_by(f64::total_cmp);
        let at = |part: usize| times.get((times.len() * part / 100).min(times.len().saturating_sub(1))).copied();
        at(50).zip(at(99)).ok_or_else(|| "no answer came".into())
    }

    /// Datagrams of the guest that arrive in a second.
    pub fn datagrams_to_host(&mut self, duration: Duration) -> Result<f64> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
        let port = socket.local_addr()?.port();
        self.command(&format!("datagrams-out {port} {DATAGRAM} {}", duration.as_millis()))?;
        let mut buffer = [0; 2 * DATAGRAM];
        let (mut first, mut last, mut count) = (None, Instant::now(), 0_u32);
        let deadline = Instant::now() + IO_TIMEOUT;
        loop {
            match socket.recv(&mut buffer) {
                Ok(_) => {
                    last = Instant::now();
                    first.get_or_insert(last);
                    count += 1;
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    if first.is_some_and(|first| first.elapsed() > duration) || Instant::now() > deadline {
                        break;
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.done()?;
        let first = first.ok_or("no datagram of the guest arrived")?;
        Ok(f64::from(count) / (last - first).as_secs_f64())
    }

    /// Datagrams that arrive in the guest in a second.
    pub fn datagrams_to_guest(&mut self, duration: Duration) -> Result<f64> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
        socket.set_read_timeout(Some(IO_TIMEOUT))?;
        self.command(&format!("datagrams-in {}", socket.local_addr()?.port()))?;
        let mut hello = [0; 16];
        let (_, from) = socket.recv_from(&mut hello)?;
        socket.connect(from)?;
        let datagram = [7; DATAGRAM];
        let begun = Instant::now();
        while begun.elapsed() < duration {
            // A refusal says that a helper's socket is full or gone for a moment.
            let _ = socket.send(&datagram);
        }
        let (received, us) = self.done()?;
        Ok(received as f64 / (us as f64 / 1e6))
    }
}
