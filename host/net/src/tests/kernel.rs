//! This machine's kernel as the guest: a network namespace whose only way out is a tap device with the stack behind it.
//!
//! It is the driver's side of virtio-net as Linux has it (the same headers, the same offloads), without a VM around it,
//! so that there can be as many connections as would take hours in an emulated one.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd},
        unix::fs::OpenOptionsExt,
    },
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bulkhead_protocol::Transport;
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns, unshare},
    sys::resource::{Resource, getrlimit, setrlimit},
};
use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::{
    addresses::{MTU, PREFIX6, example},
    events::{Token, ending},
    frame::{MAX_FRAME, VIRTIO_HEADER},
    fuzzing::Frames,
    offload::Offload,
    stack::Stack,
    tcp::sender::Sent,
};

const DEVICE: &str = "wire0";
/// With the poll loop that drivers have: without it a burst overflows the queue in front of the kernel, unlike a
/// virtqueue.
const TAP_WITHOUT_INFO_WITH_HEADER: i16 =
    (libc::IFF_TAP | libc::IFF_NAPI | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
const CSUM_TSO4_TSO6: libc::c_ulong = (libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6) as libc::c_ulong;

/// A kernel behind the stack.
struct Guest {
    namespace: File,
    end: Arc<AtomicBool>,
    published: Arc<Mutex<Vec<(TcpListener, SocketAddr)>>>,
    /// TCP connections that the stack has at the moment.
    flows: Arc<AtomicU64>,
    stack: Option<JoinHandle<()>>,
    _turn: MutexGuard<'static, ()>,
}

/// One guest at a time: memory and descriptors of the process are counted.
pub(super) fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes the namespace and its device; runs on a thread of its own, which stays in there.
pub(super) fn make() -> io::Result<(File, File)> {
    unshare(CloneFlags::CLONE_NEWNET)?;
    let tap = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = TAP_WITHOUT_INFO_WITH_HEADER;
    let header = VIRTIO_HEADER as libc::c_int;
    // SAFETY: the first two requests read what the pointers lead to, the last takes an integer.
    let failed = unsafe {
        libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF, &raw const request) < 0
            || libc::ioctl(tap.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) < 0
            || libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, CSUM_TSO4_TSO6) < 0
    };
    if failed {
        return Err(io::Error::last_os_error());
    }
    let addresses = example();
    let mac = crate::addresses::GUEST_MAC.map(|byte| format!("{byte:02x}")).join(":");
    run("ip", &["link", "set", "lo", "up"]);
    run("ip", &["link", "set", DEVICE, "address", &mac, "mtu", &MTU.to_string(), "up"]);
    run("ip", &["addr", "add", &format!("{}/{}", addresses.guest, addresses.prefix), "dev", DEVICE]);
    run("ip", &["-6", "addr", "add", &format!("{}/{PREFIX6}", addresses.guest6), "dev", DEVICE, "nodad"]);
    // Three questions for the stack's address, the default, are all lost once in some hundred runs of the test with
    // losses, which is about TCP. In a container this may be read-only.
    let _ = std::fs::write(format!("/proc/sys/net/ipv4/neigh/{DEVICE}/mcast_solicit"), "20");
    run("ip", &["route", "add", "default", "via", &addresses.gateway.to_string()]);
    run("ip", &["-6", "route", "add", "default", "via", &addresses.gateway6.to_string()]);
    Ok((File::open("/proc/thread-self/ns/net")?, tap))
}

impl Guest {
    /// `None` and a line in the test's output where this user may not make one.
    fn new() -> Option<Self> {
        Self::with_loss(0)
    }

