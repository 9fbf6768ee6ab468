//! Judgement of one socket of the host that containers are to reach.

use std::{
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{FileTypeExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use bulkhead_protocol::Share;

use crate::{backend::shares::permits, settings::AllowedDirectories};

/// Parts of the names of engines' sockets. A container that has one is root of a machine, or of all containers.
const ENGINES: [&str; 6] = ["docker", "containerd", "podman", "crio", "cri-o", "buildkit"];

/// Directory of Docker Desktop's and other engines' sockets in a home directory.
const DOCKER_DIRECTORY: &str = ".docker";

/// Most links on the way to a socket, as the kernel has it.
const MAX_LINKS: u32 = 40;

/// Reason that a socket of the host cannot be reached from containers.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Nothing is there.
    #[error("the socket {} does not exist; start the program that listens on it", .0.display())]
    Missing(PathBuf),
    /// Something else is there.
    #[error("{} is not a socket", .0.display())]
    NotSocket(PathBuf),
    /// It cannot be examined.
    #[error("cannot examine the socket {}", path.display())]
    Examine {
        /// Its path.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// An engine's.
    #[error("{} is the socket of a container engine, which is never offered to containers", .0.display())]
    Engine(PathBuf),
    /// Bulkhead's own.
    #[error("{} is a socket of Bulkhead itself, which is never offered to containers", .0.display())]
    Own(PathBuf),
    /// Containers can make it lead anywhere.
    #[error(
        "{} leads through a symbolic link in a shared directory, which containers could change; name the socket itself \
         in the setting",
        .0.display()
    )]
    Link(PathBuf),
    /// The policy does not allow it.
    #[error(
        "{} is not in a directory that the policy {} lets containers have (filesharingAllowedDirectories)",
        path.display(),
        policy.display()
    )]
    NotAllowed {
        /// Its path.
        path: PathBuf,
        /// The policy.
        policy: PathBuf,
    },
}

/// Finds and judges the socket at a path, and returns it open as a mere reference ([`path_of`]).
///
/// `own` are Bulkhead's directories, `shares` what containers may change at this moment, and `allowed` where it must be.
pub(super) fn find(
    named: &Path,
    own: &[PathBuf],
    shares: &[Share],
    allowed: Option<&AllowedDirectories>,
) -> Result<File, Refusal> {
    let examine = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => Refusal::Missing(named.to_owned()),
        _ => Refusal::Examine { path: named.to_owned(), source },
    };
    let link = || Refusal::Link(named.to_owned());
    let real = follow(named, shares).map_err(examine)?.ok_or_else(link)?;
    // Once opened it stays what is judged here, whatever takes its place.
    let flags = libc::O_PATH | libc::O_NOFOLLOW;
    let socket = OpenOptions::new().read(true).custom_flags(flags).open(&real).map_err(examine)?;
    if fs::read_link(path_of(&socket)).map_err(examine)? != real {
        return Err(link());
    }
    if !socket.metadata().map_err(examine)?.file_type().is_socket() {
        return Err(Refusal::NotSocket(named.to_owned()));
    }
    if let Some(allowed) = allowed.filter(|allowed| !permits(&allowed.paths, &real)) {
        return Err(Refusal::NotAllowed { path: named.to_owned(), policy: allowed.file.clone() });
    }
    let is_own = |directory: &PathBuf| fs::canonicalize(directory).is_ok_and(|directory| real.starts_with(directory));
    if own.iter().any(is_own) {
        return Err(Refusal::Own(named.to_owned()));
    }
    if is_engines(&real) { Err(Refusal::Engine(named.to_owned())) } else { Ok(socket) }
}

/// A path of an open socket to connect to: short enough for every system call, and free of links.
pub(super) fn path_of(socket: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", socket.as_raw_fd()))
}

fn is_engines(real: &Path) -> bool {
    let name = real.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    ENGINES.iter().any(|engine| name.contains(engine)) || real.iter().any(|name| name == DOCKER_DIRECTORY)
}

