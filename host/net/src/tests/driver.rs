//! A network process as the driver sees it: the real program behind real queues, with this machine's kernel as the
//! guest.
//!
//! The driver has the buffers of Linux's (4 KiB, mergeable) and hands frames to a tap device. It counts what a frame
//! costs, and the process's CPU time:
//!
//!     BULKHEAD_NET_PROGRAM=target/release/bulkhead cargo test -p bulkhead-net driver -- --ignored --nocapture

use std::{
    fs::File,
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Child, Command as Process},
    sync::{
        Arc, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering, fence},
    },
    thread,
    time::Instant,
};

use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sched::{CloneFlags, setns},
    sys::socket::{AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, socketpair},
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::{
    addresses::example,
    api::{Command, Setup},
    event_loop::EventLoop,
    frame::{MAX_FRAME, VIRTIO_HEADER},
    frontend::Frontend,
    stack::Stack,
    tests::kernel::{make, turn},
};
use bulkhead_queue::GuestRam;
use bulkhead_vmm::{
    devices::virtio::{Activation, ActiveQueue, Interrupt, VirtioDevice, net, vhost_user::VhostUser},
    memory,
};

pub(super) const SIZE: u16 = 1024;
const BUFFER: u64 = 4096;
/// Addresses of the parts of each queue.
const RINGS: [u64; 2] = [0x10_000, 0x40_000];
const DATA: [u64; 2] = [0x100_0000, 0x200_0000];
/// Frames of the guest that can be under way, and the room for each.
const SLOTS: u16 = 128;
const SLOT: u64 = 0x11_000;

/// One queue, driver's side.
struct Side {
    memory: Arc<GuestRam>,
    base: u64,
    available: u16,
    used: u16,
    kick: EventFd,
    call: EventFd,
}

struct Line(EventFd);

impl Interrupt for Line {
    fn trigger(&self) {
        let _ = self.0.write(1);
    }

    fn event(&self) -> Option<EventFd> {
        self.0.try_clone().ok()
    }
}

impl Side {
    fn new(memory: &Arc<GuestRam>, index: usize) -> Self {
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let memory = Arc::clone(memory);
        Self { memory, base: RINGS[index], available: 0, used: 0, kick: event(), call: event() }
    }

    fn active(&self) -> ActiveQueue {
        let mut queue = Queue::new(SIZE).unwrap();
        queue.set_size(SIZE);
        queue.try_set_desc_table_address(GuestAddress(self.base)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(self.base + 0x8000)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(self.base + 0x10_000)).unwrap();
        queue.set_ready(true);
        let interrupt: Arc<dyn Interrupt> = Arc::new(Line(self.call.try_clone().unwrap()));
        ActiveQueue { queue, kick: self.kick.try_clone().unwrap(), interrupt }
    }

    fn word(&self, offset: u64) -> u16 {
        self.memory.load(GuestAddress(self.base + offset), Ordering::Acquire).unwrap()
    }

    fn set_word(&self, offset: u64, value: u16) {
        self.memory.store(value, GuestAddress(self.base + offset), Ordering::Release).unwrap();
    }

    /// Describes a buffer.
    fn describe(&self, id: u16, address: u64, len: u32, writable: bool) {
        let at = GuestAddress(self.base + 16 * u64::from(id));
        self.memory.write_obj([address, u64::from(len) | u64::from(writable) << 33], at).unwrap();
    }

    fn offer(&mut self, id: u16) {
        self.set_word(0x8000 + 4 + 2 * u64::from(self.available % SIZE), id);
        self.available = self.available.wrapping_add(1);
    }

    /// Makes what was offered since `old` visible; kicks if the device wants to know.
    fn publish(&self, old: u16) -> bool {
        self.set_word(0x8000 + 2, self.available);
        fence(Ordering::SeqCst);
        let event = self.word(0x10_000 + 4 + 8 * u64::from(SIZE));
        let kick = self.available.wrapping_sub(event).wrapping_sub(1) < self.available.wrapping_sub(old);
        if kick {
            self.kick.write(1).unwrap();
        }
        kick
    }

    /// The next used element.
    fn take(&mut self) -> Option<(u16, u32)> {
        if self.word(0x10_000 + 2) == self.used {
            return None;
        }
        let at = self.base + 0x10_000 + 4 + 8 * u64::from(self.used % SIZE);
        let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
        self.used = self.used.wrapping_add(1);
        Some((id as u16, len))
    }

