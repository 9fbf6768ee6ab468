//! An existing tap device of the host (`Documentation/networking/tuntap.rst` in the kernel's sources).
//!
//! The backend has no privileges and creates no device: the user makes one that belongs to them.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::{fd::AsRawFd, unix::fs::OpenOptionsExt},
    path::Path,
    time::Duration,
};

const TUN: &str = "/dev/net/tun";

/// Attempts to open a device whose last user may be just ending.
const MAX_ATTEMPTS: u32 = 20;
/// Pause between two attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Smallest MTU in bytes that IPv6 (RFC 8200, 5) and the engine work with.
const MIN_MTU: u16 = 1280;

/// Reason that a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It does not exist.
    #[error(
        "there is no tap device `{0}`; create it with `sudo ip tuntap add {0} mode tap user $USER && sudo ip link set \
         {0} up`"
    )]
    Missing(String),
    /// It is another kind of interface.
    #[error("`{0}` is not a tap device; create one with `sudo ip tuntap add NAME mode tap user $USER`")]
    NoTap(String),
    /// It belongs to another user.
    #[error(
        "the tap device `{0}` cannot be opened by this user; create it with `sudo ip tuntap add {0} mode tap user $USER`"
    )]
    Denied(String),
    /// Another program has it open.
    #[error("the tap device `{0}` is in use by another program")]
    Busy(String),
    /// The host refused it.
    #[error("cannot open the tap device `{name}`")]
    Open {
        /// Its name.
        name: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
}

/// A tap device that can probably be used.
#[derive(Clone, Debug)]
pub(in crate::backend) struct Tap {
    name: String,
    mtu: u16,
    multi_queue: bool,
}

impl Tap {
    /// Looks up the device of this name without opening it.
    pub(super) fn find(name: &str) -> Result<Self, TapError> {
        Self::find_in(Path::new("/sys/class/net"), name)
    }

    fn find_in(interfaces: &Path, name: &str) -> Result<Self, TapError> {
        let interface = interfaces.join(name);
        if !interface.exists() {
            return Err(TapError::Missing(name.to_owned()));
        }
        let read = |file: &str| fs::read_to_string(interface.join(file)).unwrap_or_default().trim().to_owned();
        // The file exists for tun and tap devices only; other interfaces read as 0 here.
        let flags = i64::from_str_radix(read("tun_flags").trim_start_matches("0x"), 16).unwrap_or(0);
        if flags & i64::from(libc::IFF_TAP) == 0 {
            return Err(TapError::NoTap(name.to_owned()));
        }
        let mtu = read("mtu").parse().unwrap_or(1500).max(MIN_MTU);
        Ok(Self { name: name.to_owned(), mtu, multi_queue: flags & i64::from(libc::IFF_MULTI_QUEUE) != 0 })
    }

    /// The name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Largest IP packet in bytes.
    pub(super) fn mtu(&self) -> u16 {
        self.mtu
    }

    /// Opens the device; each frame read or written follows virtio's header of 12 bytes.
    pub(super) async fn open(&self) -> Result<File, TapError> {
        let mut attempts = 0;
        loop {
            match self.attach() {
                // The network process of the last VM, or one that just died, may not have closed its queue yet.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempts < MAX_ATTEMPTS => {
                    attempts += 1;
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
                Err(error) => {
                    let name = self.name.clone();
                    return Err(match error.raw_os_error() {
                        // EPERM also means that the device vanished since `find`: the kernel would make a new one, for
                        // which this user has no privilege.
                        Some(libc::EPERM | libc::EACCES) => TapError::Denied(name),
                        Some(libc::EBUSY) => TapError::Busy(name),
                        _ => TapError::Open { name, source: error },
                    });
                }
                Ok(file) => return Ok(file),
            }
        }
    }

    fn attach(&self) -> io::Result<File> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN)?;
        // SAFETY: all-zero bytes are a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // The last byte stays zero: a name has at most 15.
        for (to, from) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(self.name.bytes()) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        // The flag must match the one that the device was made with, or the kernel answers EINVAL. Offloads
        // (IFF_VNET_HDR) let the host's kernel and the guest's do checksums and segments between them.
        let multi_queue = if self.multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | multi_queue;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes an ifreq, which outlives the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // virtio 1.x has `num_buffers` at the end of the header, two bytes more than the kernel's default.
        let header: libc::c_int = bulkhead_net::VIRTIO_HEADER as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_tap_device_will_do_and_the_message_says_how_to_make_one() {
        let directory = tempfile::tempdir().unwrap();
        let make = |name: &str, flags: Option<&str>, mtu: &str| {
            let interface = directory.path().join(name);
            fs::create_dir(&interface).unwrap();
            fs::write(interface.join("mtu"), mtu).unwrap();
            if let Some(flags) = flags {
                fs::write(interface.join("tun_flags"), flags).unwrap();
            }
        };
        make("eth0", None, "1500\n");
        make("tun0", Some("0x1001\n"), "1500\n");
        make("tap0", Some("0x1002\n"), "9000\n");
        make("tap1", Some("0x1102\n"), "68\n");
        let missing = Tap::find_in(directory.path(), "vm0").unwrap_err().to_string();
        assert!(missing.contains("ip tuntap add vm0 mode tap user $USER"), "{missing}");
        for name in ["eth0", "tun0"] {
            assert!(matches!(Tap::find_in(directory.path(), name), Err(TapError::NoTap(_))), "{name}");
        }
        let tap = Tap::find_in(directory.path(), "tap0").unwrap();
        assert_eq!((tap.mtu(), tap.multi_queue), (9000, false));
        let tap = Tap::find_in(directory.path(), "tap1").unwrap();
        assert_eq!((tap.mtu(), tap.multi_queue), (1280, true));
    }
}