/// Follows a path to where it leads; `None` if a link on the way is in a directory that containers may write.
fn follow(named: &Path, shares: &[Share]) -> io::Result<Option<PathBuf>> {
    let writable = shares.iter().filter(|share| !share.read_only);
    let writable: Vec<PathBuf> = writable.filter_map(|share| fs::canonicalize(&share.path).ok()).collect();
    let names = |path: &Path| path.iter().rev().map(OsStr::to_owned).collect::<Vec<_>>();
    let (mut real, mut rest, mut links) = (PathBuf::from("/"), names(named), 0);
    while let Some(name) = rest.pop() {
        if name == ".." {
            real.pop();
            continue;
        }
        // An absolute path begins with the root itself.
        let next = real.join(name);
        if !fs::symlink_metadata(&next)?.is_symlink() {
            real = next;
            continue;
        }
        links += 1;
        if links > MAX_LINKS {
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        if writable.iter().any(|share| real.starts_with(share)) {
            return Ok(None);
        }
        rest.extend(names(&fs::read_link(next)?));
    }
    Ok(Some(real))
}

#[cfg(test)]
mod tests {
    use std::os::unix::{fs::symlink, net::UnixListener};

    use super::*;

    fn bind(path: PathBuf) -> UnixListener {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        UnixListener::bind(path).unwrap()
    }

    #[test]
    fn a_socket_is_found_by_its_path_and_by_a_link_of_the_user() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        let _listener = bind(real.join("agent.1"));
        symlink("agent.1", real.join("link")).unwrap();
        for name in ["agent.1", "link"] {
            let socket = find(&real.join(name), &[], &[], None).unwrap();
            assert_eq!(fs::read_link(path_of(&socket)).unwrap(), real.join("agent.1"));
        }
        let missing = find(&real.join("agent.2"), &[], &[], None).unwrap_err().to_string();
        assert!(missing.ends_with("does not exist; start the program that listens on it"), "{missing}");
        symlink("loop", real.join("loop")).unwrap();
        assert!(matches!(find(&real.join("loop"), &[], &[], None), Err(Refusal::Examine { .. })));
        fs::write(real.join("file"), "").unwrap();
        for name in ["file", "."] {
            assert!(matches!(find(&real.join(name), &[], &[], None), Err(Refusal::NotSocket(_))), "{name}");
        }
    }

    #[test]
    fn sockets_of_engines_and_of_bulkhead_are_never_offered_under_any_name() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        let names = ["docker.sock", "run/podman.sock", "Docker-api", ".docker/desktop/backend.sock", "containerd.sock"];
        for (at, name) in names.into_iter().enumerate() {
            let _listener = bind(real.join(name));
            let link = real.join(format!("agent.{at}"));
            symlink(name, &link).unwrap();
            for path in [real.join(name), link] {
                assert!(matches!(find(&path, &[], &[], None), Err(Refusal::Engine(_))), "{}", path.display());
            }
        }
        let _listener = bind(real.join("bulkhead/default/control.sock"));
        symlink("../bulkhead", real.join("run/alias")).unwrap();
        let own = [real.join("run/alias"), real.join("missing")];
        assert!(matches!(find(&real.join("bulkhead/default/control.sock"), &own, &[], None), Err(Refusal::Own(_))));
    }

    #[test]
    fn a_link_that_containers_can_change_leads_nowhere() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        fs::create_dir_all(real.join("data/home/inner")).unwrap();
        symlink("data/home", real.join("home")).unwrap();
        let _listeners = [bind(real.join("data/home/.ssh/agent")), bind(real.join("tmp/agent"))];
        symlink("../../tmp/agent", real.join("data/home/link")).unwrap();
        symlink(".ssh", real.join("data/home/dir")).unwrap();
        let share = |name: &str, read_only| {
            let path = real.join(name).into_os_string().into_string().unwrap();
            [Share { path, read_only }]
        };
        for name in ["home", "data/home"] {
            let shares = share(name, false);
            let judge = |rest: &str| find(&real.join(name).join(rest), &[], &shares, None);
            assert!(judge(".ssh/agent").is_ok(), "{name}");
            for rest in ["link", "dir/agent", "./inner/../link"] {
                assert!(matches!(judge(rest), Err(Refusal::Link(_))), "{name}/{rest}");
            }
        }
        // Also on a way into the share by another link.
        symlink("data", real.join("alias")).unwrap();
        assert!(find(&real.join("alias/home/.ssh/agent"), &[], &share("home", false), None).is_ok());
        assert!(matches!(find(&real.join("alias/home/link"), &[], &share("home", false), None), Err(Refusal::Link(_))));
        assert!(find(&real.join("home/link"), &[], &share("home", true), None).is_ok());
        assert!(find(&real.join("home/link"), &[], &share("home/inner", false), None).is_ok());
    }

    #[test]
    fn a_socket_outside_of_the_policys_directories_is_not_offered() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        let _listeners = [bind(real.join("in/app.sock")), bind(real.join("out/app.sock"))];
        symlink("../out/app.sock", real.join("in/link")).unwrap();
        symlink("../in/app.sock", real.join("out/link")).unwrap();
        let allowed = AllowedDirectories { paths: vec![real.join("in")], file: "/etc/policy.json".into() };
        for (name, fits) in [("in/app.sock", true), ("out/link", true), ("out/app.sock", false), ("in/link", false)] {
            let found = find(&real.join(name), &[], &[], Some(&allowed));
            assert_eq!(found.is_ok(), fits, "{name}");
            assert!(fits || matches!(found, Err(Refusal::NotAllowed { .. })), "{name}");
        }
        let none = AllowedDirectories { paths: Vec::new(), ..allowed };
        assert!(find(&real.join("in/app.sock"), &[], &[], Some(&none)).is_err());
    }
}
