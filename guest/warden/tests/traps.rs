//! What a container sees in a procfs or sysfs that it mounts itself. Needs root, `/dev/fuse` and user namespaces.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, net::UnixListener, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use bulkhead_warden::{
    mount,
    registry::{Container, Process, Registry},
    traps::{KEPT_LISTENERS, KEPT_PREFIX},
};

const CONTROL: &str = "/sys/fs/fuse/connections";

/// What the contained process is to do; without it, it does nothing.
const SCENARIO: &str = "WARDEN_TEST_SCENARIO";
const PLACE: &str = "WARDEN_TEST_PLACE";

/// Longer than the warden lets a helper work.
const BOUND: Duration = Duration::from_secs(20);

/// What init does: makes the mount, listens, holds the descriptors, starts wardens with them.
struct Init {
    dir: tempfile::TempDir,
    device: OwnedFd,
    socket: UnixListener,
    kept: Vec<(String, OwnedFd)>,
    warden: Child,
    slot: u64,
}

impl Init {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/run").unwrap();
        let registry = Registry::open(&dir.path().join("warden")).unwrap();
        let tree = dir.path().join("warden/fs");
        fs::create_dir(&tree).unwrap();
        fs::create_dir(dir.path().join("p")).unwrap();
        // The contained process is nobody here.
        set_mode(dir.path(), 0o755);
        mount::mount_control(Path::new(CONTROL)).unwrap();
        let device = mount::mount(&tree).unwrap();
        let socket = UnixListener::bind(dir.path().join("warden/mounts")).unwrap();
        let creator = Process::find(std::process::id()).unwrap();
        let container = Container {
            slot: 0,
            id: "c".to_owned(),
            state_root: "/nowhere".into(),
            owner: 0,
            cgroup: None,
            read_only: false,
            creator,
        };
        let slot = registry.enter(container).unwrap();
        let warden = start(dir.path(), &device, &socket, &[]);
        Self { dir, device, socket, kept: Vec::new(), warden, slot }
    }

    /// A process in namespaces of its own.
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

    /// A process in namespaces of its own whose mounts are reported to `socket`.
    fn container(&self, scenario: &str, socket: &Path) -> Child {
        let mut command = self.command(scenario);
        let socket = socket.to_owned();
        let message = format!("{{\"metadata\":\"{}\",\"state\":{{}}}}", self.slot);
        // SAFETY: the test has a single thread that could hold a lock, and this is it.
        unsafe { command.pre_exec(move || filter(&socket, message.as_bytes())) };
        command.spawn().unwrap()
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("warden/mounts")
    }

    fn run(&self, scenario: &str) {
        let mut child = self.container(scenario, &self.socket());
        assert!(ended(&mut child), "{scenario} failed");
    }

    fn kill_warden(&mut self) {
        self.warden.kill().unwrap();
        self.warden.wait().unwrap();
    }

    fn start_warden(&mut self) {
        self.warden = start(self.dir.path(), &self.device, &self.socket, &self.kept);
    }
}

impl Drop for Init {
    fn drop(&mut self) {
        let _ = mount::abort(&self.dir.path().join("warden/fs"), Path::new(CONTROL));
        let _ = self.warden.kill();
        let _ = self.warden.wait();
    }
}

fn set_mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Whether it ends well, and within the bound.
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

