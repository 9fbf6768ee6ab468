//! A root file system like the guest's, visible to the test's thread only, with bundles in it.

use std::{
    fs::{self, File},
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_bind_recursive, mount_change, unmount,
};
use serde_json::{Value, json};

use crate::procfs::ProcfsService;

/// The isolating runtime, under its name in the guest.
pub const RUNTIME: &str = "sysbox-runc";

/// The runtime below it.
pub const CRUN: &str = "crun";

/// The runtime's table of id ranges.
const TABLE: &str = "run/sysbox-runc/ranges";

/// The program that makes the attempts, in the image.
pub const PROBE: &str = "/probe";

/// init's program.
pub const INIT: &str = "/usr/sbin/bulkhead-init";

/// The test image, for an engine to load.
pub const ALPINE: &str = "/alpine.tar";

/// The procfs service's program.
const PROGRAM: &str = "usr/sbin/bulkhead-procfs";

/// crun's state directory.
const STATE: &str = "/run/crun-test";

/// Time for a container to print its first line, or to end.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The root; it goes away with the thread that made it.
pub struct GuestRoot {
    root: PathBuf,
    procfs: Option<ProcfsService>,
}

impl Drop for GuestRoot {
    fn drop(&mut self) {
        // The hierarchy is this machine's. A container's group outlasts its last process a little.
        for _ in 0..100 {
            match fs::remove_dir(self.root.join("sys/fs/cgroup/docker")) {
                Err(error) if error.kind() != ErrorKind::NotFound => std::thread::sleep(Duration::from_millis(10)),
                Ok(()) | Err(_) => break,
            }
        }
    }
}

impl GuestRoot {
    /// Runs a test in a thread of its own, which has this root.
    pub fn with(test: impl FnOnce(Self) + Send + 'static) {
        let result = std::thread::spawn(|| test(Self::new())).join();
        if let Err(panic) = result {
            std::panic::resume_unwind(panic);
        }
    }

