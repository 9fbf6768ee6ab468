//! Much data through published ports, and ends that are not orderly.

use super::{
    ports::{Container, HERE, connect},
    *,
};

/// Half of it each way.
const GIGABYTE: usize = 1_000_000_000;
const LINE: &[u8] = b"0123456789abcde\n";

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_gigabyte_passes_a_published_port_byte_exact() {
    let _engine = engine();
    let port = free(2);
    // A container that ends takes along what its kernel has not sent yet.
    let source = format!("yes 0123456789abcde | head -c {} | nc -l -p 80; sleep 600", GIGABYTE / 2);
    let (first, second) = (format!("127.0.0.1:{port}:80"), format!("127.0.0.1:{}:80", port + 1));
    let _source = Container::run(&["--publish", &first, "alpine", "sh", "-c", &source]);
    let sink = Container::run(&["--publish", &second, "alpine", "sh", "-c", "sleep 1000 | nc -l -p 80 | sha256sum"]);
    let begun = Instant::now();
    let mut stream = listening(port);
    let (mut buffer, mut received) = (vec![0; 1 << 20], 0);
    loop {
        let len = stream.read(&mut buffer).unwrap();
        if len == 0 {
            break;
        }
        let right = buffer[..len].iter().enumerate().all(|(at, byte)| *byte == LINE[(received + at) % LINE.len()]);
        assert!(right, "wrong data after {received} bytes");
        received += len;
    }
    assert_eq!(received, GIGABYTE / 2, "the stream ended early; the engine: {}", status());
    println!("{received} bytes out of a container in {:.1?}", begun.elapsed());
    let begun = Instant::now();
    let mut stream = listening(port + 1);
    let (mut hash, block) = (Sha256::new(), pattern(1 << 20));
    let mut left = GIGABYTE / 2;
    while left > 0 {
        let part = &block[..block.len().min(left)];
        stream.write_all(part).unwrap();
        hash.update(part);
        left -= part.len();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    let printed = loop {
        let printed = sink.output();
        if !printed.is_empty() {
            break printed;
        }
        assert!(Instant::now() < deadline, "the container does not see the end");
        thread::sleep(Duration::from_millis(100));
    };
    println!("{} bytes into a container in {:.1?}", GIGABYTE / 2, begun.elapsed());
    let expected = hash.finalize().iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    assert_eq!(printed, format!("{expected}  -\n"));
}

/// A connection that is still open after a moment: before its program listens, a container resets.
fn listening(port: u16) -> TcpStream {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let stream = connect(HERE, port).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let open = match stream.peek(&mut [0]) {
            Ok(len) => len > 0,
            Err(error) => error.kind() == std::io::ErrorKind::WouldBlock,
        };
        if open {
            stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
            return stream;
        }
        assert!(Instant::now() < deadline, "nobody listens behind port {port}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_client_is_not_left_waiting_for_a_container_that_was_killed() {
    let _engine = engine();
    let port = free(1);
    let publish = format!("127.0.0.1:{port}:80");
    let container = Container::run(&["--publish", &publish, "alpine", "sh", "-c", "sleep 1000 | nc -l -p 80"]);
    let mut stream = listening(port);
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    container.tell(&["kill"]);
    let begun = Instant::now();
    let end = stream.read(&mut [0]);
    println!("told after {:.1?}: {end:?}", begun.elapsed());
    let told = match &end {
        Ok(len) => *len == 0,
        Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
    };
    assert!(told, "{end:?}");
}
