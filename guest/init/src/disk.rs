//! The data disk: found by its serial, formatted when blank, checked when damaged, mounted, grown.
//!
//! It holds the user's images, containers and volumes. A disk that is not certainly blank is never formatted, and when
//! the disk is missing or foreign, the start fails: an engine on any other storage would seem to have lost everything.

use std::{
    fs::{self, File},
    io,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc::Sender,
};

use bulkhead_guest_common::bounded;
use nix::mount::{MsFlags, mount};

use crate::{
    error::{Error, chain},
    event::{Event, spawn},
    log, mounts,
    superblock::{Content, HEAD_BYTES, probe},
};

/// Mount point of the whole data disk. Its propagation is private, so that mounts that the engine makes in its
/// directories do not appear here a second time.
pub(crate) const DATA_MOUNT: &str = "/run/bulkhead/data";

/// Directories of the data disk, the engine's paths for them, and their mode.
pub(crate) const ENGINE_DIRECTORIES: [(&str, &str, u32); 2] =
    [("docker", "/var/lib/docker", 0o710), ("containerd", "/var/lib/containerd", 0o711)];

const MKFS: &str = "/usr/sbin/mkfs.ext4";
const FSCK: &str = "/usr/sbin/e2fsck";

nix::ioctl_read!(device_bytes, 0x12, 114, u64);
nix::ioctl_write_ptr!(resize_ext4, b'f', 16, u64);

/// A block device as sysfs describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    name: String,
    serial: String,
}

/// Lists the virtio disks that have a serial, in the order of their names.
fn candidates(sys_block: &Path) -> Vec<Candidate> {
    let Ok(entries) = fs::read_dir(sys_block) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name().into_string().ok()?;
            let serial = fs::read_to_string(entry.path().join("serial")).ok()?;
            name.starts_with("vd").then(|| Candidate { name, serial: serial.trim().to_owned() })
        })
        .collect();
    found.sort_by(|one, other| one.name.cmp(&other.name));
    found
}

/// Returns the name of the device with this serial. Names such as `vdb` depend on the order of the machine's devices
/// and say nothing about the content.
fn find_by_serial(candidates: &[Candidate], serial: &str) -> Result<String, Error> {
    // A virtio-blk serial has at most 20 bytes (virtio 1.3, 5.2.6, VIRTIO_BLK_T_GET_ID): the kernel shows a longer one
    // cut off. An empty request must not match a disk without a serial.
    let wanted = serial.trim();
    let visible = wanted.get(..20).unwrap_or(wanted);
    candidates
        .iter()
        .find(|candidate| !visible.is_empty() && candidate.serial == visible)
        .map(|candidate| candidate.name.clone())
        .ok_or_else(|| Error::NoDisk {
            serial: serial.to_owned(),
            seen: candidates
                .iter()
                .map(|disk| format!("{}={:?}", disk.name, disk.serial))
                .collect::<Vec<_>>()
                .join(" "),
        })
}

/// Returns whether a limit of the device's queue in sysfs is above zero, which says that it supports the operation.
fn queue_supports(name: &str, limit: &str) -> bool {
    fs::read_to_string(format!("/sys/block/{name}/queue/{limit}"))
        .is_ok_and(|value| value.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0))
}

/// Returns the mount options for a device with these features.
fn mount_options(discard: bool, write_zeroes: bool) -> String {
    // After an error nothing more is written, so that e2fsck finds the state of that moment.
    let mut options = vec!["errors=remount-ro"];
    if discard {
        // Blocks of deleted files become holes of the host's sparse file.
        options.push("discard");
    }
    if !write_zeroes {
        // ext4 would zero its inode tables in the background by real writes, which allocate space in a sparse file.
        options.push("noinit_itable");
    }
    options.join(",")
}

