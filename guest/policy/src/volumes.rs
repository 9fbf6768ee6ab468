//! Volumes: drivers and their options.
//!
//! The `local` driver passes `type`, `device` and `o` to mount(2) as the VM's root. Of all file systems a client may
//! name those that hold nothing of the VM: a tmpfs, a bind of a share, and a server of the network. Every word of `o`
//! has to be a known one, because others name paths (`lowerdir=`, `credentials=`).

use super::{
    addresses::is_host,
    drivers,
    sources::{self, BindSource},
};

/// Flags that moby turns into those of mount(2) and that concern this mount only. Without `remount` and the kinds of
/// propagation, which concern others.
const FLAGS: &[&str] = &[
    "defaults",
    "ro",
    "rw",
    "suid",
    "nosuid",
    "dev",
    "nodev",
    "exec",
    "noexec",
    "sync",
    "async",
    "dirsync",
    "atime",
    "noatime",
    "diratime",
    "nodiratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
];

/// Options of a tmpfs with a value; all are numbers.
const TMPFS: &[&str] = &["size", "nr_blocks", "nr_inodes", "mode", "uid", "gid"];

/// Options of NFS without a value.
const NFS_FLAGS: &[&str] = &[
    "soft",
    "softerr",
    "hard",
    "intr",
    "nointr",
    "lock",
    "nolock",
    "ac",
    "noac",
    "acl",
    "noacl",
    "cto",
    "nocto",
    "tcp",
    "udp",
    "bg",
    "fg",
    "resvport",
    "noresvport",
    "sharecache",
    "nosharecache",
    "rdirplus",
    "nordirplus",
];

/// Options of NFS with a value. Not `clientaddr`, which tells the server an address of the VM.
const NFS: &[&str] = &[
    "addr",
    "vers",
    "nfsvers",
    "minorversion",
    "proto",
    "port",
    "mountproto",
    "mountport",
    "mountvers",
    "mountaddr",
    "rsize",
    "wsize",
    "timeo",
    "retrans",
    "retry",
    "acregmin",
    "acregmax",
    "acdirmin",
    "acdirmax",
    "actimeo",
    "namlen",
    "lookupcache",
    "local_lock",
    "nconnect",
    "sec",
];

/// Options of SMB without a value.
const CIFS_FLAGS: &[&str] = &[
    "guest",
    "soft",
    "hard",
    "serverino",
    "noserverino",
    "mfsymlinks",
    "nounix",
    "unix",
    "noperm",
    "perm",
    "forceuid",
    "noforceuid",
    "forcegid",
    "noforcegid",
    "nobrl",
    "brl",
    "seal",
    "mapchars",
    "nomapchars",
    "mapposix",
    "nocase",
    "intr",
    "nointr",
];

/// Options of SMB with a value. Not `credentials`, a file, nor `sep`, which would change how the rest is read.
const CIFS: &[&str] = &[
    "addr",
    "ip",
    "username",
    "user",
    "password",
    "pass",
    "domain",
    "dom",
    "workgroup",
    "vers",
    "uid",
    "gid",
    "file_mode",
    "dir_mode",
    "port",
    "sec",
    "iocharset",
    "rsize",
    "wsize",
    "cache",
    "actimeo",
];

/// Values of `sec`: those for which the kernel asks no program of the VM for tickets.
const SECURITY: &[&str] = &["none", "sys", "ntlm", "ntlmi", "ntlmv2", "ntlmv2i", "ntlmssp", "ntlmsspi"];

/// A volume that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A driver that is not part of the engine.
    #[error(transparent)]
    Driver(#[from] drivers::Error),
    /// A key of the options.
    #[error("volume option {0:?} is not allowed: use type, device, o and size")]
    Key(String),
    /// A type of file system.
    #[error(
        "volume type {0:?} is not allowed with Enhanced Container Isolation: use tmpfs, nfs or cifs, or o=bind with a \
         shared directory"
    )]
    Type(String),
    /// A word of `o`.
    #[error("mount option {word:?} is not allowed for a volume of type {kind:?} with Enhanced Container Isolation")]
    Option {
        /// The type of the volume.
        kind: String,
        /// The word.
        word: String,
    },
    /// A device that does not belong to the type.
    #[error("volume device {device:?} is not allowed for type {kind:?}: use {expected}")]
    Device {
        /// The type of the volume.
        kind: String,
        /// The device.
        device: String,
        /// The form that is allowed.
        expected: &'static str,
    },
    /// A network file system without an address.
    #[error("a volume of type {0:?} needs the server's address: add addr=ADDRESS to o")]
    Address(String),
    /// A limit that is not a size.
    #[error("volume size {0:?} is invalid: use a number and a unit, such as 10G")]
    Size(String),
    /// A bind of something that is not in a share.
    #[error(transparent)]
    Source(#[from] sources::Error),
}

