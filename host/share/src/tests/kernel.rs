//! The server behind a real kernel: a mount of `/dev/fuse`, whose requests are those of the guest's kernel, and
//! programs that use it. The server has no privileges and is confined; the programs are of any user.

use std::{
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::{fd::AsRawFd, unix::process::CommandExt},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use super::*;
use crate::fs::working_directory;

/// Size of the buffer for a request or a reply, in bytes: the largest write, and its header.
const BUFFER: usize = (1 << 20) + 4096;

/// A mount in a namespace of this thread, which ends with it.
pub(super) struct Mount {
    pub(super) directory: TempDir,
    device: File,
    /// Set when the server is to be replaced by a successor.
    replace: Arc<AtomicBool>,
    /// The host keeps the locks.
    locks: bool,
}

impl Mount {
    fn new(locks: bool) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["share", "mount"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let share = directory.path().join("share");
        std::os::unix::fs::chown(&share, Some(NOBODY), Some(NOBODY)).unwrap();
        std::fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let mount = Self { directory, device, replace: Arc::default(), locks };
        mount.attach();
        mount.serve();
        mount
    }

    fn attach(&self) {
        let target = CString::new(self.directory.path().join("mount").as_os_str().as_bytes()).unwrap();
        let fd = self.device.as_raw_fd();
        let options = format!("fd={fd},rootmode=40555,user_id=0,group_id=0,default_permissions,allow_other");
        let options = CString::new(options).unwrap();
        let flags = libc::MS_NOSUID | libc::MS_NODEV;
        // SAFETY: strings that end with a zero, and a namespace that only this thread has.
        unsafe {
            assert_eq!(libc::unshare(libc::CLONE_NEWNS), 0);
            let private = libc::MS_REC | libc::MS_PRIVATE;
            assert_eq!(libc::mount(std::ptr::null(), c"/".as_ptr(), std::ptr::null(), private, std::ptr::null()), 0);
            let (name, data) = (c"share".as_ptr(), options.as_ptr().cast());
            assert_eq!(libc::mount(name, target.as_ptr(), c"fuse".as_ptr(), flags, data), 0);
        }
    }

    fn serve(&self) {
        let (share, device) = (self.directory.path().join("share"), self.device.try_clone().unwrap());
        let (replace, locks) = (Arc::clone(&self.replace), self.locks);
        thread::spawn(move || {
            let state = State::own().unwrap();
            // The request that a server leaves to its successor.
            let mut left = None;
            while serve(&share, &device, &state, &replace, &mut left, locks) {}
        });
    }

    /// The share as the guest sees it.
    pub(super) fn place(&self) -> PathBuf {
        let share = self.directory.path().join("share");
        self.directory.path().join("mount").join(share.strip_prefix("/").unwrap())
    }

    /// Runs a script in the share as the guest sees it.
    pub(super) fn run(&self, user: u32, script: &str) -> Output {
        let place = self.place();
        let mut command = Command::new("bash");
        command.args(["-euc", &format!("cd {}; {script}", place.display())]).uid(user).gid(user);
        command.env("HOME", "/nonexistent").env("GIT_CONFIG_GLOBAL", "/dev/null").output().unwrap()
    }

    /// Runs a script that succeeds; returns what it printed.
    pub(super) fn output(&self, user: u32, script: &str) -> String {
        let output = self.run(user, script);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {}\n{errors}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let target = CString::new(self.directory.path().join("mount").as_os_str().as_bytes()).unwrap();
        // SAFETY: a string that ends with a zero.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
    }
}

/// Serves requests until a successor is wanted; false when there will be no more.
fn serve(
    share: &Path,
    device: &File,
    state: &Arc<State>,
    replace: &Arc<AtomicBool>,
    left: &mut Option<Vec<u8>>,
    locks: bool,
) -> bool {
    let (share, device, state) = (share.to_owned(), device.try_clone().unwrap(), Arc::clone(state));
    let (replace, mut next) = (Arc::clone(replace), left.take());
    let (give, take) = mpsc::channel();
    unprivileged(move || {
        let server = Server::new(&[Share { path: share, read_only: false }], &[], 4096, 1, &state, locks).0;
        sandbox::confine_share(&server.shared(), locks).unwrap();
        server.start_lock_threads(|| Ok(sandbox::confine_share_thread(true)?)).unwrap();
        let server = Arc::new(server);
        // With locks it starts a thread for each request, so that those that wait hold up none.
        if !locks {
            working_directory::separate().unwrap();
            sandbox::confine_share_thread(false).unwrap();
        }
        let mut bytes = vec![0; BUFFER];
        loop {
            let request = match next.take() {
                Some(request) => request,
                None => match (&device).read(&mut bytes) {
                    Ok(len) if replace.swap(false, Ordering::Relaxed) => {
                        // It is carried out, and nobody hears of it.
                        exchange(&server, &bytes[..len], BUFFER);
                        return give.send(bytes[..len].to_vec()).unwrap();
                    }
                    Ok(len) => bytes[..len].to_vec(),
                    Err(_) => return,
                },
            };
            if locks {
                let (server, device) = (Arc::clone(&server), device.try_clone().unwrap());
                thread::spawn(move || {
                    let reply = exchange(&server, &request, BUFFER);
                    if !reply.is_empty() {
                        let _ = (&device).write(&reply);
                    }
                });
                continue;
            }
            let reply = exchange(&server, &request, BUFFER);
            if !reply.is_empty() {
                // The program may be gone.
                let _ = (&device).write(&reply);
            }
        }
    });
    *left = take.try_recv().ok();
    left.is_some()
}

/// Runs a test on a thread with a mount.
pub(super) fn mounted(test: impl FnOnce(&Mount) + Send + 'static) {
    mounted_as(false, test);
}

/// The same with locks that the host keeps.
pub(super) fn mounted_with_locks(test: impl FnOnce(&Mount) + Send + 'static) {
    mounted_as(true, test);
}

fn mounted_as(locks: bool, test: impl FnOnce(&Mount) + Send + 'static) {
    if let Err(panic) = thread::spawn(move || test(&Mount::new(locks))).join() {
        std::panic::resume_unwind(panic);
    }
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn programs_of_any_user_keep_their_files() {
    mounted(|mount| {
        for user in [0, 1000, NOBODY] {
            let script = format!(
                "mkdir -p t{user} && cd t{user}; umask 022
                 echo one > a; ln -s a l; ln a h; mkdir d; chmod 700 d; chmod 444 a; mkfifo p; cp -a a d/copy
                 stat -c '%U' . >/dev/null; test \"$(stat -c %u:%g a d l p h d/copy | sort -u | wc -l)\" -le 2
                 stat -c %u:%g:%a a d d/copy; readlink l; cat l; stat -c %h a; mv d e; ls e; rm -rf e; ls"
            );
            // The directory above belongs to nobody.
            if user != 0 {
                mount.output(0, &format!("mkdir t{user} && chown {user}:{user} t{user}"));
            }
            let expected =
                format!("{user}:{user}:444\n{user}:{user}:700\n{user}:{user}:444\na\none\n2\ncopy\na\nh\nl\np");
            assert_eq!(mount.output(user, &script), expected);
        }
        let host = std::fs::read_dir(mount.directory.path().join("share/t0")).unwrap();
        for entry in host {
            use std::os::unix::fs::MetadataExt;
            assert_eq!(entry.unwrap().metadata().unwrap().uid(), NOBODY);
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn archives_and_repositories_survive() {
    mounted(|mount| {
        for user in [0, NOBODY] {
            let script = format!(
                "mkdir r{user} && cd r{user}; umask 022
                 git init -q . && git config user.email a@b && git config user.name a
                 for i in $(seq 50); do mkdir -p d$i/e; echo $i > d$i/e/f; done; ln -s d1 link
                 git add . && git commit -qm one && git gc -q && git fsck 2>&1 | grep -v dangling || true
                 git status --porcelain
                 tar cf ../t{user}.tar . && mkdir ../x{user} && tar xpf ../t{user}.tar -C ../x{user}
                 diff -r . ../x{user} && git -C ../x{user} status --porcelain
                 git -C ../x{user} rm -rq . && rm -rf ../x{user} && echo fine"
            );
            assert_eq!(mount.output(user, &script), "fine");
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn the_guests_kernel_checks_permissions_by_what_it_is_given() {
    mounted(|mount| {
        mount.output(0, "umask 077; echo secret > s; mkdir d; echo x > d/f; echo 1 > w; chmod 666 w; chmod 755 .");
        for script in ["cat s", "ls d", "chmod 777 s", "chown 1000 w", "rm s", "echo 2 > new"] {
            assert!(!mount.run(1000, script).status.success(), "{script}");
        }
        assert_eq!(mount.output(1000, "echo 2 >> w; cat w"), "1\n2");
        // Root may do all of it, and what it gives away is given away.
        mount.output(0, "chown 1000:1000 s d; chmod 1777 .; echo x > mine");
        assert_eq!(mount.output(1000, "cat s; ls d; echo y > new; stat -c %u new"), "secret\nf\n1000");
        assert!(!mount.run(1000, "rm mine").status.success(), "a sticky directory");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn root_of_the_guest_does_what_the_mode_of_its_files_denies() {
    mounted(|mount| {
        let script = "umask 022; echo 1 > f; chmod 444 f; echo 2 >> f; cat f; mkdir d; touch d/a d/b; chmod 555 d
             mv d/a d/c; mkdir d/e; ln -s x d/l; ln d/b d/h; rm d/c; stat -c %a d f; ls d; rm -r d; chmod 0 f; cat f";
        assert_eq!(mount.output(0, script), "1\n2\n555\n444\nb\ne\nh\nl\n1\n2");
        // Other users are refused by the guest's kernel.
        mount.output(0, "chmod 777 .; mkdir o; touch o/f; chmod 555 o; chmod 444 o/f; chown -R 1000:1000 o");
        assert!(!mount.run(1000, "echo x > o/f").status.success() && !mount.run(1000, "rm o/f").status.success());
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn data_is_the_same_by_mapping_by_append_and_on_the_host() {
    mounted(|mount| {
        let script = "head -c 5000000 /dev/urandom > big; cp big copy; cmp big copy; sha256sum < big
             exec 3>log; rm log; echo gone >&3; truncate -s 1M sparse; du -k sparse | cut -f1
             for i in $(seq 20); do echo $i >> lines & done; wait; sort -n lines | tail -1; wc -l < lines";
        let output = mount.output(0, script);
        let lines: Vec<_> = output.lines().collect();
        assert_eq!(lines[1..], ["0", "20", "20"]);
        let sum = Command::new("sha256sum").arg(mount.directory.path().join("share/big")).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&sum.stdout)[..64], lines[0][..64]);
        // The host appends; the guest sees it within the second that it may keep attributes.
        let mut log = File::create(mount.directory.path().join("share/hostlog")).unwrap();
        log.write_all(b"one\n").unwrap();
        assert_eq!(mount.output(0, "cat hostlog"), "one");
        log.write_all(b"two\n").unwrap();
        assert_eq!(mount.output(0, "sleep 1.1; cat hostlog"), "one\ntwo");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn programs_go_on_with_their_files_when_a_successor_serves_them() {
    mounted(|mount| {
        mount.output(0, "mkdir -p d/e; echo one > d/e/f; ls -lR . > /dev/null");
        let script = "cd d/e; exec 3<>f 4>>log; head -c 200000 /dev/zero > map
             mkdir ../../ready; while [ -e ../../ready ]; do sleep 0.01; done
             for i in $(seq 300); do echo $i >&4; mkdir n$i; mv n$i m$i; rmdir m$i; done
             cat <&3; echo two >&3; cat f; wc -l < log; sort -un log | wc -l; ls; pwd";
        thread::scope(|scope| {
            let program = scope.spawn(|| mount.output(0, script));
            let ready = mount.directory.path().join("share/ready");
            while !ready.exists() && !program.is_finished() {
                thread::sleep(std::time::Duration::from_millis(5));
            }
            std::fs::remove_dir(ready).unwrap();
            while !program.is_finished() {
                mount.replace.store(true, Ordering::Relaxed);
                thread::sleep(std::time::Duration::from_millis(7));
            }
            let output = program.join().unwrap();
            let (place, lines) = (output.lines().last().unwrap(), output.lines().collect::<Vec<_>>());
            assert_eq!(lines[..lines.len() - 1], ["one", "one", "two", "300", "300", "f", "log", "map"]);
            assert!(place.ends_with("/d/e"), "{output}");
        });
    });
}
