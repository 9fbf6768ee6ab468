//! Shared directories of the host, as the VM has them: where the source of a mount is that a client names.
//!
//! dockerd opens the sources of mounts by their paths, and in its jail it follows no link of the shares' file system,
//! which containers can write. So links are resolved here, as they lead on the host: an absolute one is one from the
//! host's root, and what it leads to is there only as far as it is shared. dockerd gets a path without links; the runtime
//! opens it again and judges what it finds.

use std::{
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use bulkhead_guest_common::mount::is_mount_point;
use bulkhead_policy::{
    shares::{self, MOUNT_POINT, Shares},
    sources::{self, HOST_SERVICES, SSH_AGENT, is_host_socket},
};
use bulkhead_protocol::{ENGINE_SOCKET, HostSocket};
use rustix::{
    fs::{Mode, OFlags, ResolveFlags},
    io::Errno,
};

use crate::rules::{Isolation, Refusal};

/// Attempts at a lookup while directories on its way are renamed (openat2(2), EAGAIN).
const ATTEMPTS: u32 = 16;

/// The list of shared directories.
#[derive(Clone, Debug)]
pub enum ShareList {
    /// It is in this file, which is replaced when it changes: a JSON list of paths on the host.
    File(PathBuf),
    /// It stays the same.
    Fixed(SharedDirectories),
}

impl Default for ShareList {
    fn default() -> Self {
        Self::Fixed(SharedDirectories::default())
    }
}

impl From<SharedDirectories> for ShareList {
    fn from(directories: SharedDirectories) -> Self {
        Self::Fixed(directories)
    }
}

impl ShareList {
    /// Returns the directories that are shared now; none if the file cannot be read.
    pub(crate) fn current(&self) -> SharedDirectories {
        match self {
            Self::Fixed(directories) => directories.clone(),
            // In memory and short, so that a thread of its own would take longer.
            Self::File(path) => SharedDirectories::new(Shares::new(read_list(path).unwrap_or_else(|error| {
                eprintln!("cannot read the shared directories from {}: {error}", path.display());
                Vec::new()
            }))),
        }
    }
}

fn read_list(path: &Path) -> io::Result<Vec<String>> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

/// A socket that containers may mount by its path on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SocketPlace {
    /// A clean path.
    on_host: String,
    in_vm: String,
}

impl SocketPlace {
    /// The places of sockets of the host, and of the engine's socket, which has these paths there.
    pub(crate) fn list(sockets: &[HostSocket], engine: &[String]) -> Arc<[Self]> {
        let hosts = sockets.iter().map(|socket| (&socket.path, format!("{HOST_SERVICES}/{}", socket.name)));
        // First, as a setting must not give the engine's socket another meaning.
        let all = engine.iter().map(|path| (path, ENGINE_SOCKET.to_owned())).chain(hosts);
        all.filter_map(|(path, in_vm)| Some(Self { on_host: shares::clean(path)?, in_vm })).collect()
    }
}

/// The shared directories at one moment, and the place where they are mounted.
#[derive(Clone, Debug)]
pub struct SharedDirectories {
    shares: Shares,
    sockets: Arc<[SocketPlace]>,
    root: PathBuf,
    /// The root counts only while a file system is mounted there.
    is_mount: bool,
}

impl Default for SharedDirectories {
    fn default() -> Self {
        Self::new(Shares::default())
    }
}

impl SharedDirectories {
    /// The shares at their place in the VM.
    pub fn new(shares: Shares) -> Self {
        Self { shares, sockets: Arc::new([]), root: MOUNT_POINT.into(), is_mount: true }
    }

    /// The shares in a directory that stands for their place in the VM, for tests.
    pub fn below(root: &Path, shares: Shares) -> Self {
        Self { shares, sockets: Arc::new([]), root: root.to_owned(), is_mount: false }
    }

    /// The same with these sockets of the host.
    pub(crate) fn with_sockets(self, sockets: Arc<[SocketPlace]>) -> Self {
        Self { sockets, ..self }
    }

    /// Returns the shares without their place.
    pub(crate) fn shares(&self) -> &Shares {
        &self.shares
    }

    /// Returns true if nothing is shared.
    pub(crate) fn is_empty(&self) -> bool {
        self.shares.is_empty()
    }

    /// Judges a source that the engine has for a container, which can be from a time when more was shared.
    pub(crate) fn judge(&self, path: &str) -> Result<(), Refusal> {
        self.judge_socket(path)?;
        let is_elsewhere = shares::on_host(path).is_none();
        if is_elsewhere || self.shares.reach(path) { Ok(()) } else { Err(sources::refusal(path).into()) }
    }