    /// Asks for an interrupt for the next element; true if there is one already.
    fn listen(&self) -> bool {
        self.set_word(0x8000, 0);
        self.set_word(0x8000 + 4 + 2 * u64::from(SIZE), self.used);
        fence(Ordering::SeqCst);
        self.word(0x10_000 + 2) != self.used
    }
}

#[derive(Default)]
struct Counters {
    frames: AtomicU64,
    bytes: AtomicU64,
    buffers: AtomicU64,
    calls: AtomicU64,
    offers: AtomicU64,
    answers: AtomicU64,
    kicks: AtomicU64,
}

/// Moves frames between the queues and the tap device.
fn drive(mut rx: Side, mut tx: Side, mut tap: File, end: &AtomicBool, counters: &Counters) {
    let add = |counter: &AtomicU64, count: u64| counter.fetch_add(count, Ordering::Relaxed);
    let mut frame = vec![0; VIRTIO_HEADER + MAX_FRAME];
    let mut free: Vec<u16> = (0..SLOTS).collect();
    while !end.load(Ordering::Relaxed) {
        if !rx.listen() {
            let watched = if free.is_empty() { PollFlags::empty() } else { PollFlags::POLLIN };
            // SAFETY: the event stays open as long as `rx`, which outlives this round.
            let call = unsafe { std::os::fd::BorrowedFd::borrow_raw(rx.call.as_raw_fd()) };
            let mut fds = [PollFd::new(call, PollFlags::POLLIN), PollFd::new(tap.as_fd(), watched)];
            let _ = poll(&mut fds, PollTimeout::from(20_u16));
            if rx.call.read().is_ok() {
                add(&counters.calls, 1);
            }
            // Linux's driver wants no interrupts while it polls.
            rx.set_word(0x8000, 1);
        }
        let old = rx.available;
        while let Some((id, len)) = rx.take() {
            let (mut at, mut missing, mut next) = (0, 0, (id, len));
            loop {
                let address = GuestAddress(DATA[0] + u64::from(next.0) * BUFFER);
                rx.memory.read_slice(&mut frame[at..at + next.1 as usize], address).unwrap();
                if at == 0 {
                    missing = u16::from_le_bytes([frame[10], frame[11]]);
                }
                at += next.1 as usize;
                rx.offer(next.0);
                missing -= 1;
                add(&counters.buffers, 1);
                if missing == 0 {
                    break;
                }
                next = rx.take().unwrap();
            }
            add(&counters.frames, 1);
            add(&counters.bytes, at as u64);
            let _ = tap.write(&frame[..at]);
            if rx.available.wrapping_sub(old) > SIZE / 4 {
                break;
            }
        }
        if rx.available != old {
            add(&counters.offers, u64::from(rx.publish(old)));
        }
        // The transmit queue's interrupts are of no interest.
        tx.set_word(0x8000, 1);
        while let Some((id, _)) = tx.take() {
            free.push(id);
        }
        let old = tx.available;
        while let Some(id) = free.pop() {
            let Ok(len) = tap.read(&mut frame) else {
                free.push(id);
                break;
            };
            let address = DATA[1] + u64::from(id) * SLOT;
            tx.memory.write_slice(&frame[..len], GuestAddress(address)).unwrap();
            tx.describe(id, address, len as u32, false);
            tx.offer(id);
            add(&counters.answers, 1);
        }
        if tx.available != old {
            add(&counters.kicks, u64::from(tx.publish(old)));
        }
    }
}

/// Starts the program behind one end of a socket, and returns what keeps it alive.
fn start(program: &Path, published: TcpListener) -> (Child, UnixStream, OwnedFd) {
    let (frontend, backend) = UnixStream::pair().unwrap();
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    let say = |command: &Command, fd: i32| {
        let packet = serde_json::to_vec(command).unwrap();
        let (parts, rights) = ([io::IoSlice::new(&packet)], [fd]);
        let rights = [ControlMessage::ScmRights(&rights)];
        sendmsg::<()>(ours.as_raw_fd(), &parts, &rights, MsgFlags::empty(), None).unwrap();
    };
    say(&Command::Setup(Setup::default()), backend.as_raw_fd());
    let target = (example().guest, 80).into();
    say(&Command::Listen { id: 1, transport: bulkhead_protocol::Transport::Tcp, target }, published.as_raw_fd());
    let mut process = Process::new(program);
    let raw = theirs.as_raw_fd();
    // SAFETY: one system call that takes integers is made between fork and exec.
    unsafe {
        process.arg("net").pre_exec(move || match libc::dup2(raw, bulkhead_ipc::inherited::FD) {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        });
    }
    (process.spawn().unwrap(), frontend, ours)
}