/// Runs a tool on the device; an exit status that is not in `good` is an error with the end of its output.
fn run_tool(tool: &'static str, arguments: &[&str], device: &Path, good: &[i32]) -> Result<(), Error> {
    let output = Command::new(tool)
        .args(arguments)
        .arg(device)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin")
        .stdin(Stdio::null())
        .output()
        .map_err(Error::file("run", tool))?;
    if output.status.code().is_some_and(|code| good.contains(&code)) {
        return Ok(());
    }
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    // A reason is one line of the agent's protocol and of `status`: three lines and 500 characters are enough for it.
    let tail: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let output_tail = tail[tail.len().saturating_sub(3)..].join(" / ").chars().take(500).collect();
    Err(Error::Tool { tool, status: output.status, output: output_tail })
}

fn format(device: &Path) -> Result<(), Error> {
    log::info(&format!("formatting the blank data disk {}", device.display()));
    // Lazy tables make it quick. `nodiscard`, because a new sparse file is all holes already. One block of a hundred is
    // for the VM's root only, so that containers, whose root is another user, cannot fill the disk for dockerd.
    let extended = "lazy_itable_init=1,lazy_journal_init=1,nodiscard";
    run_tool(MKFS, &["-q", "-F", "-m", "1", "-L", "bulkhead", "-E", extended], device, &[0])
}

fn check(device: &Path) -> Result<(), Error> {
    log::info(&format!("checking the data disk {}", device.display()));
    // `-p` corrects only what is safe to correct without a question (e2fsck(8)). Status 1: errors corrected; 2:
    // corrected, and a reboot is advised if the file system was mounted, which it is not.
    run_tool(FSCK, &["-p", "-f"], device, &[0, 1, 2])
}

fn read_head(device: &Path) -> Result<Vec<u8>, Error> {
    bounded::read_file(device, HEAD_BYTES as u64).map_err(Error::file("read the data disk", device))
}

fn size_of_device(device: &Path) -> Result<u64, Error> {
    let file = File::open(device).map_err(Error::file("open the data disk", device))?;
    let mut bytes = 0;
    // SAFETY: BLKGETSIZE64 writes one u64 to `bytes`, which outlives the call.
    unsafe { device_bytes(file.as_raw_fd(), &raw mut bytes) }
        .map_err(Error::file("read the size of the data disk", device))?;
    Ok(bytes)
}

/// Grows the mounted file system to the device's size with resize2fs's own request for a mounted one.
fn grow(target: &Path, device_bytes: u64) -> io::Result<()> {
    let block = nix::sys::statfs::statfs(target)?.block_size().unsigned_abs();
    // The kernel counts in blocks of the file system, and rounds down to whole ones.
    let blocks = device_bytes / block.max(1024);
    let root = File::open(target)?;
    // SAFETY: EXT4_IOC_RESIZE_FS reads one u64 from `blocks`, which outlives the call.
    unsafe { resize_ext4(root.as_raw_fd(), &raw const blocks) }?;
    Ok(())
}

fn mount_ext4(device: &Path, target: &Path, options: &str) -> Result<(), Error> {
    let flags = MsFlags::MS_NOATIME;
    mount(Some(device), target, Some("ext4"), flags, Some(options)).map_err(|errno| Error::Mount {
        what: format!("the data disk {}", device.display()),
        target: target.into(),
        source: errno.into(),
    })
}

/// Formats, checks, mounts and grows `device` at `target`, as far as each is necessary.
fn bring_up(device: &Path, target: &Path, options: &str) -> Result<(), Error> {
    let mut content = probe(&read_head(device)?);
    // Blank means that the whole first mebibyte is zero. Any partition table, file system or encrypted volume has
    // something there, and is left alone.
    if content == Content::Blank {
        format(device)?;
        // Read again, for the size that mkfs chose.
        content = probe(&read_head(device)?);
    }
    let Content::Ext4 { bytes, errors } = content else {
        return Err(Error::ForeignDisk { device: device.into() });
    };
    // After a crash the mount itself replays the journal. Only a recorded error, or a mount that fails, costs a check,
    // which takes minutes on a large disk. A second failure is final: only the user can decide about the data then.
    if errors {
        check(device)?;
        mount_ext4(device, target, options)?;
    } else if let Err(error) = mount_ext4(device, target, options) {
        log::info(&chain(&error));
        check(device)?;
        mount_ext4(device, target, options)?;
    }
    let available = size_of_device(device)?;
    // The user may have raised the disk's size since the last start. ext4 leaves a last block group unused when it is
    // too small, so the file system is often a little smaller than the device; below 1 MiB a call would change nothing.
    if available > bytes.saturating_add(1 << 20) {
        match grow(target, available) {
            Ok(()) => log::info(&format!("grew the data disk from {bytes} to {available} bytes")),
            // The engine works with the old size.
            Err(error) => log::info(&format!("cannot grow the data disk to {available} bytes: {error}")),
        }
    }
    Ok(())
}