    /// Returns the path in the VM of a source that a client names; `None` for one that stays as it is.
    ///
    /// Looks into the shares' file system, so that it can take a while.
    pub(crate) fn place(&self, path: &str, isolation: Isolation) -> Result<Option<String>, Refusal> {
        if let Some(socket) = self.socket(path) {
            return Ok(Some(socket));
        }
        self.judge_socket(path)?;
        match self.shares.in_vm(path) {
            Some(place) => self.resolve(&place).map(Some),
            // Below the mount point, where nobody has something to look for. Other paths are for the judges.
            None if isolation == Isolation::On
                && shares::clean(path).is_some_and(|path| shares::on_host(&path).is_some()) =>
            {
                Err(sources::refusal(path).into())
            }
            None => Ok(None),
        }
    }

    /// Returns the place in the VM of a socket that a client names by its path on the host. It comes before a share with
    /// the same path, in which the socket leads to nothing.
    fn socket(&self, path: &str) -> Option<String> {
        let path = shares::clean(path).filter(|path| !shares::is_special(path))?;
        let path = shares::on_host(&path).unwrap_or(&path);
        Some(self.sockets.iter().find(|socket| socket.on_host == path)?.in_vm.clone())
    }

    /// Refuses a socket that the host does not offer: `docker run -v` would have the engine make a directory in its place.
    fn judge_socket(&self, path: &str) -> Result<(), Refusal> {
        match is_host_socket(path) && self.sockets.iter().all(|socket| socket.in_vm != path) {
            true if path == SSH_AGENT => Err(Refusal::NoSshAgent),
            true => Err(Refusal::NoHostSocket),
            false => Ok(()),
        }
    }

    /// Resolves the links of a path in the VM as far as it exists. The engine creates the rest, or reports that it is
    /// missing.
    fn resolve(&self, place: &str) -> Result<String, Refusal> {
        let on_host = shares::on_host(place).unwrap_or(place);
        let root = self.open_root().map_err(|_| Refusal::SharesMissing(on_host.to_owned()))?;
        let path = Path::new(on_host.trim_start_matches('/'));
        for existing in path.ancestors() {
            let found = match open_below(&root, existing) {
                Ok(found) => found,
                Err(Errno::NOENT | Errno::NOTDIR) => continue,
                // The engine finds the same and has its words for it.
                Err(_) => break,
            };
            let Some(real) = path_of(&root, &found) else { break };
            let rest = path.strip_prefix(existing).unwrap_or(Path::new(""));
            if let Some(target) = dangling_link(&found, &real, rest).filter(|target| !self.shares.contains(target)) {
                return Err(sources::Error::NotShared(target).into());
            }
            // `join` with an empty path would append a slash.
            let real = if rest.as_os_str().is_empty() { real } else { real.join(rest) };
            let Some(real) = real.to_str().and_then(shares::clean) else { break };
            // The server has no more than the shares, and the way to them.
            return if self.shares.contains(&real) {
                Ok(format!("{MOUNT_POINT}{}", if real == "/" { "" } else { &real }))
            } else {
                Err(sources::Error::NotShared(real).into())
            };
        }
        Ok(place.to_owned())
    }

    fn open_root(&self) -> io::Result<OwnedFd> {
        let root = rustix::fs::open(&self.root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        if self.is_mount && !is_mount_point(&self.root) {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(root)
    }
}

/// Returns the path on the host of a file that was found below the root.
fn path_of(root: &OwnedFd, found: &OwnedFd) -> Option<PathBuf> {
    let real = |fd: &OwnedFd| fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    let (root, found) = (real(root)?, real(found)?);
    Some(Path::new("/").join(found.strip_prefix(root).ok()?))
}

/// Returns the clean target of the first name of `rest` in a directory, if that is a link. What it leads to is not there.
fn dangling_link(directory: &OwnedFd, real: &Path, rest: &Path) -> Option<String> {
    let name = rest.components().next()?;
    let target = rustix::fs::readlinkat(directory, name.as_os_str(), Vec::new()).ok()?;
    let mut path = PathBuf::from("/");
    for component in real.join(Path::new(target.to_str().ok()?)).components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => drop(path.pop()),
            _ => {}
        }
    }
    path.to_str().and_then(shares::clean)
}

