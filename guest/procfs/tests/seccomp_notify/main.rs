//! A procfs or sysfs that a container mounts itself. Needs root, `/dev/fuse` and user namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod contained;
mod silent;

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            ffi::OsStrExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use bulkhead_guest_common::registry::Registry;
use bulkhead_procfs::seccomp_notify::KEPT_PREFIX;
use support::procfs::{Service, container};

/// The scenario that the contained process plays; without it, it does nothing.
const SCENARIO: &str = "PROCFS_TEST_SCENARIO";
const PLACE: &str = "PROCFS_TEST_PLACE";

/// Longer than the time limit of a worker.
const BOUND: Duration = Duration::from_secs(20);

struct Init {
    dir: tempfile::TempDir,
    service: Service,
    slot: u64,
}

impl Init {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/run").unwrap();
        let state = dir.path().join("procfs");
        let service = Service::new(Path::new(env!("CARGO_BIN_EXE_bulkhead-procfs")), &state);
        fs::create_dir(dir.path().join("p")).unwrap();
        // The contained process has no rights here.
        set_mode(dir.path(), 0o755);
        let slot = enter(&state, "c");
        Self { dir, service, slot }
    }

    /// The command for a process in namespaces of its own.
    fn command(&self, scenario: &str) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["--user", "--map-root-user", "--mount", "--pid", "--fork", "--kill-child", "--"])
            .arg(std::env::current_exe().unwrap())
            .args(["--ignored", "--exact", "contained", "--nocapture"])
            .env(SCENARIO, scenario)
            .env(PLACE, self.dir.path().join("p"))
            .current_dir("/");
        command
    }

    /// Starts a process in namespaces of its own, whose mounts are reported to `socket`.
    fn container(&self, scenario: &str, socket: &Path) -> Child {
        let mut command = self.command(scenario);
        let socket = socket.to_owned();
        let message = format!("{{\"metadata\":\"{}\",\"state\":{{}}}}", self.slot);
        // SAFETY: the test has a single thread that could hold a lock, and this is it.
        unsafe { command.pre_exec(move || filter(&socket, message.as_bytes())) };
        command.spawn().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("procfs/mounts")
    }

    fn run(&self, scenario: &str) {
        let mut child = self.container(scenario, &self.socket());
        assert!(ended(&mut child), "{scenario} failed");
    }
}

/// Enters a container that lives as long as this process, and returns its number.
fn enter(state: &Path, id: &str) -> u64 {
    Registry::open(state).unwrap().enter(container(id)).unwrap()
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Waits for a child up to the bound, and returns whether it succeeded.
fn ended(child: &mut Child) -> bool {
    let deadline = Instant::now() + BOUND;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return status.success();
        }
        thread::sleep(Duration::from_millis(5));
    }
    let _ = child.kill();
    let _ = child.wait();
    panic!("it hangs");
}

const fn step(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

const fn when(k: u32, jt: u8) -> libc::sock_filter {
    libc::sock_filter { code: 0x15, jt, jf: 0, k }
}

/// Reports mount, umount2 and fsopen.
const FILTER: [libc::sock_filter; 6] = reporting(libc::SECCOMP_RET_USER_NOTIF);

const fn reporting(how: u32) -> [libc::sock_filter; 6] {
    [step(0x20, 0), when(165, 3), when(166, 2), when(430, 1), step(0x06, libc::SECCOMP_RET_ALLOW), step(0x06, how)]
}

/// Installs the filter on this process and sends its descriptor, as crun does.
fn filter(socket: &Path, message: &[u8]) -> io::Result<()> {
    // SAFETY: structures of integers and pointers to what outlives the calls that read them.
    unsafe {
        let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) };
        let stream = check(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0).into())?;
        let mut address: libc::sockaddr_un = std::mem::zeroed();
        address.sun_family = libc::AF_UNIX as u16;
        for (to, from) in address.sun_path.iter_mut().zip(socket.as_os_str().as_bytes()) {
            *to = from.cast_signed();
        }
        let size = size_of::<libc::sockaddr_un>() as u32;
        check(libc::connect(stream, (&raw const address).cast(), size).into())?;
        let listener = install(&FILTER, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | WAIT_KILLABLE)?;
        let mut part = libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() };
        let mut control = [0_u64; 4];
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        header.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let first = libc::CMSG_FIRSTHDR(&raw const header);
        (*first).cmsg_level = libc::SOL_SOCKET;
        (*first).cmsg_type = libc::SCM_RIGHTS;
        (*first).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(first).cast::<i32>().write_unaligned(listener);
        check(libc::sendmsg(stream, &raw const header, 0) as libc::c_long)?;
        libc::close(stream);
        libc::close(listener);
    }
    Ok(())
}

/// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`
const WAIT_KILLABLE: libc::c_ulong = 1 << 5;

fn install(filter: &[libc::sock_filter], flags: libc::c_ulong) -> io::Result<i32> {
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the structure and the instructions live across the call, which copies them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// Runs in the container.
#[test]
#[ignore = "a part of the other tests"]
fn contained() {
    if let Ok(scenario) = std::env::var(SCENARIO) {
        contained::play(&scenario, &std::env::var(PLACE).unwrap());
    }
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn an_own_procfs_shows_the_containers_files_and_can_be_unmounted() {
    Init::new().run("proc");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn an_own_sysfs_shows_the_containers_files() {
    Init::new().run("sys");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn the_callers_own_descriptors_and_root_are_meant() {
    Init::new().run("paths");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_bind_of_a_procfs_has_the_containers_files() {
    Init::new().run("binds");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_nested_user_namespace_mounts_a_procfs_unless_something_is_hidden() {
    Init::new().run("nested");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn errors_are_the_kernels_and_the_new_mount_calls_are_not_there() {
    Init::new().run("errors");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_process_that_hangs_and_is_killed_leaves_no_caller_waiting() {
    let mut init = Init::new();
    // The test receives the container's descriptor, as init would have it from the first process.
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    let mut child = init.container("one", &own);
    let listener = receive(&socket);
    init.service.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), listener)];
    init.service.kill();
    // Receives a call and never answers it.
    let taken = take(&init.service.kept[0].1);
    fs::create_dir_all(init.dir.path().join("procfs/calls")).unwrap();
    fs::write(init.dir.path().join("procfs/calls").join(&init.service.kept[0].0), taken.to_ne_bytes()).unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    init.service.start();
    assert!(ended(&mut child));
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn calls_wait_while_no_service_runs() {
    let mut init = Init::new();
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    init.service.kill();
    let mut child = init.container("one and own", &own);
    init.service.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), receive(&socket))];
    thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    init.service.start();
    assert!(ended(&mut child));
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn no_mount_fails_or_hangs_while_the_service_is_killed_repeatedly() {
    let mut init = Init::new();
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    init.service.kill();
    let mut child = init.container("many", &own);
    init.service.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), receive(&socket))];
    init.service.start();
    let mut kills = 0;
    while child.try_wait().unwrap().is_none() && kills < 400 {
        thread::sleep(Duration::from_millis(20 + kills % 17));
        init.service.kill();
        init.service.start();
        kills += 1;
    }
    assert!(ended(&mut child));
    println!("{kills} processes were killed");
    assert!(kills > 5);
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_slow_runtime_keeps_no_container_waiting_and_is_served_in_the_end() {
    let init = Init::new();
    let slow: Vec<_> = (0..4).map(|_| UnixStream::connect(init.socket()).unwrap()).collect();
    init.run("one and own");
    // Longer than the timeout for the rest of a message.
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    let mut child = init.container("one and own", &own);
    let listener = receive(&socket);
    thread::sleep(Duration::from_millis(2500));
    send(&slow[2], init.slot, &listener);
    assert!(ended(&mut child));
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn hostile_calls_are_answered_and_the_next_container_is_served() {
    let mut init = Init::new();
    init.run("hostile");
    init.run("one and own");
    assert!(init.service.process.as_mut().unwrap().try_wait().unwrap().is_none(), "the service ended");
}

/// A container's file system answers nothing: the container waits for it, and no other does, nor the service.
fn others_are_served_beside(silent: &str) {
    let mut init = Init::new();
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    let mut container = Killed(init.container(silent, &own));
    let listener = receive(&socket);
    send(&UnixStream::connect(init.socket()).unwrap(), init.slot, &listener);
    init.service.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), listener)];
    init.slot = enter(&init.dir.path().join("procfs"), "d");
    // Until the container may have no further process.
    let begun = Instant::now();
    let at_bound = init.dir.path().join("p").join("bound");
    while !at_bound.exists() {
        assert!(container.0.try_wait().unwrap().is_none(), "the container has ended");
        assert!(begun.elapsed() < Duration::from_secs(60), "the bound is not reached");
        let asked = Instant::now();
        init.run("one and own");
        assert!(asked.elapsed() < Duration::from_secs(5), "another container waits: {:?}", asked.elapsed());
        thread::sleep(Duration::from_millis(100));
    }
    let left = children(init.service.process.as_ref().unwrap().id());
    assert!((silent::MAX_LEFT_BEHIND..silent::MAX_LEFT_BEHIND + 8).contains(&left), "{left} processes");
    // None of the stuck ones is a part of the service, which can be killed at once; the next one serves.
    let mut process = init.service.process.take().unwrap();
    process.kill().unwrap();
    assert!(!ended(&mut process), "it was killed");
    init.service.start();
    init.run("one and own");
    fs::write(init.dir.path().join("p").join("end"), "").unwrap();
    assert!(ended(&mut container.0), "{silent} failed");
}

