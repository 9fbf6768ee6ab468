//! A FUSE file system of a container that answers neither reads nor lookups of one name.

use std::{
    fs,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, FromRawFd},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::{
    SCENARIO,
    contained::{assert_own, errno, mounts, mounts_from, unmounts},
};

/// Processes of one container that may be left behind.
pub const MAX_LEFT_BEHIND: usize = 8;

/// Calls of the scenario at the same time, more than what may be left behind.
const CALLS: usize = MAX_LEFT_BEHIND + 4;

/// Environment variable with the number of a caller.
const CALLER: &str = "PROCFS_TEST_CALLER";

/// Distance of the addresses that the calls read, in bytes: each waits for a request of its own.
const STRIDE: usize = 1 << 16;

/// A file that is read forever.
const FILE: u64 = 2;

const FOPEN_KEEP_CACHE: u64 = 1 << 1;

/// Serves the file system whose connection is the standard input, until its parent's thread ends.
pub fn serve() {
    // Otherwise the parent, which waits for this file system, could not even be killed.
    // SAFETY: takes plain integers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) }, 0);
    // SAFETY: the standard input is not used otherwise.
    let mut device = unsafe { File::from_raw_fd(0) };
    let mut buffer = vec![0; 1 << 17];
    while let Ok(length) = device.read(&mut buffer) {
        let number = |at: usize| u32::from_ne_bytes(buffer[at..at + 4].try_into().unwrap());
        let (opcode, node) = (number(4), u64::from(number(16)));
        let result = match opcode {
            // LOOKUP: of another name, none.
            1 if buffer[40..length] == *b"memory\0" => {
                Ok([words(&[FILE, 0, 3600, 3600, 0]), attributes(FILE)].concat())
            }
            // LOOKUP and READ, for which the kernel waits; FORGET, INTERRUPT and BATCH_FORGET, which have no answer.
            1 | 2 | 15 | 36 | 42 => continue,
            // GETATTR
            3 => Ok([words(&[3600, 0]), attributes(node)].concat()),
            // OPEN: what is cached stays, or opening would wait for the pages that are being read.
            14 => Ok(words(&[7, FOPEN_KEEP_CACHE])),
            // INIT: version 7.31 without any flag, so that each read is waited for by the process that reads.
            26 => Ok([&7_u32.to_ne_bytes()[..], &31_u32.to_ne_bytes(), &words(&[0, 0, 4096, 0, 0, 0, 0])].concat()),
            _ => Err(libc::ENOSYS),
        };
        let (errno, body) = result.map_or_else(|errno| (-errno, Vec::new()), |body| (0, body));
        let mut reply = (16 + body.len() as u32).to_ne_bytes().to_vec();
        reply.extend(errno.to_ne_bytes());
        reply.extend(&buffer[8..16]);
        reply.extend(body);
        device.write_all(&reply).unwrap();
    }
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_attr`: inode, size, blocks, times; then times, mode, links, ids, device, block size.
fn attributes(node: u64) -> Vec<u8> {
    let mode = if node == FILE { libc::S_IFREG | 0o644 } else { libc::S_IFDIR | 0o755 };
    let rest: Vec<u8> =
        [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0].iter().flat_map(|number: &u32| number.to_ne_bytes()).collect();
    [words(&[node, (CALLS * STRIDE) as u64, 0, 0, 0, 0]), rest].concat()
}

/// Mounts the file system at `/tmp/f` and starts its server.
fn start() -> Child {
    mounts("tmpfs", "/tmp", 0, None).unwrap();
    for name in ["/tmp/f", "/tmp/m"] {
        fs::create_dir(name).unwrap();
    }
    let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    mounts("fuse", "/tmp/f", 0, Some(&options)).unwrap();
    // The only copy of the connection from here on: when the server ends, all that waits for it does.
    contained("silent server").stdin(Stdio::from(device)).spawn().unwrap()
}

/// Makes calls whose `part` waits for the file system, and ends when the file `end` appears in `place`.
pub fn play(place: &str, part: &str) {
    let mut server = start();
    // Processes and not threads: one that waits for memory keeps the others of its process from mapping any.
    let callers: Vec<_> = (0..CALLS)
        .map(|number| {
            let mut command = contained(&format!("silent call {part}"));
            command.env(CALLER, number.to_string()).spawn().unwrap()
        })
        .collect();
    // The first calls time out and wait in the kernel. Beyond the bound they fail.
    let results = || (0..CALLS).filter_map(|number| fs::read_to_string(result(number)).ok());
    until("an error", || results().count() > 0);
    until("the results", || results().all(|text| !text.is_empty()));
    assert!(results().all(|text| text == libc::EAGAIN.to_string()), "{:?}", results().collect::<Vec<_>>());
    assert_eq!(errno(unmounts("/tmp/m", 0)), Some(libc::EINVAL), "unmounting is still the kernel's");
    fs::write(format!("{place}/bound"), "").unwrap();
    until("the test's end", || fs::exists(format!("{place}/end")).unwrap());
    server.kill().unwrap();
    server.wait().unwrap();
    for mut caller in callers {
        caller.wait().unwrap();
    }
    // This container is served again, because the calls that waited have ended.
    until("a mount", || mounts("proc", "/tmp/m", 0, None).is_ok());
    assert_own("/tmp/m");
}

/// Makes one call, and writes its error number into a file.
pub fn call(part: &str) {
    let number: usize = std::env::var(CALLER).unwrap().parse().unwrap();
    let result_of = match part {
        "memory" => {
            let address = map(&File::open("/tmp/f/memory").unwrap()) + number * STRIDE;
            // SAFETY: the kernel reads the text, or fails if it cannot.
            let result = unsafe {
                let kind = std::ptr::with_exposed_provenance(address);
                libc::mount(c"none".as_ptr(), c"/tmp/m".as_ptr(), kind, 0, std::ptr::null())
            };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        }
        "source" => mounts_from("/tmp/f/stuck", "/tmp/m", libc::MS_BIND),
        _ => mounts("proc", "/tmp/f/stuck", 0, None),
    };
    fs::write(result(number), errno(result_of).unwrap_or_default().to_string()).unwrap();
}

fn result(number: usize) -> String {
    format!("/tmp/result-{number}")
}

fn map(file: &File) -> usize {
    let (read, length) = (libc::PROT_READ, CALLS * STRIDE);
    // SAFETY: new memory, which stays mapped.
    let address = unsafe { libc::mmap(std::ptr::null_mut(), length, read, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
    assert_ne!(address, libc::MAP_FAILED);
    address.expose_provenance()
}

/// The command for another process of this container.
fn contained(scenario: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "contained", "--nocapture"]).env(SCENARIO, scenario);
    command
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what} does not come");
        thread::sleep(Duration::from_millis(20));
    }
}