/// The options of the `local` driver. An empty value mounts nothing, as a missing one.
#[derive(Debug, Default)]
struct Options<'a> {
    kind: &'a str,
    device: &'a str,
    /// The words of `o`. Empty ones are passed over, as by the kernel.
    words: Vec<&'a str>,
}

impl Options<'_> {
    fn refuse_word(&self, word: &str) -> Error {
        Error::Option { kind: self.kind.to_owned(), word: word.to_owned() }
    }

    fn refuse_device(&self, expected: &'static str) -> Error {
        Error::Device { kind: self.kind.to_owned(), device: self.device.to_owned(), expected }
    }

    /// Checks that each word is a flag of mount(2), one of `flags`, or has a key for which `value` accepts its value.
    fn judge_words(&self, flags: &[&str], value: impl Fn(&str, &str) -> bool) -> Result<(), Error> {
        let is_known = |word: &&str| {
            FLAGS.contains(word)
                || flags.contains(word)
                || word.split_once('=').is_some_and(|(key, text)| value(key, text))
        };
        match self.words.iter().find(|word| !is_known(word)) {
            Some(word) => Err(self.refuse_word(word)),
            None => Ok(()),
        }
    }

    fn value_of(&self, key: &str) -> Option<&str> {
        self.words.iter().filter_map(|word| word.split_once('=')).find(|(name, _)| *name == key).map(|(_, text)| text)
    }
}

/// Returns true for a number with a unit or a percent sign, as the kernel's `memparse` reads it.
fn is_number(text: &str) -> bool {
    let digits = text.strip_suffix(|last: char| "kKmMgGtTpPeE%".contains(last)).unwrap_or(text);
    (1..=20).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
}

/// Returns true for a value that is one plain word: no path, no further option.
fn is_word(text: &str) -> bool {
    (1..=256).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte))
}

/// Returns true for a path on a server: nothing to clean, nothing that ends or escapes it.
fn is_remote_path(path: &str) -> bool {
    path == "/" || sources::is_clean(path.strip_suffix('/').unwrap_or(path))
}

fn judge_tmpfs(options: &Options<'_>) -> Result<(), Error> {
    if !matches!(options.device, "" | "tmpfs") {
        return Err(options.refuse_device("tmpfs"));
    }
    options.judge_words(&[], |key, value| TMPFS.contains(&key) && is_number(value))
}

fn judge_bind(options: &Options<'_>) -> Result<(), Error> {
    // Without the flag mount(2) would look for a file system named `none`; other types it ignores with it.
    if !options.words.iter().any(|word| matches!(*word, "bind" | "rbind")) {
        return Err(Error::Type(options.kind.to_owned()));
    }
    options.judge_words(&["bind", "rbind"], |_, _| false)?;
    match sources::bind(options.device)? {
        BindSource::Share => Ok(()),
        // Any container can use a volume, so it cannot lead to the socket that single images may have. Of what is the
        // guest's own a volume would be of no use: the engine cannot remove it again.
        BindSource::EngineSocket | BindSource::KernelModules | BindSource::TimeZone | BindSource::HostSocket => {
            Err(sources::Error::Restricted(options.device.to_owned()).into())
        }
    }
}

fn judge_nfs(options: &Options<'_>) -> Result<(), Error> {
    let expected = ":/PATH with the server in o=addr=ADDRESS";
    let (server, path) = options.device.split_once(':').ok_or_else(|| options.refuse_device(expected))?;
    if !(server.is_empty() || is_host(server)) || !is_remote_path(path) {
        return Err(options.refuse_device(expected));
    }
    options.judge_words(NFS_FLAGS, |key, value| {
        NFS.contains(&key) && is_word(value) && (key != "sec" || SECURITY.contains(&value))
    })?;
    options
        .value_of("addr")
        .filter(|address| is_host(address))
        .ok_or_else(|| Error::Address(options.kind.to_owned()))?;
    Ok(())
}

fn judge_cifs(options: &Options<'_>) -> Result<(), Error> {
    let expected = "//HOST/SHARE";
    let (server, path) = options
        .device
        .strip_prefix("//")
        .and_then(|rest| rest.find('/').map(|slash| rest.split_at(slash)))
        .ok_or_else(|| options.refuse_device(expected))?;
    // A percent sign or a question mark would mean something to the URL parser of the engine.
    if !is_host(server) || path == "/" || !is_remote_path(path) || path.contains(['%', '?', '#']) {
        return Err(options.refuse_device(expected));
    }
    options.judge_words(CIFS_FLAGS, |key, value| match key {
        "addr" | "ip" => is_host(value),
        "sec" => SECURITY.contains(&value),
        // Free text: the words were split at each comma, and the kernel keeps a double one inside of a password only.
        "username" | "user" | "password" | "pass" | "domain" | "dom" | "workgroup" => {
            !value.bytes().any(|byte| byte.is_ascii_control())
        }
        key => CIFS.contains(&key) && is_word(value),
    })
}