/// A container that does not outlive its test, whose file system could keep processes of this machine waiting.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The number of a process' children.
fn children(process: u32) -> usize {
    let lists = fs::read_dir(format!("/proc/{process}/task")).unwrap().flatten();
    lists
        .map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default())
        .map(|list| list.split_whitespace().count())
        .sum()
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn memory_of_a_file_system_that_never_answers_stops_only_its_container() {
    others_are_served_beside("silent memory");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_bind_from_a_file_system_that_never_answers_stops_only_its_container() {
    others_are_served_beside("silent source");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_mount_on_a_file_system_that_never_answers_stops_only_its_container() {
    others_are_served_beside("silent target");
}

#[test]
#[ignore = "prints times; needs root, /dev/fuse and user namespaces"]
fn what_it_costs() {
    let init = Init::new();
    println!("with a filter that reports nothing, as every container has one");
    let mut command = init.command("latency");
    // SAFETY: the test has a single thread that could hold a lock, and this is it.
    unsafe { command.pre_exec(|| install(&reporting(libc::SECCOMP_RET_ALLOW), 0).map(drop)) };
    assert!(ended(&mut command.spawn().unwrap()));
    println!("with it");
    init.run("latency");
}

/// Sends a container's descriptor to the service, as crun does.
fn send(stream: &UnixStream, slot: u64, listener: &OwnedFd) {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
    let descriptors = [std::os::fd::AsFd::as_fd(listener)];
    assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&descriptors)));
    let message = format!("{{\"metadata\":\"{slot}\"}}");
    let parts = [io::IoSlice::new(message.as_bytes())];
    rustix::net::sendmsg(stream, &parts, &mut control, rustix::net::SendFlags::empty()).unwrap();
}

/// Receives the descriptor that a container sends.
fn receive(socket: &UnixListener) -> OwnedFd {
    use std::io::IoSliceMut;

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let (stream, _) = socket.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut buffer = [0; 256];
    recvmsg(&stream, &mut [IoSliceMut::new(&mut buffer)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let received = control.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(descriptors) => descriptors.into_iter().next(),
        _ => None,
    });
    received.unwrap()
}

/// Receives a call, as a process does that then ends.
fn take(listener: &OwnedFd) -> u64 {
    // SAFETY: a structure of integers, which the kernel wants to be zero and fills.
    unsafe {
        let mut raw: libc::seccomp_notif = std::mem::zeroed();
        assert_eq!(libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut raw), 0);
        raw.id
    }
}