    /// A mount namespace for the calling thread, with the user land of the guest and the image `alpine`.
    fn new() -> Self {
        let from = |name: &str| PathBuf::from(std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set")));
        let userland = from("BULKHEAD_TEST_USERLAND");
        // SAFETY: the call takes no pointers; only this thread's view of the mounts changes.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNS) }, 0, "{}", std::io::Error::last_os_error());
        // As the engine's shim does: a container whose first process nobody waits for keeps its range of ids.
        // SAFETY: the option takes plain integers.
        assert_eq!(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) }, 0);
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        // Mounted in this namespace only.
        let root = PathBuf::from("/mnt");
        mount("root", &root, "tmpfs", MountFlags::empty(), c"mode=0755").unwrap();
        done(Command::new("tar").args(["-xpf", path(&userland), "-C", path(&root), "--exclude=./dev/*"]));
        let guest = Self { root, procfs: None };
        let at = |name: &str| guest.root.join(name);
        mount("proc", at("proc"), "proc", MountFlags::empty(), None).unwrap();
        mount_bind_recursive("/dev", at("dev")).unwrap();
        mount("sysfs", at("sys"), "sysfs", MountFlags::empty(), None).unwrap();
        mount("cgroup2", at("sys/fs/cgroup"), "cgroup2", MountFlags::empty(), None).unwrap();
        mount("run", at("run"), "tmpfs", MountFlags::empty(), c"mode=0755").unwrap();
        fs::copy(env!("CARGO_BIN_EXE_bulkhead-runtime"), at("usr/bin/sysbox-runc")).unwrap();
        for name in ["lower", "bundles"] {
            fs::create_dir_all(at("var/lib/docker").join(name)).unwrap();
        }
        unpack(&from("BULKHEAD_TEST_IMAGES").join("alpine.tar"), &guest.lower());
        fs::copy(from("BULKHEAD_TEST_PROBE"), guest.lower().join(&PROBE[1..])).unwrap();
        fs::copy(from("BULKHEAD_TEST_PROCFS"), at(PROGRAM)).unwrap();
        fs::copy(from("BULKHEAD_TEST_DOCKERD"), at("usr/sbin/dockerd")).unwrap();
        fs::copy(from("BULKHEAD_TEST_INIT"), at(&INIT[1..])).unwrap();
        fs::copy(from("BULKHEAD_TEST_IMAGES").join("alpine.tar"), at(&ALPINE[1..])).unwrap();
        guest.enter()
    }

    /// Makes this the thread's root. A chroot would not do: in one, the kernel refuses to create user namespaces.
    fn enter(self) -> Self {
        std::env::set_current_dir(&self.root).unwrap();
        rustix::process::pivot_root(".", ".").unwrap();
        unmount(".", UnmountFlags::DETACH).unwrap();
        std::env::set_current_dir("/").unwrap();
        // Shared like the VM's root, of which the runtime's mount namespace is a slave.
        mount_change("/", MountPropagationFlags::SHARED | MountPropagationFlags::REC).unwrap();
        let root = PathBuf::from("/");
        let procfs = Some(ProcfsService::start(&root.join(PROGRAM)));
        Self { root, procfs }
    }

    /// Moves the calling thread, and what it starts, into an empty network namespace: an engine changes its network.
    pub fn leave_network() {
        // SAFETY: the call takes no pointers; only this thread's view of the network changes.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", std::io::Error::last_os_error());
    }

    /// The service of the containers' files of `/proc` and `/sys`.
    pub fn procfs(&self) -> &ProcfsService {
        self.procfs.as_ref().unwrap()
    }

    /// The image's files.
    pub fn lower(&self) -> PathBuf {
        self.root.join("var/lib/docker/lower")
    }

    fn bundles(&self, name: &str) -> PathBuf {
        self.root.join("var/lib/docker/bundles").join(name)
    }

    /// The container's files.
    pub fn files(&self, name: &str) -> PathBuf {
        self.bundles(name).join("files")
    }

    /// The engine's mount of a container's root.
    pub fn engine_root(&self, name: &str) -> PathBuf {
        self.bundles(name).join("rootfs")
    }

    /// Creates a bundle.
    pub fn bundle(&self, name: &str, args: &[&str]) {
        let config = config(args);
        self.make(name, &config);
    }

    /// Creates a bundle like that of a privileged container, with all that isolation allows.
    ///
    /// With `no_new_privileges` crun installs the filter at another moment.
    pub fn privileged_bundle(&self, name: &str, args: &[&str], no_new_privileges: bool) {
        let mut config = config(args);
        let all = [
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FOWNER",
            "CAP_SETFCAP",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SYS_CHROOT",
            "CAP_SYS_ADMIN",
        ];
        config["process"]["capabilities"] = json!({ "bounding": all, "effective": all, "permitted": all });
        config["process"]["noNewPrivileges"] = no_new_privileges.into();
        for left_out in ["seccomp", "maskedPaths", "readonlyPaths"] {
            config["linux"][left_out] = Value::Null;
        }
        config["mounts"][3]["options"] = json!(["nosuid", "noexec", "nodev"]);
        self.make(name, &config);
    }

    /// Adds mounts to a bundle, after its others.
    pub fn add_mounts(&self, name: &str, mounts: &[Value]) {
        self.edit(name, |config| config["mounts"].as_array_mut().unwrap().extend_from_slice(mounts));
    }

    /// Changes a bundle's config.json.
    pub fn edit(&self, name: &str, change: impl FnOnce(&mut Value)) {
        let path = self.bundles(name).join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    fn make(&self, name: &str, config: &Value) {
        let bundle = self.bundles(name);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut config = config.clone();
        config["linux"]["cgroupsPath"] = format!("/docker/{name}").into();
        fs::write(bundle.join("config.json"), config.to_string()).unwrap();
        // A copy and not an overlay, which only the guest's kernel can id-map; like an overlay it is a mount of its
        // own.
        done(Command::new("cp").args(["-a", path(&self.lower()), path(&bundle.join("files"))]));
        mount_bind(bundle.join("files"), bundle.join("rootfs")).unwrap();
    }

    /// Creates a bundle with the same command and files of its own.
    pub fn copy_bundle(&self, from: &str, to: &str) {
        let config = fs::read(self.bundles(from).join("config.json")).unwrap();
        self.make(to, &serde_json::from_slice(&config).unwrap());
    }

    /// Unmounts and removes a bundle, as an engine does.
    pub fn remove(&self, name: &str) {
        let bundle = self.bundles(name);
        unmount(bundle.join("rootfs"), UnmountFlags::empty()).unwrap();
        fs::remove_dir_all(bundle).unwrap();
    }

    /// The command line of a runtime in the guest's root.
    fn command(program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(format!("/usr/bin/{program}"));
        command.args(["--root", STATE]).args(args).env_clear().env("PATH", "/usr/sbin:/usr/bin").current_dir("/");
        command
    }

    /// Runs a container to its end and returns its output.
    pub fn run(&self, program: &str, name: &str) -> String {
        let bundle = self.bundles(name);
        done(&mut Self::command(program, &["run", "--bundle", path(&bundle), name]))
    }

    /// Has the isolating runtime refuse a bundle, and returns its message.
    pub fn refused(&self, name: &str) -> String {
        let bundle = self.bundles(name);
        let output = Self::command(RUNTIME, &["run", "--bundle", path(&bundle), name]).output().unwrap();
        let (text, message) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(!output.status.success(), "{name} ran: {text}{message}");
        message.into_owned()
    }

    /// Runs another process in a started container, as the engine's shim does, and returns its output.
    pub fn exec(&self, name: &str, process: &Value) -> String {
        let file = self.bundles(name).join("process.json");
        fs::write(&file, process.to_string()).unwrap();
        done(&mut Self::command(RUNTIME, &["exec", "--process", path(&file), name]))
    }

    /// The first process of a started container.
    pub fn pid(name: &str) -> u64 {
        let state = fs::read(Path::new(STATE).join(name).join("status")).unwrap();
        let state: Value = serde_json::from_slice(&state).unwrap();
        state["pid"].as_u64().unwrap()
    }

    /// Removes the table of id ranges, as nothing in the VM should.
    pub fn lose_table(&self) {
        fs::remove_dir_all(self.root.join(TABLE)).unwrap();
    }

    /// Calls `create` and `start` as the engine's shim does.
    pub fn start(&self, program: &str, name: &str) {
        let bundle = self.bundles(name);
        let log = File::create(self.bundles(name).join("log")).unwrap();
        let mut create = Self::command(program, &["create", "--bundle", path(&bundle), name]);
        // The container's output goes to the same file as that of create; a pipe would stay open.
        let status = create.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).status().unwrap();
        assert!(status.success(), "create {name}: {}", self.output(name));
        done(&mut Self::command(program, &["start", name]));
    }

    fn output(&self, name: &str) -> String {
        fs::read_to_string(self.bundles(name).join("log")).unwrap()
    }

    /// Waits until a condition holds. `missing` says what is wrong if it does not in time.
    pub fn wait_for(missing: impl Fn() -> String, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + TIMEOUT;
        while !condition() {
            assert!(Instant::now() < deadline, "{}", missing());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until a started container's output is as wanted, and returns it.
    pub fn output_until(&self, name: &str, is_wanted: impl Fn(&str) -> bool) -> String {
        Self::wait_for(|| format!("{name} printed: {}", self.output(name)), || is_wanted(&self.output(name)));
        self.output(name)
    }

    /// The first id of a started container's range, from the container's own output.
    pub fn range(&self, name: &str) -> u32 {
        let line = self.output_until(name, |output| output.ends_with('\n'));
        let ids: Vec<u32> = line.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert!(ids.len() == 3 && ids[0] == 0 && ids[2] == 65_536, "{line}");
        ids[1]
    }

    /// Kills and deletes a container, and removes its bundle.
    pub fn end(&self, program: &str, name: &str) {
        let pid = Self::pid(name) as libc::pid_t;
        done(&mut Self::command(program, &["delete", "--force", name]));
        // SAFETY: waits for a process that is this one's child since its runtime ended; a null pointer is allowed.
        unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        let root = self.bundles(name).join("rootfs");
        Self::wait_for(
            || format!("{name}: its root is still in use"),
            || unmount(&root, UnmountFlags::empty()).is_ok(),
        );
        fs::remove_dir_all(self.bundles(name)).unwrap();
    }

    /// The number of entries in the table of id ranges.
    pub fn records(&self) -> usize {
        let files = fs::read_dir(self.root.join(TABLE)).into_iter().flatten().flatten();
        files.filter(|file| file.path().extension().is_some_and(|it| it == "json")).count()
    }
}

/// Counts of what a container could leave behind.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// Mounts in the engine's namespace.
    pub mounts: usize,
    /// Processes in the control groups of the test's containers.
    pub processes: usize,
    cgroups: usize,
    /// Files and directories below `/run`: the table, the staging area and crun's state.
    run: usize,
    /// Mounts in all namespaces and in none; `None` if /proc/slabinfo cannot be read.
    all_mounts: Option<usize>,
    user_namespaces: Option<usize>,
    /// Containers in the procfs service's registry.
    entries: usize,
    /// The service's memory in KiB.
    memory: u64,
}

