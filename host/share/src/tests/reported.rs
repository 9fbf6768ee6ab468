//! Faults that users of other engines have reported of directories that they mount, as tests of programs on a mount.
//!
//! The directory of the host belongs to a user without privileges, whose the server is; programs in the guest are of
//! any user. (Notifications of changes have tests of their own.)

use std::{
    fs,
    io::Write,
    os::unix::{fs::MetadataExt, net::UnixListener},
};

use super::{
    kernel::{Mount, mounted},
    *,
};

/// The directory on the host.
fn share(mount: &Mount) -> PathBuf {
    mount.directory.path().join("share")
}

/// Replaces a file of the host by a new one, as editors do.
fn replace(path: &Path, text: &str) {
    let new = path.with_extension("new");
    fs::write(&new, text).unwrap();
    fs::rename(new, path).unwrap();
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn the_owner_of_a_file_is_the_same_on_both_sides() {
    mounted(|mount| {
        let host = share(mount);
        fs::write(host.join("root's"), "").unwrap();
        fs::write(host.join("mine"), "").unwrap();
        std::os::unix::fs::chown(host.join("mine"), Some(NOBODY), Some(NOBODY)).unwrap();
        assert_eq!(mount.output(0, "stat -c %u:%g \"root's\" mine ."), "0:0\n65534:65534\n65534:65534");
        mount.output(NOBODY, "touch made");
        assert_eq!(fs::metadata(host.join("made")).unwrap().uid(), NOBODY);
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn users_other_than_root_create_files_where_the_mode_lets_them() {
    mounted(|mount| {
        mount.output(NOBODY, "mkdir -m 1777 open; mkdir -m 2775 group");
        mount.output(0, "chgrp 1000 group");
        for user in [33, 1000] {
            let script =
                format!("mkdir open/{user}; echo x > open/{user}/f; mv open/{user}/f open/{user}/g; rm open/{user}/g");
            mount.output(user, &script);
        }
        assert_eq!(mount.output(1000, "echo x > group/f; stat -c %u:%g group/f"), "1000:1000");
        assert!(!mount.run(33, "echo x > group/g").status.success());
        assert!(!mount.run(33, "rmdir open/1000").status.success());
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_database_makes_its_directory_its_own() {
    mounted(|mount| {
        // The image's script, as root, then the server as a user of its own, which insists on both.
        mount.output(0, "mkdir data; chown -R 70:70 data; chmod 700 data");
        let script = "test \"$(stat -c %u:%a data)\" = 70:700; umask 077; cd data
             mkdir base base/1 pg_wal; echo 16 > PG_VERSION; head -c 8192 /dev/urandom > base/1/1259
             echo 1 > postmaster.pid.new; sync postmaster.pid.new; mv postmaster.pid.new postmaster.pid; sync .
             ln -s ../pg_wal base/wal; ln PG_VERSION base/1/PG_VERSION; fallocate -l 65536 pg_wal/000000010000000000000001
             chmod 600 base/1/1259; truncate -s 16384 base/1/1259; stat -c %u:%a base/1/1259 pg_wal; stat -c %s base/1/1259";
        assert_eq!(mount.output(70, script), "70:600\n70:700\n16384");
        assert!(!mount.run(1000, "ls data").status.success());
        // The user of the host can look at it and remove it.
        let host = share(mount).join("data");
        assert_eq!(fs::metadata(&host).unwrap().uid(), NOBODY);
        assert_eq!(fs::read(host.join("base/1/PG_VERSION")).unwrap(), b"16\n");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_read_only_file_is_written_by_the_descriptor_that_created_it() {
    mounted(|mount| {
        // Objects of git: mode 0444, O_EXCL, written, linked or renamed, later removed. With O_APPEND and ftruncate(2).
        let script = r#"umask 022; /usr/bin/python3 - <<'END'
import os
fd = os.open("object", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o444)
assert os.write(fd, b"blob") == 4 and os.write(fd, b"more") == 4
os.ftruncate(fd, 6)
os.fchmod(fd, 0o444)
assert os.fstat(fd).st_size == 6 and os.pread(fd, 9, 0) == b"blobmo"
os.link("object", "linked")
os.rename("object", "ab")
os.close(fd)
END
cat ab; stat -c %a:%h linked"#;
        for user in [0, NOBODY] {
            assert_eq!(mount.output(user, script), "blobmo444:2");
            mount.output(user, "rm -f ab linked");
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn git_trusts_a_repository_of_its_own_user() {
    mounted(|mount| {
        mount.output(NOBODY, "git init -q repo; cd repo; echo x > f; git add f");
        assert_eq!(mount.output(NOBODY, "cd repo; git status --porcelain"), "A  f");
        // One that another user made is theirs, as on any disk.
        let refused = mount.run(1000, "cd repo; git status");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("dubious ownership"));
    });
}

#[test]
fn open_files_beyond_the_servers_limit_are_an_error_and_nothing_else_fails() {
    // Each open file is a descriptor of the server: as many as this process may have, up to 200,000.
    let (_, hard) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
    let wanted = 200_000 + 10_000;
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    if nix::sys::resource::setrlimit(limit, wanted, wanted.max(hard)).is_err() {
        nix::sys::resource::setrlimit(limit, hard, hard).unwrap();
    }
    let (soft, _) = nix::sys::resource::getrlimit(limit).unwrap();
    let handles = soft.min(wanted) as usize - 4096;
    unprivileged(move || {
        let mut guest = Guest::new();
        let (server, _) = Server::new(&[guest.share("", false)], &[], handles + 2048, 1, &State::own().unwrap(), false);
        guest.serve_with(server);
        let root = guest.node("");
        fs::write(guest.path("file"), b"x").unwrap();
        let file = guest.node("file");
        let open: Vec<_> =
            (0..handles).map(|_| u64_at(&guest.call_with(OPEN, file, body().u64(0), 64).unwrap(), 0)).collect();
        assert_eq!(guest.open(file, libc::O_RDONLY), Err(libc::ENFILE));
        assert_eq!(guest.create(root, "new", libc::O_RDWR, 0o600), Err(libc::ENFILE));
        assert_eq!(guest.call(OPENDIR, root, body().u64(0)), Err(libc::ENFILE));
        assert!(!guest.path("new").exists());
        // Everything that needs no open file of the guest's goes on.
        assert_eq!(guest.read(file, open[handles / 2], 0, 9).unwrap(), b"x");
        assert_eq!(guest.chmod(file, 0o640).unwrap().mode & 0o777, 0o640);
        assert!(guest.mkdir(root, "d", 0o755).is_ok() && guest.rename((root, "d"), (root, "e"), 0).is_ok());
        guest.call(RELEASE, file, body().u64(open[0])).unwrap();
        assert!(guest.open(file, libc::O_RDONLY).is_ok());
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_file_that_the_host_replaces_is_the_new_one_at_once_and_never_stale() {
    mounted(|mount| {
        let path = share(mount).join("config");
        replace(&path, "0");
        mount.output(0, "cat config");
        for round in 0..50 {
            let text = format!("round {round}{}", " x".repeat(round));
            replace(&path, &text);
            assert_eq!(mount.output(0, "cat config"), text);
        }
        // Directories are found by their names for a second, in which the guest believes what it knows.
        for round in 0..3 {
            let directory = share(mount).join("d");
            fs::create_dir(&directory).unwrap();
            fs::write(directory.join("f"), round.to_string()).unwrap();
            fs::hard_link(directory.join("f"), directory.join("g")).unwrap();
            assert_eq!(mount.output(0, "sleep 1.1; cat d/f"), round.to_string());
            // At once: one of the names of a file that the guest knows, and a directory under its new name.
            fs::remove_file(directory.join("f")).unwrap();
            assert_eq!(mount.output(0, "cat d/g; echo; ls d"), format!("{round}\ng"));
            fs::rename(&directory, share(mount).join(format!("d{round}"))).unwrap();
            assert_eq!(mount.output(0, &format!("cat d{round}/g")), round.to_string());
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_program_keeps_the_file_that_it_has_open_when_the_host_replaces_it() {
    mounted(|mount| {
        let path = share(mount).join("log");
        fs::write(&path, "old\n").unwrap();
        let script =
            "exec 3<log; mv log log.1; echo new > log; cat <&3; cat log; rm log.1; exec 4<log; cat <&4; stat -c %h log";
        assert_eq!(mount.output(0, script), "old\nnew\nnew\n1");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_file_that_the_host_writes_is_read_whole_by_the_next_program_that_opens_it() {
    mounted(|mount| {
        let path = share(mount).join("file");
        fs::write(&path, "").unwrap();
        // Longer, shorter, and of the same length, at once after the guest has looked.
        for text in ["one", "one and a half", "x", "y", "", &"long ".repeat(5000), "short"] {
            assert_eq!(mount.output(0, "stat -c '' file; cat file >/dev/null"), "");
            fs::write(&path, text).unwrap();
            assert_eq!(mount.output(0, "cat file"), text.trim(), "{text:.20}");
        }
        let mut log = fs::File::options().append(true).open(&path).unwrap();
        for line in 0..20 {
            log.write_all(b" more").unwrap();
            assert_eq!(mount.output(0, "wc -c < file"), (5 + 5 * (line + 1)).to_string());
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_database_of_sqlite_survives_programs_that_use_it_at_once() {
    mounted(|mount| {
        for journal in ["delete", "wal"] {
            let script = format!(
                "sqlite3 {journal}.db 'pragma journal_mode={journal}; create table t(n);' >/dev/null
                 for w in 1 2 3; do
                     for n in $(seq 15); do sqlite3 -cmd '.timeout 60000' {journal}.db \"insert into t values($n)\"; done &
                 done; wait
                 sqlite3 {journal}.db 'select count(*), sum(n) from t; pragma integrity_check'"
            );
            assert_eq!(mount.output(0, &script), "45|360\nok");
            let host = share(mount).join(format!("{journal}.db"));
            let line = std::process::Command::new("sqlite3").arg(host).arg("select sum(n) from t").output().unwrap();
            assert_eq!(line.stdout, b"360\n");
        }
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn a_socket_is_made_and_used_by_programs_and_one_of_the_host_refuses() {
    mounted(|mount| {
        let script = r#"/usr/bin/python3 - <<'END'
import os, socket
with socket.socket(socket.AF_UNIX) as server:
    server.bind("s")
    server.listen()
    os.chmod("s", 0o777)
    os.chown("s", 999, 999)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("s")
        peer, _ = server.accept()
        client.sendall(b"hello")
        assert peer.recv(9) == b"hello"
print(oct(os.stat("s").st_mode), os.stat("s").st_uid)
END
rm s; mkfifo p; echo through > p & cat p; rm p"#;
        assert_eq!(mount.output(0, script), "0o140777 999\nthrough");
        let _listener = UnixListener::bind(share(mount).join("hosts")).unwrap();
        let line =
            "test -S hosts; /usr/bin/python3 -c 'import socket; socket.socket(socket.AF_UNIX).connect(\"hosts\")'";
        let refused = mount.run(0, line);
        assert!(String::from_utf8_lossy(&refused.stderr).contains("ConnectionRefusedError"), "{refused:?}");
    });
}

#[test]
#[ignore = "needs root and /dev/fuse"]
fn many_small_files_are_removed_without_waiting() {
    mounted(|mount| {
        let begun = std::time::Instant::now();
        let script = "mkdir t; cd t; for n in $(seq 200); do echo x > f$n; done; ls | wc -l; cd ..; rm -r t";
        assert_eq!(mount.output(NOBODY, script), "200");
        // Far from the minutes that were reported, even on a busy machine.
        assert!(begun.elapsed() < std::time::Duration::from_secs(20));
    });
}
