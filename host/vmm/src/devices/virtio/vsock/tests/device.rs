//! The whole device with its thread, real sockets and a driver.

use std::{
    io::{self, ErrorKind, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::{
    driver::{Driver, Layout, RX, TX},
    echo::Echo,
    machine::{CID, GUEST_BUFFER, Machine, answer, pattern, read, reads_end, request},
};
use crate::devices::virtio::{
    ActivateError, VirtioDevice,
    vsock::{
        Vsock, VsockHandle,
        muxer::MAX_CONNECTIONS,
        packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND},
    },
};

/// The guest as an echo server: accepts everything, sends back what it reads, closes when the host is done.
fn echo(driver: &mut Driver, until_closed: usize) {
    let mut echo = Echo::default();
    let (mut pieces, mut last) = (0, Instant::now());
    while echo.closed < until_closed {
        while let Some((header, payload)) = driver.try_receive() {
            last = Instant::now();
            if let Some(answer) = echo.on_packet(&header, payload) {
                driver.send(&answer, b"", Layout::One);
            }
        }
        for port in echo.ports() {
            let most = if driver.can_send() { 60_000 } else { 0 };
            let Some((header, data)) = echo.next_packet(port, most) else { continue };
            if data.is_empty() {
                driver.send(&header, b"", Layout::One);
                continue;
            }
            pieces = pieces % 20 + 1;
            driver.send(&header, &data, if pieces == 1 { Layout::One } else { Layout::Pieces(pieces) });
        }
        assert!(last.elapsed() < Duration::from_secs(30), "{} of {until_closed} streams ended", echo.closed);
        thread::sleep(Duration::from_micros(20));
    }
}

/// Writes all data, ends its half, and expects the data back.
fn talk(mut stream: UnixStream, data: Vec<u8>, slow: bool) -> io::Result<bool> {
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut writer = stream.try_clone()?;
    let copy = data.clone();
    let writing = thread::spawn(move || {
        for chunk in copy.chunks(50_001) {
            writer.write_all(chunk)?;
        }
        writer.shutdown(std::net::Shutdown::Write)
    });
    let mut back: Vec<u8> = Vec::new();
    let mut chunk = vec![0; 16 << 10];
    loop {
        match stream.read(&mut chunk)? {
            0 => break,
            len => back.extend(&chunk[..len]),
        }
        if slow {
            thread::sleep(Duration::from_millis(1));
        }
    }
    writing.join().unwrap()?;
    Ok(back == data)
}

fn echo_through(event_idx: bool, slow: bool) {
    let mut machine = Machine::off(Driver::new(event_idx, 4096));
    machine.driver.offer_rx(0..200);
    machine.device.activate(machine.driver.activation()).unwrap();
    let talks: Vec<_> = (0..3)
        .map(|index| {
            let stream = machine.hand_in(1024);
            let data = pattern((1 << 20) + index * 777);
            thread::spawn(move || talk(stream, data, slow))
        })
        .collect();
    echo(&mut machine.driver, 3);
    for talk in talks {
        assert!(talk.join().unwrap().unwrap(), "other bytes came back");
    }
}

#[test]
fn a_mebibyte_and_its_end_pass_through_and_come_back_exactly() {
    echo_through(true, false);
    echo_through(false, false);
}

#[test]
fn a_slow_reader_loses_nothing() {
    echo_through(true, true);
}

#[test]
fn six_hundred_connections_work_at_once() {
    // Both ends of every stream are in this process.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard.min(8192), hard).unwrap();
    let mut machine = Machine::on();
    let mut hosts: Vec<UnixStream> = (0..600).map(|_| machine.hand_in(1024)).collect();
    let talks = thread::spawn(move || {
        for host in &mut hosts {
            host.write_all(b"ping").unwrap();
        }
        for host in &mut hosts {
            assert_eq!(read(host, 4), b"ping");
        }
        for host in &mut hosts {
            host.shutdown(std::net::Shutdown::Write).unwrap();
            assert!(reads_end(host));
        }
    });
    echo(&mut machine.driver, 600);
    talks.join().unwrap();
}

#[test]
fn a_client_of_the_hybrid_socket_reads_ok_and_talks() {
    let mut machine = Machine::on();
    let mut client = UnixStream::connect(machine.socket()).unwrap();
    client.write_all(b"CONNECT 52\n").unwrap();
    let header = machine.expect(Op::Request);
    assert_eq!(header.dst_port, 52);
    machine.send(answer(&header, Op::Response), b"");
    let line = format!("OK {}\n", header.src_port);
    assert_eq!(read(&mut client, line.len()), line.as_bytes());
    machine.send(answer(&header, Op::Rw), b"from the guest");
    assert_eq!(read(&mut client, 14), b"from the guest");
    client.write_all(b"from the host").unwrap();
    assert_eq!(machine.driver.receive().1, b"from the host");
}

#[test]
fn a_client_whose_port_is_not_served_is_closed_without_ok() {
    let mut machine = Machine::on();
    let mut client = UnixStream::connect(machine.socket()).unwrap();
    client.write_all(b"CONNECT 52\n").unwrap();
    let header = machine.expect(Op::Request);
    machine.send(answer(&header, Op::Rst), b"");
    assert!(reads_end(&mut client));
}

#[test]
fn half_closes_in_either_order_reach_the_other_side() {
    let mut machine = Machine::on();
    let (mut host, guest) = machine.stream();
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(machine.expect(Op::Shutdown).flags, SHUTDOWN_SEND);
    machine.send(guest, b"still here");
    assert_eq!(read(&mut host, 10), b"still here");
    machine.send(Header { op: Op::Shutdown.to_wire(), flags: SHUTDOWN_BOTH, ..guest }, b"");
    assert!(reads_end(&mut host));
    machine.expect(Op::Rst);

    let (mut host, guest) = machine.stream();
    machine.send(Header { op: Op::Shutdown.to_wire(), flags: SHUTDOWN_SEND, ..guest }, b"");
    assert!(reads_end(&mut host));
    host.write_all(b"still here").unwrap();
    assert_eq!(machine.driver.receive().1, b"still here");
    drop(host);
    assert_eq!(machine.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
    machine.send(Header { op: Op::Rst.to_wire(), ..guest }, b"");
}

#[test]
fn a_payload_may_lie_in_one_descriptor_with_the_header_or_in_many() {
    let mut machine = Machine::on();
    let (mut host, guest) = machine.stream();
    let data = pattern(60_000);
    let header = Header { len: data.len() as u32, ..guest };
    for layout in [Layout::One, Layout::Pieces(2), Layout::Pieces(3), Layout::Pieces(17), Layout::Pieces(250)] {
        machine.driver.send(&header, &data, layout);
        assert!(read(&mut host, data.len()) == data, "{layout:?}");
    }
}

#[test]
fn a_packet_that_claims_more_than_its_chain_holds_ends_its_connection() {
    let mut machine = Machine::on();
    let (mut host, guest) = machine.stream();
    machine.driver.send(&Header { len: 11, ..guest }, &[1; 10], Layout::Pieces(3));
    machine.expect(Op::Rst);
    assert!(reads_end(&mut host), "nothing of it reaches the host");
}

#[test]
fn streams_handed_in_before_the_driver_is_up_wait_for_it() {
    let mut machine = Machine::off(Driver::new(true, 4096));
    let mut early = machine.hand_in(1024);
    early.write_all(b"early").unwrap();
    let mut client = UnixStream::connect(machine.socket()).unwrap();
    client.write_all(b"CONNECT 1024\n").unwrap();
    machine.driver.offer_rx(0..8);
    machine.device.activate(machine.driver.activation()).unwrap();
    let first = machine.expect(Op::Request);
    machine.expect(Op::Request);
    machine.send(answer(&first, Op::Response), b"");
    assert_eq!(machine.driver.receive().1, b"early");
}

#[test]
fn streams_that_wait_for_the_driver_are_bounded() {
    let machine = Machine::off(Driver::new(true, 4096));
    let (_ours, theirs) = UnixStream::pair().unwrap();
    for _ in 0..MAX_CONNECTIONS {
        // Copies of one descriptor are enough to fill the queue. Without descriptors left there is nothing to test.
        let Ok(copy) = theirs.try_clone() else { return };
        machine.handle.connect(1, copy.into());
    }
    assert!(reads_end(&mut machine.hand_in(1)));
}

#[test]
fn after_a_reset_old_streams_are_over_and_the_device_starts_again() {
    let mut machine = Machine::on();
    let (mut host, _) = machine.stream();
    machine.device.reset();
    assert!(reads_end(&mut host));
    let mut waiting = UnixStream::connect(machine.socket()).unwrap();
    waiting.write_all(b"CONNECT 9\n").unwrap();

    machine.driver = Driver::new(false, 8192);
    machine.driver.offer_rx(0..16);
    machine.device.activate(machine.driver.activation()).unwrap();
    let header = machine.expect(Op::Request);
    assert_eq!(header.dst_port, 9, "the listener survives");
    machine.send(answer(&header, Op::Response), b"");
    assert_eq!(read(&mut waiting, 3), b"OK ");
    let (mut host, guest) = machine.stream();
    machine.send(guest, b"again");
    assert_eq!(read(&mut host, 5), b"again");
}

#[test]
fn answers_without_buffers_stall_the_transmit_queue_and_none_is_lost() {
    let mut machine = Machine::off(Driver::new(true, 4096));
    machine.device.activate(machine.driver.activation()).unwrap();
    let mut sent = 0_u32;
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(300) {
        if machine.driver.can_send() {
            machine.driver.send(&request(sent, 4242), b"", Layout::One);
            sent += 1;
        } else {
            thread::sleep(Duration::from_millis(1));
        }
    }
    assert!((256..1000).contains(&sent), "{sent} packets taken without room for the answers");
    machine.assert_idle();
    machine.driver.offer_rx(0..16);
    for port in 0..sent {
        assert_eq!(machine.expect(Op::Rst).dst_port, port);
    }
}

#[test]
fn a_stream_that_waits_for_a_buffer_does_not_spin() {
    let mut machine = Machine::off(Driver::new(true, 4096));
    machine.driver.offer_rx(0..1);
    machine.device.activate(machine.driver.activation()).unwrap();
    let mut host = machine.hand_in(1024);
    let start = Instant::now();
    // Take the request without offering its buffer again.
    while machine.driver.returned(RX).is_none() {
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    let reply = Header { dst_port: 1 << 30, op: Op::Response.to_wire(), ..request(1024, 0) };
    machine.driver.send(&reply, b"", Layout::One);
    host.write_all(&[1; 10_000]).unwrap();
    drop(host);
    machine.assert_idle();
    machine.driver.offer_rx(0..4);
    let mut bytes = 0;
    while bytes < 10_000 {
        bytes += machine.driver.receive().1.len();
    }
    assert_eq!(machine.expect(Op::Shutdown).flags, SHUTDOWN_BOTH);
}

#[test]
fn a_guest_that_takes_nothing_is_not_sent_more_than_it_can_hold() {
    let mut machine = Machine::on();
    let (mut host, _) = machine.stream();
    let writing = thread::spawn(move || {
        for _ in 0..3000 {
            // One byte, one packet, unless they pile up.
            if host.write_all(b"x").is_err() {
                break;
            }
        }
        host
    });
    let (mut packets, mut bytes, mut asked) = (0, 0, false);
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(400) {
        let Some((header, payload)) = machine.driver.try_receive() else { continue };
        asked |= header.op == Op::CreditRequest.to_wire();
        if !payload.is_empty() {
            packets += 1;
            bytes += payload.len();
        }
    }
    assert!(packets * 576 + bytes <= GUEST_BUFFER as usize, "{packets} packets of {bytes} bytes in all");
    assert!(asked || bytes == 3000);
    // The writer may be stuck behind the credit that never comes: its stream ends with the device.
    drop(machine);
    drop(writing.join().unwrap());
}

#[test]
fn garbage_from_the_guest_neither_stops_nor_crashes_the_device() {
    let mut machine = Machine::on();
    for len in [0, 1, 43] {
        machine.driver.send_bytes(&vec![0xff; len], Layout::One);
    }
    for seed in 0..400_u32 {
        let mut bytes: Vec<u8> = (0..44 + seed % 50)
            .map(|index| (index ^ seed).wrapping_mul(2_654_435_761).rotate_left(seed % 32) as u8)
            .collect();
        if seed % 2 == 0 {
            // Close to real: the addresses are right.
            bytes[..16].copy_from_slice(&request(0, 0).to_bytes()[..16]);
            bytes[28..32].copy_from_slice(&[1, 0, (seed % 9) as u8, 0]);
        }
        machine.driver.send_bytes(&bytes, Layout::Pieces(1 + seed as usize % 7));
        while machine.driver.try_receive().is_some() {}
    }
    // A chain outside of memory, and buffers that cannot hold a header.
    machine.driver.describe(TX, 200, u64::MAX - 5, 100, 0);
    machine.driver.offer(TX, 200);
    machine.driver.describe(RX, 250, 0x1000, 0, 2);
    machine.driver.offer(RX, 250);
    thread::sleep(Duration::from_millis(50));
    while machine.driver.returned(TX).is_some() {}

    let mut host = machine.hand_in(77);
    let start = Instant::now();
    let header = loop {
        assert!(start.elapsed() < Duration::from_secs(20));
        if let Some((header, _)) = machine.driver.try_receive()
            && header.op == Op::Request.to_wire()
        {
            break header;
        }
    };
    machine.send(answer(&header, Op::Response), b"");
    machine.send(answer(&header, Op::Rw), b"alive");
    assert_eq!(read(&mut host, 5), b"alive");
}

#[test]
fn a_buffer_too_small_for_a_header_goes_back_empty() {
    let mut machine = Machine::off(Driver::new(true, 4096));
    machine.driver.describe(RX, 250, 0x20_0000, 43, 2);
    machine.driver.offer(RX, 250);
    machine.device.activate(machine.driver.activation()).unwrap();
    let _host = machine.hand_in(77);
    let start = Instant::now();
    loop {
        if let Some(returned) = machine.driver.returned(RX) {
            assert_eq!(returned, (250, 0));
            break;
        }
        assert!(start.elapsed() < Duration::from_secs(20));
    }
    machine.driver.offer_rx(0..1);
    machine.expect(Op::Request);
}

#[test]
fn a_broken_ring_does_not_spin_and_a_reset_mends_it() {
    for ring in [RX, TX] {
        let mut machine = Machine::on();
        machine.driver.corrupt_avail(ring, 0x8000);
        let _host = machine.hand_in(1);
        machine.assert_idle();
        machine.device.reset();
        machine.driver = Driver::new(true, 4096);
        machine.driver.offer_rx(0..4);
        machine.device.activate(machine.driver.activation()).unwrap();
        let (mut host, guest) = machine.stream();
        machine.send(guest, b"mended");
        assert_eq!(read(&mut host, 6), b"mended");
    }
}

#[test]
fn the_driver_is_interrupted_once_for_packets_that_it_has_not_seen() {
    let mut machine = Machine::on();
    let (mut host, _) = machine.stream();
    let before = machine.driver.interrupts(RX);
    host.write_all(&pattern(100 << 10)).unwrap();
    thread::sleep(Duration::from_millis(200));
    let interrupts = machine.driver.interrupts(RX) - before;
    assert_eq!(interrupts, 1, "the driver had not looked since the first");
    let mut bytes = 0;
    while bytes < 100 << 10 {
        bytes += machine.driver.receive().1.len();
    }
}

#[test]
fn the_configuration_space_is_the_guests_context_id() {
    let directory = tempfile::tempdir().unwrap();
    let (device, _) = Vsock::new(0x0102_0304, &directory.path().join("v"), false).unwrap();
    let mut bytes = [0xff; 12];
    device.read_config(0, &mut bytes);
    assert_eq!(bytes, [4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
    let mut word = [0xff; 2];
    device.read_config(1, &mut word);
    assert_eq!(word, [3, 2]);
    device.read_config(u64::MAX, &mut word);
    assert_eq!(word, [0, 0]);
    assert_eq!(device.device_type(), 19);
    assert_eq!(device.queue_max_sizes().len(), 3);
}

#[test]
fn reserved_context_ids_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u32::MAX] {
        let error = Vsock::new(cid, &directory.path().join("v"), false).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    assert!(!directory.path().join("v").exists());
}

#[test]
fn the_socket_is_the_owners_and_streams_end_with_the_device() {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let (device, handle) = Vsock::new(CID, &path, false).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let (mut waiting, theirs) = UnixStream::pair().unwrap();
    handle.offer(1, theirs.into());
    drop(device);
    assert!(reads_end(&mut waiting));
    for give in [VsockHandle::connect, VsockHandle::offer] {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        give(&handle, 1, theirs.into());
        assert!(reads_end(&mut ours), "a handle that outlives the device holds no streams");
    }
}

#[test]
fn a_stale_socket_is_replaced_but_nothing_that_lives() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let (_device, _) = Vsock::new(CID, &path, false).unwrap();
    let refused = |path: &Path| Vsock::new(CID, path, false).err().map(|error| error.kind());
    assert_eq!(refused(&path), Some(ErrorKind::AddrInUse), "somebody listens");
    assert!(UnixStream::connect(&path).is_ok());
    let file = directory.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert_eq!(refused(&file), Some(ErrorKind::AddrInUse));
    assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    assert_eq!(refused(&directory.path().join("nowhere/v")), Some(ErrorKind::NotFound));
    assert_eq!(refused(&directory.path().join("x".repeat(108))), Some(ErrorKind::InvalidInput));
}

#[test]
fn a_device_without_its_queues_does_not_start() {
    let mut machine = Machine::off(Driver::new(true, 4096));
    for missing in [RX, TX] {
        let mut activation = machine.driver.activation();
        activation.queues[missing] = None;
        let error = machine.device.activate(activation).unwrap_err();
        assert!(matches!(error, ActivateError::MissingQueue(queue) if queue == missing));
    }
}
