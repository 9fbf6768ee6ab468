//! The refusals of `start` and `run`.

use std::{fs, os::unix::fs::PermissionsExt, process::Output};

use serde_json::json;
use support::program;

use crate::home::{Home, is_root, refused};

/// As [`Home::bulkhead`], with a KVM that this machine may not have.
fn with_any_kvm(home: &Home, arguments: &[&str]) -> Option<Output> {
    has_kvm().then(|| home.command(program()).args(arguments).env("BULKHEAD_TRY_ANY_KVM", "1").output().unwrap())
}

pub fn has_kvm() -> bool {
    fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
}

pub fn put_image(home: &Home) {
    let directory = home.path("data/bulkhead/image");
    fs::create_dir_all(&directory).unwrap();
    let mut kernel = vec![0; 64];
    kernel[..6].copy_from_slice(b"\x7fELF\x02\x01");
    kernel[18] = 62;
    let mut rootfs = vec![0; 4096];
    rootfs[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
    rootfs[1036] = 12;
    rootfs[1060] = 1;
    fs::write(directory.join("vmlinux"), &kernel).unwrap();
    fs::write(directory.join("rootfs.erofs"), &rootfs).unwrap();
    let files = json!({
        "vmlinux": { "size": kernel.len(), "sha256": "0" },
        "rootfs.erofs": { "size": rootfs.len(), "sha256": "0" },
    });
    fs::write(directory.join("manifest.json"), json!({ "version": "1", "files": files }).to_string()).unwrap();
}

#[test]
fn start_without_an_image_names_the_folders_and_the_command_that_builds_it() {
    let home = Home::new();
    let Some(output) = with_any_kvm(&home, &["start"]) else { return };
    let message = refused(&output, 1);
    assert!(message.contains("no guest image found") && message.contains("scripts/image"), "{message}");
    assert!(!home.runtime("").exists());
}

#[test]
fn start_with_a_truncated_image_names_the_file() {
    let home = Home::new();
    put_image(&home);
    fs::write(home.path("data/bulkhead/image/rootfs.erofs"), "short").unwrap();
    let Some(output) = with_any_kvm(&home, &["start"]) else { return };
    assert!(refused(&output, 1).contains("rootfs.erofs has 5 bytes, but its manifest says 4096"));
}

#[test]
fn start_with_more_memory_than_the_machine_has_is_refused() {
    let home = Home::new();
    put_image(&home);
    let Some(output) = with_any_kvm(&home, &["start", "--memory", "900T"]) else { return };
    assert!(refused(&output, 1).contains("but this machine has"));
}

#[test]
fn start_with_a_smaller_disk_than_exists_is_refused() {
    let home = Home::new();
    put_image(&home);
    let directory = home.path("data/bulkhead/default");
    fs::create_dir_all(&directory).unwrap();
    fs::File::create(directory.join("data.img")).unwrap().set_len(9 << 30).unwrap();
    let Some(output) = with_any_kvm(&home, &["start", "--disk", "8G"]) else { return };
    assert!(refused(&output, 1).contains("never shrinks"));
}

#[test]
fn start_with_a_network_that_is_not_there_says_how_to_get_it() {
    let home = Home::new();
    put_image(&home);
    let Some(output) = with_any_kvm(&home, &["start", "--net", "tap=bh-missing"]) else { return };
    let message = refused(&output, 1);
    assert!(message.contains("ip tuntap add bh-missing mode tap user $USER"), "{message}");
    let Some(output) = with_any_kvm(&home, &["start", "--net", "tap=lo"]) else { return };
    assert!(refused(&output, 1).contains("`lo` is not a tap device"));
    let mut command = home.command(program());
    command.env("PATH", home.path("bin")).env("BULKHEAD_TRY_ANY_KVM", "1").args(["start", "--net", "passt"]);
    let message = refused(&command.output().unwrap(), 1);
    assert!(message.contains("no `passt` in PATH"), "{message}");
}

#[test]
fn a_wrong_command_line_is_status_2() {
    let home = Home::new();
    for arguments in [
        &["start", "--cpus", "0"][..],
        &["start", "--memory", "8"],
        &["start", "--kernel", "/x"],
        &["frob"],
        &["start", "--net", "bridge"],
        &["run", "--net", "tap=a b", "--", "true"],
    ] {
        assert_eq!(home.bulkhead(arguments).status.code(), Some(2), "{arguments:?}");
    }
}

/// Runs the program as a user who may open nothing.
fn as_nobody(home: &Home, arguments: &[&str]) -> Option<Output> {
    if !is_root() || fs::metadata("/dev/kvm").ok()?.permissions().mode() & 0o006 == 0o006 {
        return None;
    }
    // The program's own directory may be closed to others.
    let copy = home.path("bulkhead");
    fs::copy(program(), &copy).unwrap();
    for directory in ["", "config", "data", "state", "cache", "run", "docker"] {
        std::os::unix::fs::chown(home.path(directory), Some(65534), Some(65534)).unwrap();
    }
    let mut command = home.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"]).arg(copy).args(arguments);
    command.output().ok()
}

#[test]
fn an_unreadable_kvm_is_refused_with_the_group_and_the_command() {
    let home = Home::new();
    let Some(output) = as_nobody(&home, &["start"]) else { return };
    let message = refused(&output, 1);
    assert!(message.contains("/dev/kvm may not be opened") && message.contains("sudo usermod -aG"), "{message}");
    let Some(doctor) = as_nobody(&home, &["doctor"]) else { return };
    let text = String::from_utf8(doctor.stdout).unwrap();
    assert_eq!(doctor.status.code(), Some(1));
    assert!(text.starts_with("1 FAIL /dev/kvm: ") && text.contains("belongs to the group"), "{text}");
}

#[test]
fn a_throw_away_profile_leaves_nothing_when_its_engine_cannot_start() {
    let home = Home::new();
    refused(&home.bulkhead(&["run", "--timeout", "5", "--", "true"]), 125);
    for directory in ["data", "state", "run", "config"] {
        let profiles = fs::read_dir(home.path(directory).join("bulkhead")).into_iter().flatten();
        assert_eq!(profiles.count(), 0, "{directory}");
    }
}