    /// A guest on whose wire so many of a hundred frames are lost.
    fn with_loss(percent: u32) -> Option<Self> {
        let turn = turn();
        let (namespace, tap) = match thread::spawn(make).join().unwrap() {
            Ok(made) => made,
            Err(error) => {
                println!("left out: no network namespace or tap device can be had here ({error})");
                return None;
            }
        };
        if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE) {
            setrlimit(Resource::RLIMIT_NOFILE, most.min(65_536), most).unwrap();
        }
        let end = Arc::new(AtomicBool::new(false));
        let published = Arc::new(Mutex::new(Vec::new()));
        let flows = Arc::new(AtomicU64::new(0));
        let mine = (Arc::clone(&end), Arc::clone(&published), Arc::clone(&flows));
        let stack = thread::spawn(move || serve(tap, percent, &mine.0, &mine.1, &mine.2));
        Some(Self { namespace, end, published, flows, stack: Some(stack), _turn: turn })
    }

    /// Runs something in the guest.
    fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let namespace = self.namespace.try_clone().unwrap();
        thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// Publishes a port of the guest; returns the host's address for it.
    fn publish(&self, port: u16) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let target = SocketAddr::new(example().guest.into(), port);
        self.published.lock().unwrap().push((listener, target));
        address
    }

    fn until_idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(120);
        while self.flows.load(Ordering::Relaxed) > 0 {
            assert!(Instant::now() < deadline, "{} connections are left", self.flows.load(Ordering::Relaxed));
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.stack.take().map(JoinHandle::join);
    }
}

/// The loop of the network process, with the tap device in the place of the queues.
fn serve(
    mut tap: File,
    percent: u32,
    end: &AtomicBool,
    published: &Mutex<Vec<(TcpListener, SocketAddr)>>,
    flows: &AtomicU64,
) {
    let epoll = Arc::new(Epoll::new().unwrap());
    let mut stack = Stack::new(Arc::clone(&epoll), example());
    stack.offload = Offload { checksum: true, segmentation: true };
    let mut events = vec![EpollEvent::default(); 256];
    let mut buffer = vec![0; VIRTIO_HEADER + MAX_FRAME];
    let (mut next, mut more) = (0, false);
    let mut state = 1_u32;
    let mut is_lost = || {
        // Numerical Recipes' generator: the same pattern in each run.
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % 100 < percent
    };
    while !end.load(Ordering::Relaxed) {
        let watched = epoll.as_raw_fd();
        // SAFETY: the epoll descriptor stays open as long as `epoll`, which outlives this round.
        let watched = unsafe { std::os::fd::BorrowedFd::borrow_raw(watched) };
        let mut fds = [PollFd::new(tap.as_fd(), PollFlags::POLLIN), PollFd::new(watched, PollFlags::POLLIN)];
        let timeout = if more { 0 } else { u16::try_from(stack.timeout()).unwrap_or(20).min(20) };
        let _ = poll(&mut fds, PollTimeout::from(timeout));
        for (listener, target) in published.lock().unwrap().drain(..) {
            next += 1;
            stack.publish(next, Transport::Tcp, listener.into(), target);
        }
        let ready = epoll.wait(0, &mut events).unwrap_or(0);
        for event in &events[..ready] {
            stack.host_ready(Token::unpack(event.data()), ending(event));
        }
        for _ in 0..128 {
            let Ok(len) = tap.read(&mut buffer) else { break };
            if !is_lost() {
                stack.receive_copy(&buffer[VIRTIO_HEADER..len]);
            }
        }
        stack.run_timers();
        loop {
            let mut taken = Frames { frames: stack.out.drain(..).collect(), most: usize::MAX };
            more = stack.send(&mut taken) == Sent::More;
            for frame in taken.frames {
                // A frame that the kernel does not take is lost, as on any wire.
                let _ = is_lost() || tap.write(&[&frame.header[..], &frame.bytes].concat()).is_ok();
            }
            stack.resume();
            if stack.out.is_empty() {
                break;
            }
        }
        flows.store(stack.flows() as u64, Ordering::Relaxed);
    }
}

