//! A container's name, read and written in its `/proc/sys/kernel`. Needs root, `/dev/fuse` and user namespaces.

#![allow(clippy::unwrap_used)]

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
};

use bulkhead_guest_common::{
    namespace::Identity,
    registry::{Container, Registry},
};
use proptest::{prelude::*, test_runner::TestRunner};
use support::procfs::{Service, container};

/// First id of all containers' ranges; only a test gives two containers the same one.
const START: u32 = 100_000;

const NAMES: [&str; 2] = ["hostname", "domainname"];

/// A running service.
struct Place {
    dir: tempfile::TempDir,
    service: Service,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/run").unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let service = Service::new(Path::new(env!("CARGO_BIN_EXE_bulkhead-procfs")), &dir.path().join("procfs"));
        Self { dir, service }
    }

    /// Starts a container with namespaces of its own, which lives as long as the result.
    fn container(&self, id: &str, read_only: bool) -> Contained {
        let mut command = Command::new("unshare");
        command.args(["--user", "--uts", "sh", "-c", "echo; exec cat"]);
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Its first output proves that it has its namespaces.
        process.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let file = |name: &str| format!("/proc/{}/{name}", process.id());
        for map in ["uid_map", "gid_map"] {
            fs::write(file(map), format!("0 {START} 65536")).unwrap();
        }
        let state = self.dir.path().join("procfs");
        let user_namespace = Identity::of(File::open(file("ns/user")).unwrap()).unwrap();
        let container = Container { owner: START, user_namespace, read_only, ..container(id) };
        let slot = Registry::open(&state).unwrap().enter(container).unwrap();
        Contained { process, files: state.join("fs").join(slot.to_string()) }
    }
}

struct Contained {
    process: Child,
    files: PathBuf,
}

impl Contained {
    fn file(&self, name: &str) -> String {
        self.files.join(format!("proc+sys+kernel+{name}")).display().to_string()
    }

    /// The output of a shell line that runs as root of the container, errors included. `$HOST` and `$DOMAIN` are its
    /// files.
    fn says(&self, line: &str) -> String {
        self.says_in(&["--uts"], line)
    }

    /// The same, in some of its namespaces only.
    fn says_in(&self, namespaces: &[&str], line: &str) -> String {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.process.id().to_string(), "--user"]).args(namespaces);
        command.args(["--setuid", "0", "--setgid", "0", "sh", "-c", &format!("exec 2>&1; {line}")]);
        command.env("LC_ALL", "C").env("HOST", self.file("hostname")).env("DOMAIN", self.file("domainname"));
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    }
}

