//! The guest's only process while the disk or the network is measured. With `bench.disk` on the kernel's command line
//! it measures the disk ([`disk`]) for so many milliseconds each row, with `bench.files` a file system ([`files`]).
//! Otherwise it configures its interface from the kernel's command line (`bench.address`, `bench.prefix`,
//! `bench.gateway`, `bench.mtu`), connects to the measuring program (`bench.control`) and makes the traffic that it
//! asks for, a line each:
//!
//! - `send PORT`: connects there and sends until the other end leaves
//! - `receive PORT`: connects there, takes everything up to a byte [`END`] and answers with the number of bytes
//! - `echo PORT`: connects there and sends back what comes
//! - `datagrams-out PORT SIZE MS`: sends datagrams for so long
//! - `datagrams-in PORT`: sends a first datagram and counts those that come until none do for a while
//!
//! The answer is `done NUMBER NUMBER`. On [`PUBLISHED`] it serves connections from outside: the first byte says whether
//! they want to send (`s`) or to receive (`r`).

mod disk;
mod files;
mod interface;

use std::{
    collections::HashMap,
    error::Error,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    str::FromStr,
    thread,
    time::{Duration, Instant},
};

/// Port for connections from outside.
const PUBLISHED: u16 = 5001;
/// Bytes of one write or read.
const BLOCK: usize = 256 * 1024;
/// The byte that ends a stream.
const END: u8 = 0xff;
/// Pause after which the datagrams are taken to have ended.
const DATAGRAM_TIMEOUT: Duration = Duration::from_millis(500);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() {
    if let Err(error) = run() {
        println!("bench endpoint: {error}");
    }
    // SAFETY: a plain system call; nothing in here is worth syncing.
    unsafe { libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF) };
    // If the power cannot be switched off, the measuring program kills the VM.
    loop {
        thread::park();
    }
}

/// The words `bench.KEY=VALUE` of the kernel's command line.
struct Parameters(HashMap<String, String>);

impl Parameters {
    fn read() -> Result<Self> {
        let line = fs::read_to_string("/proc/cmdline")?;
        let pairs = line.split_ascii_whitespace().filter_map(|word| word.strip_prefix("bench.")?.split_once('='));
        Ok(Self(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()))
    }

    fn get<T: FromStr>(&self, key: &str) -> Result<T> {
        let value = self.0.get(key).and_then(|value| value.parse().ok());
        value.ok_or_else(|| format!("bench.{key} is missing from the command line").into())
    }
}

fn run() -> Result<()> {
    interface::mount_proc()?;
    let parameters = Parameters::read()?;
    if let Ok(milliseconds) = parameters.get("disk") {
        return disk::measure(Duration::from_millis(milliseconds));
    }
    if let Ok(files) = parameters.get("files") {
        let duration = Duration::from_millis(parameters.get("milliseconds")?);
        return files::measure(
            &parameters.get::<String>("type")?,
            &parameters.get::<String>("place")?,
            files,
            duration,
        );
    }
    let address: Ipv4Addr = parameters.get("address")?;
    interface::configure(address, parameters.get("prefix")?, parameters.get("gateway")?, parameters.get("mtu")?)?;
    let published = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PUBLISHED))?;
    thread::spawn(move || {
        for stream in published.incoming().flatten() {
            thread::spawn(move || serve(stream));
        }
    });
    let control: SocketAddr = parameters.get("control")?;
    let stream = connect_at_last(control)?;
    stream.set_nodelay(true)?;
    let mut answers = stream.try_clone()?;
    for line in BufReader::new(stream).lines() {
        let (first, second) = obey(control.ip(), &line?)?;
        writeln!(answers, "done {first} {second}")?;
    }
    Ok(())
}

/// Connects as soon as the network is up, which may be later than its interface.
fn connect_at_last(address: SocketAddr) -> Result<TcpStream> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match TcpStream::connect_timeout(&address, Duration::from_secs(2)) {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(50)),
            result => return Ok(result?),
        }
    }
}

fn obey(host: IpAddr, line: &str) -> Result<(u64, u64)> {
    let words: Vec<_> = line.split(' ').collect();
    let number = |at: usize| -> Result<u64> { Ok(words.get(at).ok_or("a word is missing")?.parse()?) };
    let place = SocketAddr::new(host, number(1)?.try_into()?);
    match words[0] {
        "send" => Ok((send(&mut TcpStream::connect(place)?), 0)),
        "receive" => {
            let mut stream = TcpStream::connect(place)?;
            Ok((receive(&mut stream)?, 0))
        }
        "echo" => Ok((echo(TcpStream::connect(place)?)?, 0)),
        "datagrams-out" => send_datagrams(place, number(2)?.try_into()?, Duration::from_millis(number(3)?)),
        "datagrams-in" => receive_datagrams(place),
        word => Err(format!("unknown command {word}").into()),
    }
}

fn serve(mut stream: TcpStream) {
    let mut kind = [0];
    if stream.read_exact(&mut kind).is_ok() {
        match kind[0] {
            b'r' => drop(send(&mut stream)),
            _ => drop(receive(&mut stream)),
        }
    }
}

/// Sends until the other end has left; returns the bytes.
fn send(stream: &mut TcpStream) -> u64 {
    let block = vec![7; BLOCK];
    let mut sent = 0;
    while let Ok(len) = stream.write(&block) {
        sent += len as u64;
    }
    sent
}

/// Takes everything and answers with the number of bytes.
fn receive(stream: &mut TcpStream) -> io::Result<u64> {
    let mut block = vec![0; BLOCK];
    let mut received = 0;
    loop {
        let len = stream.read(&mut block)?;
        received += len as u64;
        if len == 0 || block[len - 1] == END {
            break;
        }
    }
    stream.write_all(&received.to_be_bytes())?;
    Ok(received)
}

fn echo(mut stream: TcpStream) -> io::Result<u64> {
    stream.set_nodelay(true)?;
    let mut block = vec![0; BLOCK];
    let mut rounds = 0;
    loop {
        match stream.read(&mut block)? {
            0 => return Ok(rounds),
            len => stream.write_all(&block[..len])?,
        }
        rounds += 1;
    }
}

fn send_datagrams(place: SocketAddr, size: usize, duration: Duration) -> Result<(u64, u64)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(place)?;
    let datagram = vec![7; size];
    let begun = Instant::now();
    let mut sent = 0;
    while begun.elapsed() < duration {
        for _ in 0..16 {
            sent += u64::from(socket.send(&datagram).is_ok());
        }
    }
    Ok((sent, begun.elapsed().as_micros() as u64))
}

/// The datagrams that came, and microseconds between the first and the last.
fn receive_datagrams(place: SocketAddr) -> Result<(u64, u64)> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(place)?;
    socket.set_read_timeout(Some(DATAGRAM_TIMEOUT))?;
    let mut buffer = vec![0; 65_536];
    let (mut first, mut last, mut received) = (None, Instant::now(), 0);
    let mut hellos = 0;
    loop {
        if first.is_none() {
            if hellos == 20 {
                return Err("no datagram came".into());
            }
            hellos += 1;
            socket.send(b"hello")?;
        }
        match socket.recv(&mut buffer) {
            Ok(_) => {
                last = Instant::now();
                first.get_or_insert(last);
                received += 1;
            }
            // A refusal is the answer to the hello.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(_) => {
                if let Some(first) = first {
                    return Ok((received, (last - first).as_micros() as u64));
                }
            }
        }
    }
}