/// Returns true for the kind of file system, as the kernel names it, that a volume on a server of the network has.
pub fn is_on_server(fs_type: &[u8]) -> bool {
    matches!(fs_type, b"nfs" | b"nfs4" | b"cifs")
}

/// Judges a volume by its driver and options.
pub fn judge<'a>(driver: &str, options: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), Error> {
    drivers::volume(driver)?;
    let mut known = Options::default();
    for (key, value) in options {
        match key {
            "type" => known.kind = value,
            "device" => known.device = value,
            "o" => known.words = value.split(',').filter(|word| !word.is_empty()).collect(),
            "size" if is_size(value) => {}
            "size" => return Err(Error::Size(value.to_owned())),
            key => return Err(Error::Key(key.to_owned())),
        }
    }
    match known.kind {
        "" if known.device.is_empty() && known.words.is_empty() => Ok(()),
        "" | "none" | "bind" => judge_bind(&known),
        "tmpfs" => judge_tmpfs(&known),
        "nfs" | "nfs4" => judge_nfs(&known),
        "cifs" => judge_cifs(&known),
        kind => Err(Error::Type(kind.to_owned())),
    }
}

/// Returns true for a size as the engine writes it: a number, perhaps a fraction, and a unit.
fn is_size(text: &str) -> bool {
    text.len() <= 32
        && text.starts_with(|first: char| first.is_ascii_digit())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b". ".contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn volume(options: &[(&str, &str)]) -> Result<(), Error> {
        judge("local", options.iter().copied())
    }

    fn of(kind: &str, device: &str, o: &str) -> Result<(), Error> {
        volume(&[("type", kind), ("device", device), ("o", o)])
    }

    #[test]
    fn volumes_of_dockers_documentation_are_allowed() {
        assert_eq!(judge("", []), Ok(()));
        assert_eq!(volume(&[("size", "10G")]), Ok(()));
        assert_eq!(volume(&[("type", "tmpfs"), ("device", "tmpfs")]), Ok(()));
        assert_eq!(volume(&[("type", ""), ("device", ""), ("o", "")]), Ok(()));
        for (kind, device, o) in [
            ("tmpfs", "tmpfs", "size=100m,uid=1000"),
            ("tmpfs", "tmpfs", "size=50%,mode=1777,nr_inodes=1k,gid=5,noexec,nosuid,nodev,ro,noatime"),
            ("nfs", ":/path/to/dir", "addr=192.168.1.1,rw"),
            ("nfs", ":/docker/example", "addr=10.40.0.199,nolock,soft,rw"),
            ("nfs", ":/var/docker-nfs", "addr=10.0.0.10,rw,nfsvers=4,async"),
            ("nfs", ":/", "addr=fs-1.efs.us-east-1.amazonaws.com,nfsvers=4.1,rsize=1048576,hard,timeo=600,retrans=2"),
            ("nfs4", "nas:/export/", "addr=2001:db8::1,proto=tcp6,vers=4.2,sec=sys"),
            (
                "cifs",
                "//uxxxxx.your-server.de/backup",
                "addr=uxxxxx.your-server.de,username=u,password=p/!w,file_mode=0777,dir_mode=0777",
            ),
            ("cifs", "//nas/share/sub dir", "username=a,password=b,vers=3.0,domain=W,uid=1000,nobrl"),
            ("none", "/host_mnt/home/me/data", "bind"),
            ("none", "/host_mnt/srv/x", "rbind,ro,nosuid"),
            ("", "/host_mnt/x", "bind"),
            ("bind", "/host_mnt/x", "bind,defaults"),
        ] {
            assert_eq!(of(kind, device, o), Ok(()), "{kind} {device} {o}");
        }
    }

    #[test]
    fn file_systems_that_show_the_vm_are_refused() {
        for (kind, device, o) in [
            ("overlay", "overlay", "lowerdir=/usr/sbin:/etc"),
            ("overlay", "overlay", "lowerdir=/usr/share:run/bulkhead"),
            ("overlay", "overlay", "lowerdir=/usr/share:/ru\\n/bulkhead"),
            ("Overlay", "overlay", ""),
            ("proc", "proc", ""),
            ("sysfs", "sysfs", ""),
            ("cgroup2", "x", ""),
            ("devtmpfs", "x", ""),
            ("debugfs", "x", ""),
            ("ext4", "/dev/vdb", ""),
            ("erofs", "/var/lib/docker/volumes/t09v/_data/img", ""),
            ("tmpfs ", "tmpfs", ""),
            ("TMPFS", "tmpfs", ""),
            ("fuse", "x", ""),
            ("virtiofs", "share", ""),
            ("9p", "share", ""),
            ("none", "tmpfs", ""),
        ] {
            assert_eq!(of(kind, device, o), Err(Error::Type(kind.to_owned())), "{kind}");
        }
        assert_eq!(volume(&[("type", "proc")]), Err(Error::Type("proc".to_owned())));
    }

    #[test]
    fn a_bind_of_a_vm_path_is_refused_in_every_spelling() {
        for device in [
            "/etc",
            "/",
            "etc",
            "run/bulkhead",
            "/var/run/docker.sock",
            "/run/docker.sock",
            "/host_mnt/../etc",
            "\\etc",
            "/host_mnt\0",
            "/lib/modules",
            "",
            "proc",
            "/proc/1/root",
        ] {
            for kind in ["", "none", "bind"] {
                assert_eq!(
                    of(kind, device, "bind"),
                    Err(Error::Source(sources::Error::Restricted(device.to_owned()))),
                    "{device}"
                );
            }
        }
    }

    #[test]
    fn words_and_keys_that_are_not_known_are_refused() {
        for (kind, device, o) in [
            ("tmpfs", "tmpfs", "remount"),
            ("tmpfs", "tmpfs", "bind"),
            ("tmpfs", "tmpfs", "shared"),
            ("tmpfs", "tmpfs", "size=/etc"),
            ("tmpfs", "tmpfs", "mpol=bind:0"),
            ("none", "/host_mnt/x", "bind,remount"),
            ("none", "/host_mnt/x", "bind,rshared"),
            ("none", "/host_mnt/x", "bind,lowerdir=/etc"),
            ("nfs", ":/x", "addr=1.2.3.4,bind"),
            ("nfs", ":/x", "addr=1.2.3.4,sec=krb5"),
            ("nfs", ":/x", "addr=1.2.3.4,proto=/run/x"),
            ("nfs", ":/x", "addr=1.2.3.4,clientaddr=1.2.3.4"),
            ("nfs", ":/x", "addr=1.2.3.4,xprtsec=tls"),
            ("cifs", "//a/b", "multiuser,username=a"),
            ("cifs", "//a/b", "cruid=0,username=a"),
            ("cifs", "//a/b", "credentials=/etc/shadow"),
            ("cifs", "//a/b", "cred=/etc/shadow"),
            ("cifs", "//a/b", "sep=;,username=a"),
            ("cifs", "//a/b", "sec=krb5"),
            ("cifs", "//a/b", "password=a,,source=/etc"),
            ("cifs", "//a/b", "ip=/run/x"),
        ] {
            assert!(matches!(of(kind, device, o), Err(Error::Option { .. })), "{kind} {o}");
        }
        assert_eq!(volume(&[("lowerdir", "/etc")]), Err(Error::Key("lowerdir".to_owned())));
        assert_eq!(volume(&[("Type", "overlay")]), Err(Error::Key("Type".to_owned())));
        assert_eq!(volume(&[("size", "/etc")]), Err(Error::Size("/etc".to_owned())));
        assert!(judge("../../p", []).is_err());
    }

    #[test]
    fn servers_need_an_address_and_devices_a_form() {
        assert_eq!(of("nfs", ":/x", "rw"), Err(Error::Address("nfs".to_owned())));
        for (kind, device) in [
            ("nfs", "/etc"),
            ("nfs", ":etc"),
            ("nfs", ":/a/../b"),
            ("nfs", "/run/x:/y"),
            ("cifs", "/etc"),
            ("cifs", "///etc"),
            ("cifs", "//a"),
            ("cifs", "//a/"),
            ("cifs", "\\\\a\\b"),
            ("cifs", "//a/%2e%2e/b"),
            ("tmpfs", "/dev/vdb"),
            ("tmpfs", "none"),
        ] {
            assert!(matches!(of(kind, device, "addr=1.2.3.4"), Err(Error::Device { .. })), "{kind} {device}");
        }
    }

    proptest! {
        #[test]
        fn no_options_make_it_panic_and_a_path_of_the_vm_is_never_mounted(
            kind in "(none|bind|tmpfs|overlay|proc|nfs|cifs|)",
            device in "(/etc|/|etc|tmpfs|/host_mnt|:/x|//a/b|/run/docker.sock|.{0,8})",
            words in proptest::collection::vec("(bind|rbind|ro|addr=1.1.1.1|lowerdir=/etc|size=1m|.{0,8})", 0..4),
        ) {
            if of(&kind, &device, &words.join(",")).is_ok() {
                prop_assert!(kind != "overlay" && kind != "proc");
                prop_assert!(!matches!(device.as_str(), "/etc" | "/" | "etc" | "/run/docker.sock"));
                prop_assert!(!words.iter().any(|word| word.contains("lowerdir")));
            }
        }
    }
}