impl Drop for Contained {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The names of this machine.
fn vm() -> [String; 2] {
    NAMES.map(|name| fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap())
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_name_that_is_written_is_that_containers_only() {
    let place = Place::new();
    let [one, two] = ["a", "b"].map(|id| place.container(id, false));
    let before = vm();
    assert_eq!(two.says("echo second >$HOST; cat $HOST"), "second\n");
    assert_eq!(one.says("echo first >$HOST; uname -n; cat $HOST /proc/sys/kernel/hostname"), "first\n".repeat(3));
    assert_eq!(
        one.says("echo example.org >$DOMAIN; cat $DOMAIN /proc/sys/kernel/domainname"),
        "example.org\n".repeat(2)
    );
    // One that was set by sethostname(2) as well.
    assert_eq!(one.says("hostname other; cat $HOST; stat -c %a:%u:%g $HOST"), "other\n644:0:0\n");
    assert_eq!(two.says("cat $HOST"), "second\n");
    assert_eq!(vm(), before);
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_container_inside_of_it_has_a_name_of_its_own() {
    let place = Place::new();
    let one = place.container("a", false);
    one.says("echo outer >$HOST");
    for namespaces in ["--uts", "--uts --user --map-root-user"] {
        let line = format!("unshare {namespaces} sh -c 'echo inner >$HOST; uname -n; cat $HOST'; cat $HOST");
        assert_eq!(one.says(&line), "inner\ninner\nouter\n", "{namespaces}");
    }
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn only_a_root_that_may_call_sethostname_writes() {
    let place = Place::new();
    let one = place.container("a", false);
    one.says("echo outer >$HOST");
    let says = |with: &str| one.says(&format!("{with} sh -c 'echo inner | tee $HOST >/dev/null; cat $HOST'"));
    for (with, error) in [
        ("setpriv --reuid 5 --clear-groups", "Permission denied"),
        ("setpriv --bounding-set -sys_admin --inh-caps -sys_admin", "Operation not permitted"),
        // Has CAP_SYS_ADMIN in a user namespace inside, to which the UTS namespace does not belong.
        ("unshare --user --map-root-user", "Operation not permitted"),
    ] {
        assert_eq!(says(with), format!("tee: {}: {error}\nouter\n", one.file("hostname")), "{with}");
    }
    assert_eq!(says("setpriv --bounding-set -all,+sys_admin,+dac_override"), "inner\n");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn callers_outside_of_the_container_are_refused_and_change_nothing() {
    let place = Place::new();
    let [one, two] = ["a", "b"].map(|id| place.container(id, false));
    one.says("echo first >$HOST");
    two.says("echo second >$HOST");
    let before = vm();
    for name in NAMES {
        let file = File::options().read(true).write(true).open(one.file(name)).unwrap();
        let denied = Some(libc::EPERM);
        assert_eq!(file.read_at(&mut [0; 9], 0).unwrap_err().raw_os_error(), denied, "this machine's root");
        assert_eq!(file.write_at(b"third", 0).unwrap_err().raw_os_error(), denied);
    }
    let strangers = [
        two.says(&format!("echo third | tee {}", one.file("hostname"))),
        // In the container's user namespace, but in this machine's UTS namespace.
        one.says_in(&[], "echo third | tee $HOST"),
    ];
    let denied = format!("third\ntee: {}: Operation not permitted\n", one.file("hostname"));
    assert_eq!(strangers, [denied.clone(), denied]);
    assert!(one.says_in(&[], "cat $HOST").ends_with("Operation not permitted\n"));
    assert_eq!((one.says("uname -n"), two.says("uname -n")), ("first\n".into(), "second\n".into()));
    assert_eq!(vm(), before);
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_container_with_read_only_sysctls_reads_its_name_only() {
    let place = Place::new();
    let one = place.container("a", true);
    let said = one.says("hostname own; cat $HOST; echo other >$HOST; cat $HOST");
    assert!(said.starts_with("own\n") && said.ends_with("Read-only file system\nown\n"), "{said}");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_restarted_service_forwards_the_name() {
    let mut place = Place::new();
    let one = place.container("a", false);
    one.says("echo first >$HOST");
    place.service.kill();
    place.service.start();
    assert_eq!(one.says("cat $HOST; echo second >$HOST; uname -n"), "first\nsecond\n");
}

#[test]
#[ignore = "needs root, /dev/fuse and user namespaces"]
fn a_write_has_the_same_effect_as_in_the_kernels_file() {
    let place = Place::new();
    let one = place.container("a", false);
    let before = vm();
    let input = place.dir.path().join("input");
    let bytes = prop_oneof![3 => b'a'..=b'z', 1 => Just(b'\n'), 1 => any::<u8>()];
    let writes = (proptest::collection::vec(bytes, 0..80), prop_oneof![2 => Just(0_u64), 1 => 0_u64..70], 1_usize..80);
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() });
    let result = runner.run(&writes, |(data, offset, size)| {
        fs::write(&input, &data).unwrap();
        fs::set_permissions(&input, fs::Permissions::from_mode(0o644)).unwrap();
        // One write of all data, then reads of `size` bytes each.
        let said = one.says(&format!(
            "printf twelve-bytes >$HOST
             dd if={} of=$HOST bs=4096 conv=notrunc oflag=seek_bytes seek={offset} status=none
             dd if=$HOST bs={size} status=none | od -An -v -tu1",
            input.display()
        ));
        let said: Vec<u8> = said.split_whitespace().map(|byte| byte.parse().unwrap()).collect();
        prop_assert_eq!(said, kernels(&data, offset, size));
        Ok(())
    });
    result.unwrap();
    assert_eq!(vm(), before);
}

/// The same through the kernel's own file, in a thread with a name of its own.
fn kernels(data: &[u8], offset: u64, size: usize) -> Vec<u8> {
    let in_thread = || {
        // SAFETY: takes a plain integer; only this thread gets another name.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWUTS) }, 0);
        let file = File::options().read(true).write(true).open("/proc/sys/kernel/hostname").unwrap();
        file.write_at(b"twelve-bytes", 0).unwrap();
        if !data.is_empty() {
            file.write_at(data, offset).unwrap();
        }
        let (mut text, mut part) = (Vec::new(), vec![0; size]);
        loop {
            match file.read_at(&mut part, text.len() as u64).unwrap() {
                0 => return text,
                length => text.extend_from_slice(&part[..length]),
            }
        }
    };
    thread::scope(|scope| scope.spawn(in_thread).join().unwrap())
}