/// Opens a path below a directory that is the root for all of its links.
fn open_below(root: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let mut attempt = 0;
    loop {
        attempt += 1;
        let opened = rustix::fs::openat2(
            root.as_fd(),
            path.as_os_str().as_bytes(),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
            resolve,
        );
        match opened {
            Err(Errno::AGAIN) if attempt < ATTEMPTS => {}
            opened => return opened,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A place with the shares /home/me and /srv/data of a host.
    fn host() -> (tempfile::TempDir, SharedDirectories) {
        let directory = tempfile::tempdir().unwrap();
        for path in ["home/me/src", "srv/data/x"] {
            fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        let shares = Shares::new(["/home/me", "/srv/data"].map(str::to_owned));
        let directories = SharedDirectories::below(directory.path(), shares);
        (directory, directories)
    }

    fn place(directories: &SharedDirectories, path: &str) -> Result<Option<String>, Refusal> {
        directories.place(path, Isolation::On)
    }

    #[test]
    fn a_list_in_a_file_is_the_present_one_and_empty_while_it_cannot_be_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("shares");
        let list = ShareList::File(path.clone());
        let shared = || ["/home/me", "/srv"].map(|path| list.current().shares().contains(path));
        assert_eq!(shared(), [false, false]);
        fs::write(&path, r#"["/home/me"]"#).unwrap();
        assert_eq!(shared(), [true, false]);
        fs::write(&path, r#"["/srv","relative"]"#).unwrap();
        assert_eq!(shared(), [false, true]);
        for broken in ["", r#"["/srv""#, r#"{"shares":["/srv"]}"#] {
            fs::write(&path, broken).unwrap();
            assert_eq!(shared(), [false, false], "{broken}");
        }
    }

    #[test]
    fn a_path_without_links_stays_as_it_is_whether_it_exists_or_not() {
        let (directory, directories) = host();
        fs::write(directory.path().join("home/me/file"), "").unwrap();
        for path in ["/home/me", "/home/me/src", "/home/me/file", "/home/me/new/er", "/home/me/file/below"] {
            assert_eq!(place(&directories, path), Ok(Some(format!("/host_mnt{path}"))), "{path}");
        }
    }

    #[test]
    fn links_lead_where_they_lead_on_the_host() {
        let (directory, directories) = host();
        let me = directory.path().join("home/me");
        symlink("src", me.join("relative")).unwrap();
        symlink("/srv/data", me.join("absolute")).unwrap();
        symlink("../../srv/data/x", me.join("across")).unwrap();
        symlink("../../../../../../srv/data", me.join("beyond")).unwrap();
        for (path, expected) in [
            ("/home/me/relative", "/home/me/src"),
            ("/home/me/relative/new", "/home/me/src/new"),
            ("/home/me/absolute", "/srv/data"),
            ("/home/me/absolute/x", "/srv/data/x"),
            ("/home/me/absolute/new", "/srv/data/new"),
            ("/home/me/across", "/srv/data/x"),
            ("/home/me/beyond", "/srv/data"),
        ] {
            assert_eq!(place(&directories, path), Ok(Some(format!("/host_mnt{expected}"))), "{path}");
        }
    }

    #[test]
    fn links_out_of_the_shares_lead_nowhere() {
        let (directory, directories) = host();
        let me = directory.path().join("home/me");
        symlink("..", me.join("above")).unwrap();
        symlink("/", me.join("root")).unwrap();
        symlink("/etc", me.join("etc")).unwrap();
        symlink("loop", me.join("loop")).unwrap();
        let not_shared = |path: &str| Err(sources::Error::NotShared(path.to_owned()).into());
        assert_eq!(place(&directories, "/home/me/above"), not_shared("/home"));
        assert_eq!(place(&directories, "/home/me/root"), not_shared("/"));
        assert_eq!(place(&directories, "/home/me/etc"), not_shared("/etc"));
        assert_eq!(place(&directories, "/home/me/etc/passwd"), not_shared("/etc"));
        // The engine gets these as they are, and finds that they lead nowhere.
        symlink("nothing", me.join("dangling")).unwrap();
        for path in ["/home/me/loop", "/home/me/dangling", "/home/me/dangling/x"] {
            assert_eq!(place(&directories, path), Ok(Some(format!("/host_mnt{path}"))), "{path}");
        }
    }

    #[test]
    fn without_the_file_system_nothing_is_mounted() {
        let shares = Shares::new(["/home/me".to_owned()]);
        let directory = tempfile::tempdir().unwrap();
        let absent = SharedDirectories { root: directory.path().to_owned(), ..SharedDirectories::new(shares) };
        assert_eq!(place(&absent, "/home/me"), Err(Refusal::SharesMissing("/home/me".to_owned())));
        let there = SharedDirectories { root: "/proc".into(), ..absent };
        assert_eq!(place(&there, "/home/me"), Ok(Some("/host_mnt/home/me".to_owned())));
    }

    fn sockets(list: &[(&str, &str)]) -> Arc<[SocketPlace]> {
        let socket = |(name, path): &(&str, &str)| HostSocket { name: (*name).to_owned(), path: (*path).to_owned() };
        let engine = ["/run/user//1000/docker.sock", "/home/me/run/docker.sock", "relative"].map(str::to_owned);
        SocketPlace::list(&list.iter().map(socket).collect::<Vec<_>>(), &engine)
    }

    #[test]
    fn a_socket_is_there_only_if_the_host_offers_it() {
        let others = sockets(&[("00000000000000aa.sock", "/tmp/other")]);
        for path in ["/run/host-services/ssh-auth.sock", "/run/host-services/0123456789abcdef.sock"] {
            let refusal = || if path == SSH_AGENT { Refusal::NoSshAgent } else { Refusal::NoHostSocket };
            // A share above it changes nothing.
            let without = SharedDirectories::new(Shares::new(["/run".to_owned()])).with_sockets(Arc::clone(&others));
            let name = path.rsplit('/').next().unwrap();
            let with = without.clone().with_sockets(sockets(&[(name, "/tmp/socket")]));
            for isolation in [Isolation::On, Isolation::Off] {
                assert_eq!(without.place(path, isolation), Err(refusal()));
                assert_eq!(with.place(path, isolation), Ok(None));
            }
            assert_eq!(without.judge(path), Err(refusal()));
            assert_eq!(with.judge(path), Ok(()));
        }
    }

    #[test]
    fn a_socket_is_named_by_its_path_on_the_host_also_in_a_share() {
        let (_directory, directories) = host();
        let sockets = sockets(&[
            ("ssh-auth.sock", "/tmp/agent.1"),
            ("0123456789abcdef.sock", "/home/me/app.sock"),
            ("00000000000000aa.sock", "/run/docker.sock"),
        ]);
        let directories = directories.with_sockets(sockets);
        for (path, expected) in [
            ("/tmp/agent.1", "ssh-auth.sock"),
            ("/tmp//./agent.1", "ssh-auth.sock"),
            ("/home/me/app.sock", "0123456789abcdef.sock"),
            ("/host_mnt/home/me/app.sock", "0123456789abcdef.sock"),
        ] {
            let expected = Ok(Some(format!("/run/host-services/{expected}")));
            assert_eq!(directories.place(path, Isolation::On), expected, "{path}");
            assert_eq!(directories.place(path, Isolation::Off), expected, "{path}");
        }
        for path in ["/run/user/1000/./docker.sock", "/home/me/run/docker.sock", "/host_mnt/home/me/run/docker.sock"] {
            for isolation in [Isolation::On, Isolation::Off] {
                assert_eq!(directories.place(path, isolation), Ok(Some("/run/docker.sock".to_owned())), "{path}");
            }
        }
        for path in ["/run/user/1000", "/run/user/1000/docker.sock.x", "/run/user/1000/x/../docker.sock", "relative"] {
            assert_eq!(place(&directories, path), Ok(None), "{path}");
        }
        for path in ["/tmp/agent.2", "/tmp/agent.1x", "/tmp", "/run/docker.sock"] {
            assert_eq!(place(&directories, path), Ok(None), "{path}");
        }
        assert_eq!(place(&directories, "/home/me"), Ok(Some("/host_mnt/home/me".to_owned())));
    }

    #[test]
    fn other_paths_stay_as_they_are_but_for_the_mount_point() {
        let (_directory, directories) = host();
        for path in ["/etc", "/home/you", "name", "/run/docker.sock", "/home/me/../you"] {
            assert_eq!(place(&directories, path), Ok(None), "{path}");
        }
        assert!(place(&directories, "/host_mnt").is_err());
        assert_eq!(place(&directories, "/host_mnt/etc"), Err(sources::Error::NotShared("/etc".to_owned()).into()));
        assert_eq!(directories.place("/host_mnt/etc", Isolation::Off), Ok(None));
        assert_eq!(directories.judge("/host_mnt/home/me/x"), Ok(()));
        assert_eq!(directories.judge("/var/lib/docker"), Ok(()));
        assert!(directories.judge("/host_mnt/home").is_err());
    }
}