fn start(dir: &Path, device: &OwnedFd, socket: &UnixListener, kept: &[(String, OwnedFd)]) -> Child {
    let (device, socket) = (device.as_raw_fd(), socket.as_raw_fd());
    let numbers: Vec<RawFd> = kept.iter().map(|(_, fd)| fd.as_raw_fd()).chain([device, socket]).collect();
    let names: Vec<_> = kept.iter().map(|(name, fd)| format!("{name}={}", fd.as_raw_fd())).collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-warden"));
    command
        .args([format!("--device={device}"), format!("--listener={socket}")])
        .arg(format!("--state={}", dir.join("warden").display()))
        .env(KEPT_LISTENERS, names.join(","));
    // SAFETY: between fork and exec this makes system calls that take plain integers.
    unsafe {
        command.pre_exec(move || {
            for number in &numbers {
                if libc::fcntl(*number, libc::F_SETFD, 0) != 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
    command.spawn().unwrap()
}

const fn step(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

const fn when(k: u32, jt: u8) -> libc::sock_filter {
    libc::sock_filter { code: 0x15, jt, jf: 0, k }
}

/// mount, umount2 and fsopen are reported.
const FILTER: [libc::sock_filter; 6] = reporting(libc::SECCOMP_RET_USER_NOTIF);

const fn reporting(how: u32) -> [libc::sock_filter; 6] {
    [step(0x20, 0), when(165, 3), when(166, 2), when(430, 1), step(0x06, libc::SECCOMP_RET_ALLOW), step(0x06, how)]
}

/// Puts the filter on this process and sends where it reports to, as crun does.
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

/// mount(2) of something that is there.
fn mounts_from(source: &str, target: &str, flags: u64) -> io::Result<()> {
    rustix::mount::mount(source, target, "none", rustix::mount::MountFlags::from_bits_retain(flags as u32), None)
        .map_err(Into::into)
}

/// mount(2), as programs call it.
fn mounts(kind: &str, target: &str, flags: u64, options: Option<&str>) -> io::Result<()> {
    let text = |text: &str| CString::new(text).unwrap();
    let (kind, target, options) = (text(kind), text(target), options.map(text));
    let options = options.as_ref().map_or(std::ptr::null(), |options| options.as_ptr());
    // SAFETY: all pointers are to strings that live across the call, or null.
    let result = unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn unmounts(target: &str, flags: i32) -> io::Result<()> {
    let target = CString::new(target).unwrap();
    // SAFETY: the pointer is to a string that lives across the call.
    let result = unsafe { libc::umount2(target.as_ptr(), flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn errno(result: io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Whether a procfs shows the container's own uptime: both fields are the same, and few seconds.
#[track_caller]
fn assert_own(place: &str) {
    let uptime = fs::read_to_string(format!("{place}/uptime")).unwrap();
    let fields: Vec<f64> = uptime.split_whitespace().map(|field| field.parse().unwrap()).collect();
    assert!(fields.len() == 2 && (fields[0] - fields[1]).abs() < 0.001 && fields[0] < 60.0, "{uptime}");
    assert!(fs::read_to_string(format!("{place}/meminfo")).unwrap().starts_with("MemTotal:"));
}

fn own_mounts() -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.contains("- fuse.bulkhead") && line.contains("nodiratime")).count()
}

/// Runs in the container.
#[test]
#[ignore = "a part of the other tests"]
fn contained() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    let place = std::env::var(PLACE).unwrap();
    match scenario.as_str() {
        "proc" => procfs(&place),
        "sys" => sysfs(&place),
        "paths" => paths(&place),
        "binds" => binds(&place),
        "errors" => errors(&place),
        "refused" => assert_eq!(errno(mounts("proc", &place, 0, None)), Some(libc::EPERM)),
        "one" => mounts("proc", &place, 0, None).unwrap(),
        "one and own" => {
            mounts("proc", &place, 0, None).unwrap();
            assert_own(&place);
        }
        "many" => {
            for _ in 0..200 {
                // A warden that ends may leave a mount made twice, or one without its files.
                mounts("proc", &place, 0, None).unwrap();
                unmounts(&place, libc::MNT_DETACH).unwrap();
            }
        }
        "nested" => nested(),
        "hostile" => hostile(&place),
        "latency" => latency(&place),
        other => panic!("{other}"),
    }
}

fn procfs(place: &str) {
    mounts("proc", place, libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC, None).unwrap();
    assert_own(place);
    // It is that of the container's own processes.
    assert_eq!(fs::read_link(format!("{place}/self")).unwrap().to_str().unwrap(), std::process::id().to_string());
    let options = |place: &str| {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.split(' ').nth(4) == Some(place)).unwrap().to_owned();
        line.split(' ').nth(5).unwrap().to_owned()
    };
    assert_eq!(options(place), "rw,nosuid,nodev,noexec,relatime");
    // A value is the container's own, in this procfs as in any.
    fs::write(format!("{place}/sys/kernel/panic"), "77").unwrap();
    assert_eq!(fs::read_to_string(format!("{place}/sys/kernel/panic")).unwrap(), "77\n");
    // What is in use stays, with its files.
    let open = fs::File::open(format!("{place}/version")).unwrap();
    assert_eq!(errno(unmounts(place, 0)), Some(libc::EBUSY));
    assert_own(place);
    drop(open);
    unmounts(place, 0).unwrap();
    assert_eq!(fs::read_dir(place).unwrap().count(), 0);
    assert_eq!(own_mounts(), 0);
    // With options, read-only, from where it is to be mounted.
    std::env::set_current_dir(Path::new(place).parent().unwrap()).unwrap();
    mounts("proc", "p", libc::MS_RDONLY, Some("hidepid=invisible,gid=0")).unwrap();
    assert_own(place);
    assert_eq!(options(place), "ro,relatime");
    let written = fs::write(format!("{place}/sys/kernel/panic"), "78").map_err(|error| error.raw_os_error());
    assert_eq!(written, Err(Some(libc::EROFS)));
    unmounts("p", 0).unwrap();
    mounts("proc", place, 0, Some("subset=pid")).unwrap();
    assert_eq!(own_mounts(), 0, "it has no such files");
    unmounts(place, 0).unwrap();
}

fn sysfs(place: &str) {
    // The network namespace is its owner's to show.
    // SAFETY: takes a plain integer.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0);
    mounts("sysfs", place, 0, None).unwrap();
    let files = own_mounts();
    assert!(files >= 1, "{files}");
    let online = fs::read_to_string(format!("{place}/devices/system/cpu/online")).unwrap();
    assert!(!online.trim().is_empty());
    assert_eq!(fs::read_dir(format!("{place}/class/net")).unwrap().count(), 1, "of its own network namespace");
    assert_eq!(errno(mounts("sysfs", place, 0, None)), Some(libc::EBUSY), "as mount(2) has it");
    unmounts(place, 0).unwrap();
    assert_eq!(own_mounts(), 0);
}

fn paths(place: &str) {
    use std::os::fd::IntoRawFd;
    let number = fs::File::open(place).unwrap().into_raw_fd();
    for path in [format!("/proc/self/fd/{number}"), format!("/proc/thread-self/fd/{number}")] {
        // As procfs of an outer process-id namespace has no such process, one of this has to be there.
        mounts("proc", "/proc", 0, None).unwrap();
        assert_own("/proc");
        thread::scope(|scope| scope.spawn(|| mounts("proc", &path, 0, None).unwrap()).join().unwrap());
        assert_own(place);
        unmounts(place, libc::MNT_DETACH).unwrap();
        unmounts("/proc", libc::MNT_DETACH).unwrap();
    }
    // A link through /proc/self is the kernel's to follow: it is mounted, without the files.
    let link = format!("/tmp/trap-{}", std::process::id());
    mounts("tmpfs", "/tmp", 0, None).unwrap();
    mounts("proc", "/proc", 0, None).unwrap();
    std::os::unix::fs::symlink(format!("/proc/self/fd/{number}"), &link).unwrap();
    mounts("proc", &link, 0, None).unwrap();
    assert!(Path::new(place).join("uptime").exists());
    unmounts(place, libc::MNT_DETACH).unwrap();
    // Another root.
    fs::create_dir_all("/tmp/root/proc").unwrap();
    let root = CString::new("/tmp/root").unwrap();
    // SAFETY: the pointer is to a string that lives across the call.
    assert_eq!(unsafe { libc::chroot(root.as_ptr()) }, 0);
    std::env::set_current_dir("/").unwrap();
    mounts("proc", "/proc", 0, None).unwrap();
    assert_own("/proc");
    unmounts("/proc", 0).unwrap();
}

/// A user namespace in the container may mount a procfs when nothing but the warden's files is on the one it has.
fn nested() {
    let inner = |scenario: &str| {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--mount", "--pid", "--fork", "--"]);
        command.arg(std::env::current_exe().unwrap()).args(["--ignored", "--exact", "contained", "--nocapture"]);
        assert!(command.env(SCENARIO, scenario).status().unwrap().success(), "{scenario}");
    };
    mounts("proc", "/proc", 0, None).unwrap();
    assert_own("/proc");
    inner("one and own");
    // What somebody else hides stays hidden.
    mounts("tmpfs", "/proc/fs", 0, None).unwrap();
    inner("refused");
    unmounts("/proc/fs", 0).unwrap();
    inner("one and own");
}

fn binds(place: &str) {
    // The first procfs has its files from crun; here it has none, and a bind of it has.
    mounts("proc", "/proc", libc::MS_RDONLY, None).unwrap();
    mounts_from("/proc", place, libc::MS_BIND).unwrap();
    assert_own(place);
    let written = fs::write(format!("{place}/sys/kernel/panic"), "78").map_err(|error| error.raw_os_error());
    assert_eq!(written, Err(Some(libc::EROFS)), "as its source");
    unmounts(place, 0).unwrap();
    std::env::set_current_dir("/").unwrap();
    mounts_from("proc", place, libc::MS_BIND).unwrap();
    assert_own(place);
    unmounts(place, 0).unwrap();
    // With all that is mounted on it, and a part of it.
    mounts_from("/proc", place, libc::MS_BIND | libc::MS_REC).unwrap();
    assert_own(place);
    unmounts(place, libc::MNT_DETACH).unwrap();
    mounts_from("/proc/sys", place, libc::MS_BIND).unwrap();
    assert!(Path::new(place).join("kernel/panic").exists());
    unmounts(place, 0).unwrap();
    assert_eq!(errno(mounts_from("/proc/version", place, libc::MS_BIND)), Some(libc::ENOTDIR));
    assert_eq!(errno(mounts_from("/proc", "/proc/version", libc::MS_BIND)), Some(libc::ENOTDIR));
    // Anything else.
    mounts_from("/etc", place, libc::MS_BIND).unwrap();
    assert!(Path::new(place).join("passwd").exists());
}

fn errors(place: &str) {
    assert_eq!(errno(mounts("proc", "/nowhere", 0, None)), Some(libc::ENOENT));
    assert_eq!(errno(mounts("proc", "/etc/passwd", 0, None)), Some(libc::ENOTDIR));
    assert_eq!(errno(mounts("proc", place, 0, Some("nonsense"))), Some(libc::EINVAL));
    assert_eq!(errno(mounts("proc", &"x/".repeat(3000), 0, None)), Some(libc::ENAMETOOLONG));
    assert_eq!(errno(mounts("sysfs", place, 0, None)), Some(libc::EPERM), "not its network namespace");
    assert_eq!(errno(unmounts(place, 0)), Some(libc::EINVAL));
    // SAFETY: the kernel refuses pointers that lead nowhere.
    let result =
        unsafe { libc::mount(c"x".as_ptr(), std::ptr::without_provenance(8), c"proc".as_ptr(), 0, std::ptr::null()) };
    assert_eq!((result, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
    for (name, expected) in [(c"proc", libc::ENOSYS), (c"sysfs", libc::ENOSYS), (c"nonsense", libc::ENODEV)] {
        // SAFETY: the pointer is to a string that lives across the call.
        let result = unsafe { libc::syscall(libc::SYS_fsopen, name.as_ptr(), 0) };
        assert_eq!((result, io::Error::last_os_error().raw_os_error()), (-1, Some(expected)), "{name:?}");
    }
    mounts("tmpfs", place, 0, None).unwrap();
    unmounts(place, 0).unwrap();
    // Without the capability the kernel refuses it, and nobody does it instead.
    // SAFETY: takes plain integers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, 1 | 4) }, 0);
    drop_administration();
    assert_eq!(errno(mounts("proc", place, 0, None)), Some(libc::EPERM));
    assert_eq!(own_mounts(), 0);
}

/// Numbers that are the same each time.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[(self.next() % of.len() as u64) as usize]
    }
}

/// Calls with what comes: pointers, texts, flags; none may hang, and all are bounded by the test's patience.
fn hostile(place: &str) {
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    mounts("tmpfs", "/tmp", 0, None).unwrap();
    std::os::unix::fs::symlink("loop", "/tmp/loop").unwrap();
    fs::create_dir_all("/tmp/d").unwrap();
    let long = "d/../".repeat(1200);
    let texts: Vec<_> = [
        place,
        "/tmp/d",
        "",
        "/",
        "/tmp/loop",
        "/proc/self/fd/0",
        "/proc/self/fd/4294967295",
        "/dev/fd/1",
        "/proc/self/mem",
        "/proc/1/root",
        "/proc/self/root/tmp/d",
        &long,
        "proc",
        "sysfs",
        "tmpfs",
        "a=b,,=,hidepid=2,subset=pid",
        "..",
    ]
    .iter()
    .map(|text| CString::new(*text).unwrap())
    .collect();
    // A text that runs into memory that is not there.
    // SAFETY: new memory, of which the second page is given back.
    let edge = unsafe {
        let map = libc::mmap(std::ptr::null_mut(), 8192, 3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0);
        libc::munmap(map.byte_add(4096), 4096);
        std::ptr::write_bytes(map.cast::<u8>(), b'p', 4096);
        map as u64 + 4090
    };
    let flags: Vec<u64> = (0..32).map(|bit| 1 << bit).chain([0, 0, 0, 0, 0xc0ed_0000]).collect();
    let pointers: Vec<u64> =
        texts.iter().map(|text| text.as_ptr() as u64).chain([0, 8, u64::MAX, edge, 1 << 47, 1 << 63]).collect();
    for _ in 0..1500 {
        let kind = if numbers.next().is_multiple_of(2) { c"proc".as_ptr() as u64 } else { numbers.one_of(&pointers) };
        let number = numbers.one_of(&[libc::SYS_mount, libc::SYS_mount, libc::SYS_umount2, libc::SYS_fsopen]);
        let mut arguments = [numbers.one_of(&pointers), numbers.one_of(&pointers), kind, 0, numbers.one_of(&pointers)];
        arguments[3] = numbers.one_of(&flags) | numbers.one_of(&flags);
        if number != libc::SYS_mount {
            arguments[1] = numbers.one_of(&flags);
        }
        // Else this process has no root any more before long.
        let moves = libc::MS_MOVE | libc::MS_REMOUNT | libc::MS_BIND;
        if number == libc::SYS_mount && arguments[3] & moves != 0 {
            arguments[1] = texts[1].as_ptr() as u64;
        }
        let [first, second, third, fourth, fifth] = arguments;
        // SAFETY: the kernel reads the texts and refuses what is no memory.
        let result = unsafe { libc::syscall(number, first, second, third, fourth, fifth) };
        if number == libc::SYS_fsopen && result >= 0 {
            // SAFETY: the call has made it for this process.
            unsafe { libc::close(result as i32) };
        }
    }
}

fn drop_administration() {
    let mut sets = rustix::thread::capabilities(None).unwrap();
    sets.effective.remove(rustix::thread::CapabilitySet::SYS_ADMIN);
    rustix::thread::set_capabilities(None, sets).unwrap();
}

fn latency(place: &str) {
    let median = |what: &dyn Fn()| {
        let mut times: Vec<_> = (0..101)
            .map(|_| {
                let begun = Instant::now();
                what();
                begun.elapsed()
            })
            .collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    let cycle = |kind| {
        mounts(kind, place, 0, None).unwrap();
        unmounts(place, libc::MNT_DETACH).unwrap();
    };
    println!("mount and lazy unmount of a tmpfs: {:?}", median(&|| cycle("tmpfs")));
    let bind = || {
        mounts_from("/etc", place, libc::MS_BIND).unwrap();
        unmounts(place, libc::MNT_DETACH).unwrap();
    };
    println!("bind and lazy unmount of a folder: {:?}", median(&bind));
    println!("mount and lazy unmount of a procfs: {:?}", median(&|| cycle("proc")));
    println!(
        "mount and unmount of a procfs: {:?}",
        median(&|| {
            mounts("proc", place, 0, None).unwrap();
            unmounts(place, 0).unwrap();
        })
    );
    // SAFETY: the call has no arguments and no effects.
    let calls = || (0..100_000).for_each(|_| unsafe { _ = libc::syscall(libc::SYS_getppid) });
    println!("100,000 getppid: {:?}", median(&calls));
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_procfs_of_ones_own_shows_the_containers_files_and_is_unmounted_as_any() {
    Init::new().run("proc");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_sysfs_of_ones_own_shows_the_containers_files() {
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
fn a_user_namespace_inside_mounts_a_procfs_unless_something_else_is_hidden() {
    Init::new().run("nested");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn errors_are_the_kernels_and_the_new_mount_calls_are_not_there() {
    Init::new().run("errors");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_warden_that_hangs_and_is_killed_leaves_no_caller_waiting() {
    let mut init = Init::new();
    // The container's descriptor comes here first, as init would have it from the first warden.
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    let mut child = init.container("one", &own);
    let listener = receive(&socket);
    init.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), listener)];
    init.kill_warden();
    // Takes a call and never answers it.
    let taken = take(&init.kept[0].1);
    fs::create_dir_all(init.dir.path().join("warden/calls")).unwrap();
    fs::write(init.dir.path().join("warden/calls").join(&init.kept[0].0), taken.to_ne_bytes()).unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    init.start_warden();
    assert!(ended(&mut child));
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn calls_made_while_no_warden_runs_wait_for_the_next_one() {
    let mut init = Init::new();
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    init.kill_warden();
    let mut child = init.container("one and own", &own);
    init.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), receive(&socket))];
    thread::sleep(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    init.start_warden();
    assert!(ended(&mut child));
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn no_mount_fails_or_hangs_while_the_warden_is_killed_again_and_again() {
    let mut init = Init::new();
    let own = init.dir.path().join("own");
    let socket = UnixListener::bind(&own).unwrap();
    init.kill_warden();
    let mut child = init.container("many", &own);
    init.kept = vec![(format!("{KEPT_PREFIX}{}x1", init.slot), receive(&socket))];
    init.start_warden();
    let mut wardens = 0;
    while child.try_wait().unwrap().is_none() && wardens < 400 {
        thread::sleep(Duration::from_millis(20 + wardens % 17));
        init.kill_warden();
        init.start_warden();
        wardens += 1;
    }
    assert!(ended(&mut child));
    println!("{wardens} wardens were killed");
    assert!(wardens > 5);
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn whatever_a_container_asks_is_answered_and_the_next_one_is_served() {
    let mut init = Init::new();
    init.run("hostile");
    init.run("one and own");
    assert!(init.warden.try_wait().unwrap().is_none(), "the warden ended");
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

/// Takes the descriptor that a container sends.
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

/// Takes a call, as a warden does that then ends.
fn take(listener: &OwnedFd) -> u64 {
    // SAFETY: a structure of integers, which the kernel wants to be zero and fills.
    unsafe {
        let mut raw: libc::seccomp_notif = std::mem::zeroed();
        assert_eq!(libc::ioctl(listener.as_raw_fd(), libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut raw), 0);
        raw.id
    }
}