/// Runs the process's loop on a thread of this one, confined like the process, which ends with the other end of what is
/// returned.
fn start_within(published: TcpListener) -> (UnixStream, OwnedFd) {
    let (frontend, backend) = UnixStream::pair().unwrap();
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    thread::spawn(move || {
        let frontend = Frontend::new(theirs, backend).unwrap();
        let mut stack = Stack::new(Arc::clone(&frontend.epoll), example());
        stack.publish(1, bulkhead_protocol::Transport::Tcp, published.into(), (example().guest, 80).into());
        bulkhead_ipc::sandbox::confine_net().unwrap();
        EventLoop { frontend, stack }.run()
    });
    (frontend, ours)
}

/// User and system time, in seconds.
fn cpu(child: Option<&Child>) -> [f64; 2] {
    let id = child.map_or_else(std::process::id, Child::id);
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_ascii_whitespace().collect();
    [11, 12].map(|at| fields[at].parse::<f64>().unwrap() / 100.0)
}

/// Writes so many bytes and waits until the guest has taken them all.
fn give(mut stream: TcpStream, bytes: usize) {
    let block = vec![7; 256 * 1024];
    for _ in 0..bytes / block.len() {
        stream.write_all(&block).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let _ = stream.read(&mut [0]);
}

fn swallow(mut stream: TcpStream) -> usize {
    let (mut block, mut sum) = (vec![0; 256 * 1024], 0);
    loop {
        match stream.read(&mut block).unwrap() {
            0 => return sum,
            len => sum += len,
        }
    }
}

/// A process with a guest behind it.
pub(super) struct World {
    child: Option<Child>,
    _net: (VhostUser, OwnedFd),
    pub(super) published: SocketAddr,
    namespace: File,
    counters: Arc<Counters>,
    end: Arc<AtomicBool>,
    driver: Option<thread::JoinHandle<()>>,
    _turn: MutexGuard<'static, ()>,
}

impl World {
    /// The program in a process of its own.
    fn new(program: &Path) -> Self {
        Self::make(SIZE, |published| {
            let (child, stream, control) = start(program, published);
            (Some(child), stream, control)
        })
        .unwrap()
    }

    /// The loop in this process and a driver with this many buffers for frames. Where this user may not make
    /// namespaces, `None` and a line in the test's output.
    pub(super) fn within(buffers: u16) -> Option<Self> {
        let made = Self::make(buffers, |published| {
            let (stream, control) = start_within(published);
            (None, stream, control)
        });
        made.inspect_err(|error| println!("left out: no network namespace or tap device can be had here ({error})"))
            .ok()
    }

    fn make(buffers: u16, start: impl FnOnce(TcpListener) -> (Option<Child>, UnixStream, OwnedFd)) -> io::Result<Self> {
        let turn = turn();
        let (namespace, tap) = thread::spawn(make).join().unwrap()?;
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let published = listener.local_addr().unwrap();
        let (child, stream, control) = start(listener);
        let ram = Arc::new(memory::create(128).unwrap());
        let mut net = net::connect(stream).unwrap().0;
        let (mut rx, tx) = (Side::new(&ram, 0), Side::new(&ram, 1));
        for id in 0..buffers {
            rx.describe(id, DATA[0] + u64::from(id) * BUFFER, BUFFER as u32, true);
            rx.offer(id);
        }
        // All but indirect descriptors.
        let features = net.features() & !(1 << 28) | 1 << 32;
        let queues = vec![Some(rx.active()), Some(tx.active())];
        let config_interrupt: Arc<dyn Interrupt> = Arc::new(Line(EventFd::new(0).unwrap()));
        net.activate(Activation {
            memory: Arc::clone(&ram),
            features,
            queues,
            config_interrupt,
            exit: bulkhead_vmm::exit::ExitSignal::new().unwrap(),
        })
        .unwrap();
        rx.publish(0);
        let (end, counters) = (Arc::new(AtomicBool::new(false)), Arc::new(Counters::default()));
        let shared = (Arc::clone(&end), Arc::clone(&counters));
        let driver = Some(thread::spawn(move || drive(rx, tx, tap, &shared.0, &shared.1)));
        Ok(Self { child, _net: (net, control), published, namespace, counters, end, driver, _turn: turn })
    }

    /// Runs something in the guest.
    pub(super) fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let namespace = self.namespace.try_clone().unwrap();
        thread::spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// A connection of the guest that does this.
    pub(super) fn outbound<T: Send + 'static>(
        &self,
        work: impl FnOnce(TcpStream) -> T + Send + 'static,
    ) -> (TcpStream, thread::JoinHandle<T>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = (example().host, listener.local_addr().unwrap().port());
        let guest = self.inside(move || work(TcpStream::connect(place).unwrap()));
        (listener.accept().unwrap().0, guest)
    }

    fn bulk(&self, row: &str, stream: TcpStream, guest: thread::JoinHandle<usize>, bytes: usize) {
        let Counters { frames, buffers, bytes: all, calls, offers, answers, kicks } = &*self.counters;
        let read = || {
            [frames, buffers, calls, offers, answers, kicks, all].map(|counter| counter.load(Ordering::Relaxed) as f64)
        };
        let (before, counted, begun) = (cpu(self.child.as_ref()), read(), Instant::now());
        give(stream, bytes);
        assert_eq!(guest.join().unwrap(), bytes);
        let (seconds, after, now) = (begun.elapsed().as_secs_f64(), cpu(self.child.as_ref()), read());
        let (gb, mb) = (bytes as f64 / 1e9, bytes as f64 / 1e6);
        let each: Vec<_> = now.iter().zip(counted).map(|(now, before)| (now - before) / mb).collect();
        println!(
            "{row}: {:.0} MB/s, user {:.3} s/GB, system {:.3} s/GB; per MB {:.1} frames, {:.1} buffers, {:.2} interrupts, \
             {:.2} kicks for buffers, {:.1} frames of the guest, {:.2} kicks for them; {:.0} bytes in a frame",
            mb / seconds,
            (after[0] - before[0]) / gb,
            (after[1] - before[1]) / gb,
            each[0],
            each[1],
            each[2],
            each[3],
            each[4],
            each[5],
            each[6] / each[0],
        );
    }

    fn round_trips(&self, count: usize) {
        let (mut stream, guest) = self.outbound(|mut stream| {
            stream.set_nodelay(true).unwrap();
            let mut message = [0; 128];
            while stream.read_exact(&mut message).is_ok() {
                stream.write_all(&message).unwrap();
            }
        });
        stream.set_nodelay(true).unwrap();
        let before = cpu(self.child.as_ref());
        let trip = |_| {
            let begun = Instant::now();
            stream.write_all(&[7; 128]).unwrap();
            stream.read_exact(&mut [0; 128]).unwrap();
            begun.elapsed()
        };
        let mut times: Vec<_> = (0..count).map(trip).collect();
        let after = cpu(self.child.as_ref());
        times.sort();
        let [user, system] = [0, 1].map(|at| (after[at] - before[at]) / count as f64 * 1e6);
        let median = times[count / 2];
        println!("128 bytes there and back: median {median:.1?}, user {user:.1} µs, system {system:.1} µs");
        drop(stream);
        guest.join().unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.driver.take().map(thread::JoinHandle::join);
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

#[test]
#[ignore = "a measurement"]
fn what_a_gigabyte_to_the_guest_costs() {
    let program = std::env::var("BULKHEAD_NET_PROGRAM").unwrap_or_else(|_| "target/release/bulkhead".to_owned());
    let bytes = std::env::var("MEGABYTES").map_or(2048, |text| text.parse().unwrap()) << 20;
    let world = World::new(Path::new(&program));
    let (stream, guest) = world.outbound(swallow);
    world.bulk("host to guest", stream, guest, bytes);
    let listener = world.inside(|| TcpListener::bind((example().guest, 80)).unwrap()).join().unwrap();
    let guest = world.inside(move || swallow(listener.accept().unwrap().0));
    world.bulk("published port, to guest", TcpStream::connect(world.published).unwrap(), guest, bytes);
    world.round_trips(20_000);
}
