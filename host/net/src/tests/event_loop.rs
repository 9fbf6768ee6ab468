//! The process's whole loop behind real queues, with this machine's kernel as the guest: nothing may wait for something
//! else to happen.

use std::{
    io::{ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread,
    time::{Duration, Instant},
};

use nix::sys::socket::{
    MsgFlags, send, setsockopt,
    sockopt::{Linger, RcvBuf},
};

use crate::{
    addresses::example,
    tests::driver::{SIZE, World},
};
use bulkhead_queue::testing::Numbers;

/// Longer than anything takes here.
const TEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Shorter than the first timeout after which the stack acts by itself.
const AT_ONCE: Duration = Duration::from_millis(250);
/// Longest that a small exchange may take among many, on a machine that does other things.
const MAX_WAIT: Duration = Duration::from_secs(4);

/// A connection of the guest over which a byte went, and what becomes of it: its end or error, and when.
fn quiet(world: &World) -> (TcpStream, thread::JoinHandle<(std::io::Result<usize>, Instant)>) {
    let (mut host, guest) = world.outbound(|mut stream| {
        stream.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        stream.write_all(b"a").unwrap();
        (stream.read(&mut [0]), Instant::now())
    });
    host.write_all(b"q").unwrap();
    host.read_exact(&mut [0]).unwrap();
    // Until nothing is under way, nor any timer.
    thread::sleep(Duration::from_millis(100));
    (host, guest)
}

/// A busy machine is late now and then, mostly even, and now and then something else comes to help.
fn assert_at_once(mut each: impl FnMut() -> Duration) {
    let mut late: Vec<_> = (0..5).map(|_| each()).collect();
    late.sort();
    assert!(late[1] < AT_ONCE, "{late:?}");
}

#[test]
fn the_end_of_a_quiet_connection_reaches_the_guest_at_once() {
    let Some(world) = World::within(SIZE) else { return };
    let late = || {
        let (host, guest) = quiet(&world);
        let begun = Instant::now();
        host.shutdown(Shutdown::Write).unwrap();
        let (result, at) = guest.join().unwrap();
        assert_eq!(result.unwrap(), 0);
        at - begun
    };
    assert_at_once(late);
}

#[test]
fn the_reset_of_a_quiet_connection_reaches_the_guest_at_once() {
    let Some(world) = World::within(SIZE) else { return };
    let late = || {
        let (host, guest) = quiet(&world);
        setsockopt(&host, Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
        let begun = Instant::now();
        drop(host);
        let (result, at) = guest.join().unwrap();
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionReset);
        at - begun
    };
    assert_at_once(late);
}

#[test]
fn urgent_data_reaches_the_guest_in_its_place_and_so_does_data_behind_it() {
    let Some(world) = World::within(SIZE) else { return };
    for _ in 0..20 {
        let (mut host, guest) = world.outbound(|mut stream| {
            stream.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
            let mut data = [0; 8];
            stream.read_exact(&mut data).map(|()| data)
        });
        host.set_nodelay(true).unwrap();
        thread::sleep(Duration::from_millis(10));
        host.write_all(b"abc").unwrap();
        send(host.as_raw_fd(), b"def", MsgFlags::MSG_OOB).unwrap();
        host.write_all(b"gh").unwrap();
        assert_eq!(guest.join().unwrap().unwrap(), *b"abcdefgh");
    }
}

/// Asks and is answered: each time a length, which the other side sends back as so many bytes. The longest wait.
fn ask(mut stream: TcpStream, seed: u32, rounds: u32) -> Duration {
    stream.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let (mut numbers, mut longest) = (Numbers(seed), Duration::ZERO);
    for _ in 0..rounds {
        let len = if numbers.below(8) == 0 { numbers.below(300_000) } else { numbers.below(3000) } + 1;
        let begun = Instant::now();
        stream.write_all(&len.to_le_bytes()).unwrap();
        let mut rest = len as usize;
        let mut data = vec![0; 65_536];
        while rest > 0 {
            let some = numbers.below(65_536) as usize + 1;
            let len = stream.read(&mut data[..some.min(rest)]).unwrap();
            assert!(len > 0, "the end, with {rest} bytes to come");
            rest -= len;
        }
        longest = longest.max(begun.elapsed());
        if numbers.below(3) == 0 {
            thread::sleep(Duration::from_micros(numbers.below(20_000).into()));
        }
    }
    let begun = Instant::now();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    longest.max(begun.elapsed())
}

/// The other side.
fn reply(mut stream: TcpStream, seed: u32) {
    let mut numbers = Numbers(seed);
    let mut len = [0; 4];
    while stream.read_exact(&mut len).is_ok() {
        if numbers.below(3) == 0 {
            thread::sleep(Duration::from_micros(numbers.below(5000).into()));
        }
        let data = vec![7; u32::from_le_bytes(len) as usize];
        let (now, later) = data.split_at(numbers.below(data.len() as u32 + 1) as usize);
        stream.write_all(now).unwrap();
        if numbers.below(4) == 0 {
            thread::sleep(Duration::from_micros(numbers.below(2000).into()));
        }
        stream.write_all(later).unwrap();
    }
}

fn replies(listener: TcpListener) {
    thread::spawn(move || {
        for (seed, stream) in (0..).zip(listener.incoming()) {
            let stream = stream.unwrap();
            thread::spawn(move || reply(stream, seed));
        }
    });
}

/// Small requests and answers of many connections at once, in both directions, with this many buffers for frames.
fn flows(buffers: u16, rounds: u32) {
    const EACH: u32 = 24;
    let Some(world) = World::within(buffers) else { return };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    replies(listener);
    world.inside(|| replies(TcpListener::bind((example().guest, 80)).unwrap())).join().unwrap();
    let published = world.published;
    let clients: Vec<_> = (0..EACH)
        .map(|seed| world.inside(move || ask(TcpStream::connect((example().host, port)).unwrap(), seed, rounds)))
        .chain(
            (0..EACH)
                .map(|seed| thread::spawn(move || ask(TcpStream::connect(published).unwrap(), seed + 1000, rounds))),
        )
        .collect();
    let longest = clients.into_iter().map(|client| client.join().unwrap()).max().unwrap();
    println!("{buffers} buffers: the longest of {} waits was {longest:.1?}", 2 * EACH * rounds);
    assert!(longest < MAX_WAIT, "{longest:?}");
}

#[test]
fn none_of_many_small_flows_stands_still() {
    flows(SIZE, 150);
}

#[test]
fn none_of_many_small_flows_stands_still_for_a_guest_with_few_buffers() {
    flows(40, 60);
}

/// Reads so many bytes; the longest wait for some.
fn read_all(mut stream: TcpStream, bytes: usize) -> Duration {
    stream.set_read_timeout(Some(TEST_TIMEOUT)).unwrap();
    let (mut data, mut rest, mut longest) = (vec![0; 4000], bytes, Duration::ZERO);
    while rest > 0 {
        let begun = Instant::now();
        let len = stream.read(&mut data).unwrap();
        assert!(len > 0, "the end, with {rest} bytes to come");
        longest = longest.max(begun.elapsed());
        rest -= len;
    }
    longest
}

/// The longest wait of a guest that closes its window over data in flight, and reads again after a moment.
fn window_taken_back(world: &World) -> Duration {
    const PROMISED: usize = 20_000;
    const LATER: usize = 400_000;
    let (mut host, guest) = world.outbound(|mut stream| {
        setsockopt(&stream, RcvBuf, &200_000).unwrap();
        stream.write_all(b"a").unwrap();
        thread::sleep(Duration::from_millis(100));
        // Less than what is there and far less than what was promised.
        setsockopt(&stream, RcvBuf, &2048).unwrap();
        stream.write_all(b"b").unwrap();
        thread::sleep(Duration::from_millis(300));
        setsockopt(&stream, RcvBuf, &20_000).unwrap();
        read_all(stream, PROMISED + LATER)
    });
    host.read_exact(&mut [0]).unwrap();
    host.write_all(&vec![1; PROMISED]).unwrap();
    host.read_exact(&mut [0]).unwrap();
    let writer = thread::spawn(move || host.write_all(&vec![1; LATER]).map(|()| host));
    let longest = guest.join().unwrap();
    writer.join().unwrap().unwrap();
    longest
}

#[test]
fn data_dropped_by_a_closing_window_comes_at_once_when_it_opens() {
    let Some(world) = World::within(SIZE) else { return };
    assert_at_once(|| window_taken_back(&world));
}