impl Kernel {
    pub fn now(guest: &GuestRoot) -> Self {
        // Namespaces and cgroups outlast their last process a little, and the service looks for the dead at intervals.
        let deadline = Instant::now() + TIMEOUT;
        std::thread::sleep(Duration::from_millis(300));
        while ProcfsService::entries() > guest.records() {
            assert!(Instant::now() < deadline, "the procfs service keeps {} entries", ProcfsService::entries());
            std::thread::sleep(Duration::from_millis(100));
        }
        let table = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let cgroup = guest.root.join("sys/fs/cgroup/docker");
        let entries = fs::read_dir(&cgroup).into_iter().flatten().flatten();
        let cgroups: Vec<_> = entries.filter(|entry| entry.path().is_dir()).collect();
        let processes = cgroups
            .iter()
            .map(|entry| fs::read_to_string(entry.path().join("cgroup.procs")).map_or(0, |text| text.lines().count()));
        Self {
            mounts: table.lines().count(),
            processes: processes.sum(),
            cgroups: cgroups.len(),
            run: count(&guest.root.join("run")),
            all_mounts: slab("mnt_cache"),
            user_namespaces: slab("user_namespace"),
            entries: ProcfsService::entries(),
            memory: guest.procfs().memory(),
        }
    }

    /// Asserts that nothing is left.
    pub fn assert_no_more_than(self, before: Self) {
        assert_eq!((self.mounts, self.processes, self.cgroups), (before.mounts, before.processes, before.cgroups));
        assert!(
            self.entries <= before.entries,
            "{} entries of the procfs service, {} before",
            self.entries,
            before.entries
        );
        assert!(
            self.memory <= before.memory + 1024,
            "the procfs service has {} KiB, {} before",
            self.memory,
            before.memory
        );
        assert!(self.run <= before.run, "{} files below /run, {} before", self.run, before.run);
        // The kernel counts a slab's objects by batches, and other programs have mounts too.
        let more = |now: Option<usize>, then: Option<usize>| now.zip(then).is_some_and(|(now, then)| now > then + 150);
        assert!(!more(self.all_mounts, before.all_mounts), "mounts of no namespace are left");
        assert!(!more(self.user_namespaces, before.user_namespaces), "user namespaces are left");
    }
}

