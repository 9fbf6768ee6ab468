//! The scenarios that the contained process of the tests plays.

use std::{ffi::CString, fs, io, path::Path, process::Command, thread, time::Instant};

use crate::{SCENARIO, silent};

/// Plays a scenario, in the container.
pub fn play(scenario: &str, place: &str) {
    match scenario {
        "proc" => procfs(place),
        "sys" => sysfs(place),
        "paths" => paths(place),
        "binds" => binds(place),
        "errors" => errors(place),
        "refused" => assert_eq!(errno(mounts("proc", place, 0, None)), Some(libc::EPERM)),
        "one" => mounts("proc", place, 0, None).unwrap(),
        "one and own" => {
            mounts("proc", place, 0, None).unwrap();
            assert_own(place);
        }
        "many" => {
            for _ in 0..200 {
                // A process that is killed may leave a mount made twice, or one without its files.
                mounts("proc", place, 0, None).unwrap();
                unmounts(place, libc::MNT_DETACH).unwrap();
            }
        }
        "nested" => nested(),
        "locked" => {
            let before = own_mounts();
            assert_eq!(errno(unmounts("/proc", 0)), Some(libc::EINVAL), "it came from outside");
            assert_eq!(own_mounts(), before);
        }
        "hostile" => hostile(place),
        "latency" => latency(place),
        "silent server" => silent::serve(),
        other if other.starts_with("silent call ") => silent::call(&other["silent call ".len()..]),
        other if other.starts_with("silent ") => silent::play(place, &other["silent ".len()..]),
        other => panic!("{other}"),
    }
}

/// mount(2) of an existing tree.
pub fn mounts_from(source: &str, target: &str, flags: u64) -> io::Result<()> {
    rustix::mount::mount(source, target, "none", rustix::mount::MountFlags::from_bits_retain(flags as u32), None)
        .map_err(Into::into)
}

/// mount(2), as programs call it.
pub fn mounts(kind: &str, target: &str, flags: u64, options: Option<&str>) -> io::Result<()> {
    let text = |text: &str| CString::new(text).unwrap();
    let (kind, target, options) = (text(kind), text(target), options.map(text));
    let options = options.as_ref().map_or(std::ptr::null(), |options| options.as_ptr());
    // SAFETY: all pointers are to strings that live across the call, or null.
    let result = unsafe { libc::mount(c"none".as_ptr(), target.as_ptr(), kind.as_ptr(), flags, options.cast()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn unmounts(target: &str, flags: i32) -> io::Result<()> {
    let target = CString::new(target).unwrap();
    // SAFETY: the pointer is to a string that lives across the call.
    let result = unsafe { libc::umount2(target.as_ptr(), flags) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn errno(result: io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Asserts that a procfs shows the container's own uptime: both fields are the same, and not longer than a run of these tests takes.
#[track_caller]
pub fn assert_own(place: &str) {
    let uptime = fs::read_to_string(format!("{place}/uptime")).unwrap();
    let fields: Vec<f64> = uptime.split_whitespace().map(|field| field.parse().unwrap()).collect();
    assert!(fields.len() == 2 && (fields[0] - fields[1]).abs() < 0.001 && fields[0] < 600.0, "{uptime}");
    assert!(fs::read_to_string(format!("{place}/meminfo")).unwrap().starts_with("MemTotal:"));
}

fn own_mounts() -> usize {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().filter(|line| line.contains("- fuse.bulkhead") && line.contains("nodiratime")).count()
}

fn procfs(place: &str) {
    mounts("proc", place, libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC, None).unwrap();
    assert_own(place);
    // It shows the container's pid namespace.
    assert_eq!(fs::read_link(format!("{place}/self")).unwrap().to_str().unwrap(), std::process::id().to_string());
    let options = |place: &str| {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = table.lines().find(|line| line.split(' ').nth(4) == Some(place)).unwrap().to_owned();
        line.split(' ').nth(5).unwrap().to_owned()
    };
    assert_eq!(options(place), "rw,nosuid,nodev,noexec,relatime");
    // A value is the container's own, in this procfs as in the first.
    fs::write(format!("{place}/sys/kernel/panic"), "77").unwrap();
    assert_eq!(fs::read_to_string(format!("{place}/sys/kernel/panic")).unwrap(), "77\n");
    // A mount in use stays, with its files.
    let open = fs::File::open(format!("{place}/version")).unwrap();
    assert_eq!(errno(unmounts(place, 0)), Some(libc::EBUSY));
    assert_own(place);
    drop(open);
    unmounts(place, 0).unwrap();
    assert_eq!(fs::read_dir(place).unwrap().count(), 0);
    assert_eq!(own_mounts(), 0);
    // With options, read-only, and by a relative path.
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
    // A sysfs needs a network namespace of the container's own.
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
        // The procfs of an outer pid namespace does not have this process, so one of its own is needed.
        mounts("proc", "/proc", 0, None).unwrap();
        assert_own("/proc");
        thread::scope(|scope| scope.spawn(|| mounts("proc", &path, 0, None).unwrap()).join().unwrap());
        assert_own(place);
        unmounts(place, libc::MNT_DETACH).unwrap();
        unmounts("/proc", libc::MNT_DETACH).unwrap();
    }
    // A link to a path through /proc/self continues in the kernel: it is mounted, without the files.
    let link = format!("/tmp/link-{}", std::process::id());
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

/// A user namespace in the container may mount a procfs if nothing but node mounts is on the existing one.
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
    inner("locked");
    // A part that something else hides stays hidden.
    mounts("tmpfs", "/proc/fs", 0, None).unwrap();
    inner("refused");
    unmounts("/proc/fs", 0).unwrap();
    inner("one and own");
}

fn binds(place: &str) {
    // crun mounts the files on the first procfs; here it has none, but a bind of it does.
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
    // A recursive bind, and one of a part.
    mounts_from("/proc", place, libc::MS_BIND | libc::MS_REC).unwrap();
    assert_own(place);
    unmounts(place, libc::MNT_DETACH).unwrap();
    mounts_from("/proc/sys", place, libc::MS_BIND).unwrap();
    assert!(Path::new(place).join("kernel/panic").exists());
    unmounts(place, 0).unwrap();
    assert_eq!(errno(mounts_from("/proc/version", place, libc::MS_BIND)), Some(libc::ENOTDIR));
    assert_eq!(errno(mounts_from("/proc", "/proc/version", libc::MS_BIND)), Some(libc::ENOTDIR));
    // A bind of something else.
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
    // Without the capability the kernel refuses it, and the service does not step in.
    // SAFETY: takes plain integers.
    assert_eq!(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, 1 | 4) }, 0);
    drop_administration();
    assert_eq!(errno(mounts("proc", place, 0, None)), Some(libc::EPERM));
    assert_eq!(own_mounts(), 0);
}

/// A sequence of numbers that is the same each time.
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

/// Calls with arbitrary pointers, texts and flags. None may hang; the test's bound limits all of them together.
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
    // A text that runs into an unmapped page.
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
        // Otherwise this process would lose its root directory before long.
        let moves = libc::MS_MOVE | libc::MS_REMOUNT | libc::MS_BIND;
        if number == libc::SYS_mount && arguments[3] & moves != 0 {
            arguments[1] = texts[1].as_ptr() as u64;
        }
        let [first, second, third, fourth, fifth] = arguments;
        // SAFETY: the kernel reads the texts and refuses unmapped addresses.
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