/// Descriptors that other tests of this process may have opened meanwhile.
const OTHERS: usize = 100;

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn resident_kib() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn bulk_data_goes_both_ways_with_offloads_over_both_versions_of_ip() {
    let Some(guest) = Guest::new() else { return };
    for (bind, to) in [("127.0.0.1:0", IpAddr::from(example().host)), ("[::1]:0", example().host6.into())] {
        let listener = TcpListener::bind(bind).unwrap();
        let port = listener.local_addr().unwrap().port();
        let echo = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut writer = stream.try_clone().unwrap();
            io::copy(&mut stream, &mut writer).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let data: Vec<u8> = (0..20_000_000_u32).map(|index| (index ^ index >> 11) as u8).collect();
        let same = guest.run(move || exchange(TcpStream::connect((to, port)).unwrap(), &data) == data);
        assert!(same.join().unwrap(), "{to}");
        echo.join().unwrap();
        guest.until_idle();
    }
}

/// Sends `data`, ends, and returns what comes back.
fn exchange(mut stream: TcpStream, data: &[u8]) -> Vec<u8> {
    let mut writer = stream.try_clone().unwrap();
    let sent = data.to_vec();
    let sender = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    sender.join().unwrap();
    back
}

/// Answers each connection with what it sent, after its end.
fn answer(listener: TcpListener) {
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            thread::spawn(move || {
                let mut data = Vec::new();
                stream.read_to_end(&mut data).unwrap();
                stream.write_all(&data).unwrap();
            });
        }
    });
}

#[test]
fn data_is_neither_lost_nor_reordered_nor_doubled_when_frames_are_lost() {
    const EACH: usize = 30;
    let Some(guest) = Guest::with_loss(8) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    answer(listener);
    let inside = guest.run(move || TcpListener::bind((example().guest, 80)).unwrap()).join().unwrap();
    guest.run(move || answer(inside)).join().unwrap();
    let published = guest.publish(80);
    let data = |number: usize| (0..number * 9_001).map(|index| (index ^ index >> 9 ^ number) as u8).collect::<Vec<_>>();
    let clients: Vec<_> = (0..EACH)
        .map(|number| (number, guest.run(move || TcpStream::connect((example().host, port)).unwrap())))
        .map(|(number, stream)| (number, thread::spawn(move || exchange(stream.join().unwrap(), &data(number)))))
        .chain((0..EACH).map(|number| {
            (number, thread::spawn(move || exchange(TcpStream::connect(published).unwrap(), &data(number))))
        }))
        .collect();
    for (number, client) in clients {
        assert!(client.join().unwrap() == data(number), "{number}");
    }
    guest.until_idle();
}

#[test]
fn five_thousand_connections_at_once_are_told_apart() {
    const MANY: u32 = 5000;
    let Some(guest) = Guest::new() else { return };
    let before = descriptors();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let mut streams: Vec<_> = (0..MANY).map(|_| listener.accept().unwrap().0).collect();
        for stream in &mut streams {
            let mut number = [0; 4];
            stream.read_exact(&mut number).unwrap();
            stream.write_all(&(u32::from_le_bytes(number) + 1).to_le_bytes()).unwrap();
        }
    });
    let client = guest.run(move || {
        let mut streams: Vec<_> = (0..MANY).map(|_| TcpStream::connect((example().host, port)).unwrap()).collect();
        for (number, stream) in (0_u32..).zip(&mut streams) {
            stream.write_all(&number.to_le_bytes()).unwrap();
        }
        for (number, stream) in (0_u32..).zip(&mut streams) {
            let mut answer = [0; 4];
            stream.read_exact(&mut answer).unwrap();
            assert_eq!(u32::from_le_bytes(answer), number + 1);
        }
    });
    client.join().unwrap();
    server.join().unwrap();
    guest.until_idle();
    assert!(descriptors() <= before + OTHERS, "{} descriptors, {before} before", descriptors());
}