/// Prepares the disk with this serial on a thread of its own, which ends with [`Event::DiskPrepared`].
pub(crate) fn start(serial: String, events: Sender<Event>) -> Result<(), Error> {
    spawn("disk", move || {
        let _ = events.send(Event::DiskPrepared(prepare(&serial)));
    })
}

/// Mounts the data disk and the engine's directories on it; takes minutes when a large disk has to be checked.
fn prepare(serial: &str) -> Result<(), Error> {
    let name = find_by_serial(&candidates(Path::new("/sys/block")), serial)?;
    let options =
        mount_options(queue_supports(&name, "discard_max_bytes"), queue_supports(&name, "write_zeroes_max_bytes"));
    let data = Path::new(DATA_MOUNT);
    mounts::make_directory(data, 0o700)?;
    bring_up(&PathBuf::from(format!("/dev/{name}")), data, &options)?;
    // The root is shared, and a new mount below a shared one is shared as well.
    mounts::propagation(DATA_MOUNT, MsFlags::MS_PRIVATE)?;
    for (directory, target, mode) in ENGINE_DIRECTORIES {
        let source = data.join(directory);
        mounts::make_directory(&source, mode)?;
        mounts::make_directory(target, mode)?;
        mounts::bind(&source, Path::new(target))?;
        // Containers can ask for shared or slave propagation of a volume, which takes a shared mount.
        mounts::propagation(target, MsFlags::MS_SHARED)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disks() -> Vec<Candidate> {
        [("vda", "root"), ("vdb", ""), ("vdc", "bulkhead-data-012345")]
            .map(|(name, serial)| Candidate { name: name.to_owned(), serial: serial.to_owned() })
            .to_vec()
    }

    #[test]
    fn the_disk_is_found_by_serial_and_not_by_order() {
        assert_eq!(find_by_serial(&disks(), "bulkhead-data-012345").unwrap(), "vdc");
        assert_eq!(find_by_serial(&disks(), "root").unwrap(), "vda");
    }

    #[test]
    fn a_serial_longer_than_virtio_carries_still_matches() {
        assert_eq!(find_by_serial(&disks(), "bulkhead-data-0123456789").unwrap(), "vdc");
    }

    #[test]
    fn a_missing_or_empty_serial_names_what_is_there_instead_of_guessing() {
        for serial in ["", " ", "other"] {
            let error = find_by_serial(&disks(), serial).unwrap_err().to_string();
            assert!(error.contains("vdc=\"bulkhead-data-012345\""), "{error}");
        }
    }

    #[test]
    fn only_virtio_disks_with_a_serial_are_candidates() {
        let sys = tempfile::tempdir().unwrap();
        for (name, serial) in [("vdb", Some("two\n")), ("loop0", Some("x")), ("vda", Some("one")), ("vdc", None)] {
            fs::create_dir(sys.path().join(name)).unwrap();
            if let Some(serial) = serial {
                fs::write(sys.path().join(name).join("serial"), serial).unwrap();
            }
        }
        let found: Vec<_> = candidates(sys.path()).into_iter().map(|disk| disk.name + "=" + &disk.serial).collect();
        assert_eq!(found, ["vda=one", "vdb=two"]);
    }

    #[test]
    fn lazy_initialisation_is_left_off_where_it_would_fill_a_sparse_disk() {
        assert_eq!(mount_options(true, true), "errors=remount-ro,discard");
        assert_eq!(mount_options(false, false), "errors=remount-ro,noinit_itable");
    }
}