/// The number of files and directories below `directory`.
fn count(directory: &Path) -> usize {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| 1 + if entry.file_type().is_ok_and(|it| it.is_dir()) { count(&entry.path()) } else { 0 }).sum()
}

/// The kernel's count of objects of one kind in use.
fn slab(name: &str) -> Option<usize> {
    let table = fs::read_to_string("/proc/slabinfo").ok()?;
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(name))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// A config.json as an engine writes it, in short.
fn config(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FSETID",
        "CAP_FOWNER",
        "CAP_MKNOD",
        "CAP_NET_RAW",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETFCAP",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_SYS_CHROOT",
        "CAP_KILL",
        "CAP_AUDIT_WRITE"
    ]);
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "terminal": false, "user": { "uid": 0, "gid": 0 }, "args": args, "cwd": "/",
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
            "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities }
        },
        "root": { "path": "rootfs" },
        "hostname": "bundle",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
            { "destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"] },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] },
            { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid", "noexec", "nodev"] },
            { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"] },
            { "destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"] }
        ],
        "linux": {
            "namespaces": [
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network" },
                { "type": "cgroup" }
            ],
            // With an engine's profile the kernel runs a filter at each call, with isolation or without.
            "seccomp": {
                "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                "syscalls": [{
                    "names": ["kexec_load", "mount", "umount", "umount2", "fsopen"], "action": "SCMP_ACT_ERRNO"
                }]
            },
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
        }
    })
}

/// Unpacks the one layer of an image that `tests/images/build` made.
fn unpack(image: &Path, into: &Path) {
    let directory = tempfile::tempdir_in(into.parent().unwrap()).unwrap();
    done(Command::new("tar").args(["-xf", path(image), "-C", path(directory.path())]));
    let mut text = String::new();
    File::open(directory.path().join("manifest.json")).unwrap().read_to_string(&mut text).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    let layer = directory.path().join(manifest[0]["Layers"][0].as_str().unwrap());
    done(Command::new("tar").args(["-xpf", path(&layer), "-C", path(into)]));
}

/// Runs a command that must succeed, and returns its standard output.
pub fn done(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&stdout).into_owned();
    assert!(status.success(), "{command:?}: {status}: {text}{}", String::from_utf8_lossy(&stderr));
    text
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}