#[test]
fn much_data_comes_out_of_a_published_port() {
    const MUCH: usize = 60_000_000;
    let Some(guest) = Guest::new() else { return };
    let inside = guest.run(move || TcpListener::bind((example().guest, 80)).unwrap()).join().unwrap();
    guest.run(move || {
        let (mut stream, _) = inside.accept().unwrap();
        let block: Vec<u8> = (0..1_000_000_u32).map(|index| (index ^ index >> 8) as u8).collect();
        for _ in 0..MUCH / block.len() {
            stream.write_all(&block).unwrap();
        }
    });
    let mut client = TcpStream::connect(guest.publish(80)).unwrap();
    let (mut buffer, mut received) = (vec![0; 1 << 17], 0);
    loop {
        match client.read(&mut buffer).unwrap() {
            0 => break,
            len => {
                let right = |(at, byte): (usize, &u8)| {
                    let index = ((received + at) % 1_000_000) as u32;
                    *byte == (index ^ index >> 8) as u8
                };
                assert!(buffer[..len].iter().enumerate().all(right), "wrong data after {received} bytes");
                received += len;
            }
        }
    }
    assert_eq!(received, MUCH);
    // The connection lives on for as long as one of its ends does.
    drop(client);
    guest.until_idle();
}

#[test]
fn a_guest_that_reads_late_gets_everything_and_the_end() {
    const MUCH: usize = 40_000_000;
    let Some(guest) = Guest::new() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let byte = |index: usize| (index ^ index >> 8 ^ index >> 16) as u8;
    let server = thread::spawn(move || {
        let data: Vec<u8> = (0..MUCH).map(byte).collect();
        listener.accept().unwrap().0.write_all(&data).unwrap();
    });
    let received = guest.run(move || {
        let mut stream = TcpStream::connect((example().host, port)).unwrap();
        // Longer than the timeouts after which a closed window is probed.
        thread::sleep(Duration::from_secs(4));
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        data
    });
    let received = received.join().unwrap();
    assert!(received.len() == MUCH && received.iter().enumerate().all(|(index, is)| *is == byte(index)));
    server.join().unwrap();
    guest.until_idle();
}

/// Connections in sequence out of the guest and into it; memory and descriptors at the end are those of the beginning.
fn short_connections(count: u32) {
    let Some(guest) = Guest::new() else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        while let Ok((mut stream, _)) = listener.accept() {
            // The end that closes first waits in TIME-WAIT: here the host, which has the ports for it.
            let _ = stream.write_all(b"x");
        }
    });
    let inside = guest.run(move || TcpListener::bind((example().guest, 80)).unwrap()).join().unwrap();
    guest.run(move || {
        while let Ok((mut stream, _)) = inside.accept() {
            let _ = stream.read(&mut [0; 8]).and_then(|_| stream.write_all(b"y"));
        }
    });
    let published = guest.publish(80);
    let out = move |count: u32| {
        for _ in 0..count {
            let mut byte = Vec::new();
            TcpStream::connect((example().host, port)).unwrap().read_to_end(&mut byte).unwrap();
            assert_eq!(byte, b"x");
        }
    };
    let into = move |count: u32| {
        for _ in 0..count {
            let mut stream = TcpStream::connect(published).unwrap();
            stream.write_all(b"q").unwrap();
            let mut byte = Vec::new();
            stream.read_to_end(&mut byte).unwrap();
            assert_eq!(byte, b"y");
        }
    };
    guest.run(move || out(500)).join().unwrap();
    into(500);
    guest.until_idle();
    let (before, memory) = (descriptors(), resident_kib());
    let begun = Instant::now();
    let outwards = guest.run(move || out(count / 2));
    into(count / 2);
    outwards.join().unwrap();
    guest.until_idle();
    println!("{count} connections in {:.1?}, {} KiB resident, {memory} before", begun.elapsed(), resident_kib());
    // Other tests of this process may have begun meanwhile; a leak of a hundred bytes a connection is more.
    assert!(descriptors() <= before + OTHERS, "{} descriptors, {before} before", descriptors());
    assert!(resident_kib() < memory + 16 * 1024, "{} KiB resident, {memory} before", resident_kib());
}

#[test]
fn two_hundred_thousand_short_connections_leave_nothing_behind() {
    short_connections(200_000);
}
