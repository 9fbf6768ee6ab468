//! Judgement of one directory that is to be shared.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use nix::sys::statfs::{
    CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FsType, PROC_SUPER_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, statfs,
};

use crate::settings::AllowedDirectories;

/// Directories that show the kernel and the devices of this machine.
const SPECIAL: [&str; 3] = ["/proc", "/sys", "/dev"];

/// File systems with the same contents, wherever they are mounted.
const SPECIAL_TYPES: [FsType; 5] = [PROC_SUPER_MAGIC, SYSFS_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, TRACEFS_MAGIC];

/// The place of shared directories in the guest, below which a client may name them as well.
const GUEST_PLACE: &str = "/host_mnt";

/// Reason that a directory cannot be shared.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a path that can be shared.
    #[error("{0} is not an absolute path, or has `..` or control characters in it; name the directory itself")]
    Path(String),
    /// Below a home directory that is not known.
    #[error("{0} cannot be found, because HOME is not set to an absolute path; set it")]
    Home(String),
    /// Nothing is there.
    #[error("the directory {} does not exist; create it first", .0.display())]
    Missing(PathBuf),
    /// Something else is there.
    #[error("{} is not a directory; share the directory that it is in", .0.display())]
    NotDirectory(PathBuf),
    /// It cannot be examined.
    #[error("cannot examine the directory {}", path.display())]
    Examine {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The root of this machine.
    #[error("/ cannot be shared as a whole; share the directories in it that containers need")]
    Root,
    /// The kernel's files or devices.
    #[error("{} cannot be shared: it has no files, but shows the kernel and the devices of this machine", .0.display())]
    Special(PathBuf),
    /// A name that means something else in the engine.
    #[error("{} cannot be shared, because the engine uses that name; share the directory under another one", .0.display())]
    Name(PathBuf),
    /// Outside of the directories that the policy allows.
    #[error(
        "{} cannot be shared: {} allows only {}, and what is below",
        path.display(),
        allowed.file.display(),
        list(&allowed.paths)
    )]
    NotAllowed {
        /// The directory.
        path: PathBuf,
        /// The policy's list.
        allowed: AllowedDirectories,
    },
}

fn list(paths: &[PathBuf]) -> String {
    match paths {
        [] => "no directory".to_owned(),
        paths => paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
    }
}

/// A directory that can be shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPath {
    /// The path as the user names it: absolute, clean.
    pub named: PathBuf,
    /// The path without symbolic links.
    pub real: PathBuf,
}

impl SharedPath {
    /// Finds the directory behind an absolute path and judges it, under the policy's list if there is one.
    pub fn find(named: PathBuf, allowed: Option<&AllowedDirectories>) -> Result<Self, Refusal> {
        // By the real path: a link must not lead around any of the rules.
        let real = match fs::canonicalize(&named) {
            Ok(real) => real,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Refusal::Missing(named)),
            Err(error) if error.kind() == io::ErrorKind::NotADirectory => return Err(Refusal::NotDirectory(named)),
            Err(source) => return Err(Refusal::Examine { path: named, source }),
        };
        if let Some(allowed) = allowed.filter(|allowed| !permits(&allowed.paths, &real)) {
            return Err(Refusal::NotAllowed { path: named, allowed: allowed.clone() });
        }
        if !real.is_dir() {
            return Err(Refusal::NotDirectory(named));
        }
        if real.parent().is_none() {
            return Err(Refusal::Root);
        }
        if SPECIAL.iter().any(|special| real.starts_with(special)) || has_special_type(&real) {
            return Err(Refusal::Special(named));
        }
        if named.starts_with(GUEST_PLACE) {
            return Err(Refusal::Name(named));
        }
        Ok(Self { named, real })
    }
}

/// Returns whether a directory is one of those that are allowed, or below one.
pub(in crate::backend) fn permits(allowed: &[PathBuf], real: &Path) -> bool {
    // Without links, too: `/home` may be one. A directory that does not exist allows nothing.
    allowed.iter().filter_map(|path| fs::canonicalize(path).ok()).any(|allowed| real.starts_with(allowed))
}

fn has_special_type(directory: &Path) -> bool {
    statfs(directory).is_ok_and(|file_system| SPECIAL_TYPES.contains(&file_system.filesystem_type()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn find(path: impl AsRef<Path>) -> Result<SharedPath, Refusal> {
        SharedPath::find(path.as_ref().to_owned(), None)
    }

    #[test]
    fn a_directory_keeps_the_users_name_and_is_judged_by_what_it_is() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        fs::create_dir(real.join("src")).unwrap();
        symlink("src", real.join("link")).unwrap();
        let found = find(real.join("link")).unwrap();
        assert_eq!((found.named, found.real), (real.join("link"), real.join("src")));
        symlink("/proc/self", real.join("kernel")).unwrap();
        assert!(matches!(find(real.join("kernel")), Err(Refusal::Special(_))));
        symlink("/", real.join("all")).unwrap();
        assert!(matches!(find(real.join("all")), Err(Refusal::Root)));
    }

    #[test]
    fn the_kernels_directories_are_refused_and_so_is_what_is_no_directory() {
        for path in ["/proc", "/proc/self/fd", "/sys/kernel", "/dev", "/dev/shm"] {
            let message = find(path).unwrap_err().to_string();
            assert!(message.starts_with(&format!("{path} cannot be shared")), "{message}");
        }
        assert!(matches!(find("/"), Err(Refusal::Root)));
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(matches!(find(&file), Err(Refusal::NotDirectory(_))));
        assert!(matches!(find(file.join("x")), Err(Refusal::NotDirectory(_))));
        let missing = place.path().join("missing");
        let message = find(&missing).unwrap_err().to_string();
        assert!(message.ends_with("does not exist; create it first"), "{message}");
    }

    #[test]
    fn a_link_leads_around_no_policy() {
        let place = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(place.path()).unwrap();
        for name in ["mine", "mine/src", "minefield", "other"] {
            fs::create_dir(real.join(name)).unwrap();
        }
        symlink("../other", real.join("mine/out")).unwrap();
        symlink("mine", real.join("same")).unwrap();
        let allowed = |names: &[&str]| AllowedDirectories {
            paths: names.iter().map(|name| real.join(name)).collect(),
            file: "/etc/bulkhead/admin-settings.json".into(),
        };
        let judge = |name: &str, list: &[&str]| SharedPath::find(real.join(name), Some(&allowed(list)));
        for name in ["mine", "mine/src", "same", "same/src"] {
            assert!(judge(name, &["mine"]).is_ok() && judge(name, &["gone", "same"]).is_ok(), "{name}");
        }
        for name in ["minefield", "other", "mine/out", ""] {
            assert!(matches!(judge(name, &["mine"]), Err(Refusal::NotAllowed { .. })), "{name}");
        }
        let message = judge("mine", &[]).unwrap_err().to_string();
        assert!(message.ends_with("/etc/bulkhead/admin-settings.json allows only no directory, and what is below"));
    }
}
