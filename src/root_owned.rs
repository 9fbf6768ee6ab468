//! Files that nobody but root can change.
//!
//! A policy that locks isolation restricts the user who starts the program, so the user must not be able to change what
//! enforces it: the program, the guest image and the engine's trust in registries.

use std::{
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// Mode bits that let users other than the owner write: group and other.
const WRITABLE: u32 = 0o022;

/// Mode bit of a directory in which only the owner of an entry may rename or remove it.
const STICKY: u32 = 0o1000;

/// A file that somebody other than root can change, or that cannot be inspected.
#[derive(Debug, thiserror::Error)]
pub enum NotRoots {
    /// Another owner.
    #[error("{} belongs to user {owner}, not to root", path.display())]
    Owner {
        /// The file, or a directory on the way to it.
        path: PathBuf,
        /// Its owner.
        owner: u32,
    },
    /// Others may write.
    #[error("{} is writable by users other than its owner", .0.display())]
    Writable(PathBuf),
    /// The owner is not known.
    #[error("cannot inspect {}: {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system call.
        error: io::Error,
    },
}

/// Checks that only root can change the file that `path` leads to: the file itself, and every directory on the way, in
/// which it could be replaced.
pub fn check(path: &Path) -> Result<(), NotRoots> {
    check_for(path, 0)
}

/// Checks the running program.
pub fn check_program() -> Result<(), NotRoots> {
    const PROGRAM: &str = "/proc/self/exe";
    let program = fs::read_link(PROGRAM).map_err(failed(Path::new(PROGRAM)))?;
    // An upgrade has removed the file of a running backend. It can no longer be replaced at any path, and the link still
    // leads to the file that runs.
    if program.to_string_lossy().ends_with(" (deleted)") {
        return judge(&program, &fs::metadata(PROGRAM).map_err(failed(&program))?, 0);
    }
    check(&program)
}

/// As [`check`]; `other` is trusted like root, for tests by other users.
fn check_for(path: &Path, other: u32) -> Result<(), NotRoots> {
    // Resolved once. What is found here stays what it is: nobody but root could change it if the check succeeds.
    let path = fs::canonicalize(path).map_err(failed(path))?;
    path.ancestors().try_for_each(|part| judge(part, &fs::symlink_metadata(part).map_err(failed(part))?, other))
}

fn judge(path: &Path, metadata: &fs::Metadata, other: u32) -> Result<(), NotRoots> {
    // Owner and mode are enough: write permission by an ACL shows in the group bits, which are its mask (acl(5)).
    if ![0, other].contains(&metadata.uid()) {
        return Err(NotRoots::Owner { path: path.to_owned(), owner: metadata.uid() });
    }
    // /tmp and its like: others may add entries but not touch this one, whose owner was just checked.
    let sticky = metadata.is_dir() && metadata.mode() & STICKY != 0;
    if metadata.mode() & WRITABLE != 0 && !sticky {
        return Err(NotRoots::Writable(path.to_owned()));
    }
    Ok(())
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> NotRoots {
    let path = path.to_owned();
    move |error| NotRoots::Io { path, error }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// Checks with this user trusted like root.
    fn checked(path: &Path) -> Result<(), String> {
        check_for(path, nix::unistd::geteuid().as_raw()).map_err(|error| error.to_string())
    }

    fn set_mode(path: &Path, mode: u32) {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn the_file_and_every_directory_on_the_way_count() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let directory = root.join("a/b");
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("file");
        fs::write(&file, "").unwrap();
        for (path, mode) in [(&root, 0o755), (&root.join("a"), 0o755), (&directory, 0o755), (&file, 0o644)] {
            set_mode(path, mode);
        }
        assert_eq!(checked(&file), Ok(()));
        for (path, mode, as_before) in
            [(&file, 0o664, 0o644), (&file, 0o646, 0o644), (&directory, 0o775, 0o755), (&root.join("a"), 0o757, 0o755)]
        {
            set_mode(path, mode);
            assert_eq!(checked(&file), Err(format!("{} is writable by users other than its owner", path.display())));
            set_mode(path, as_before);
        }
        set_mode(&directory, 0o1777);
        assert_eq!(checked(&file), Ok(()), "nobody can replace another's file in a sticky directory");
    }

    #[test]
    fn a_link_counts_as_where_it_leads() {
        let root = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(root.path()).unwrap();
        let (file, link) = (root.join("file"), root.join("link"));
        fs::write(&file, "").unwrap();
        symlink(&file, &link).unwrap();
        set_mode(&file, 0o644);
        assert_eq!(checked(&link), Ok(()));
        set_mode(&file, 0o666);
        assert!(checked(&link).unwrap_err().starts_with(&format!("{} is writable", file.display())));
        assert!(checked(&root.join("nothing")).unwrap_err().starts_with("cannot inspect "));
    }

    #[test]
    fn a_file_of_another_user_is_named_with_its_owner() {
        let file = tempfile::NamedTempFile::new().unwrap();
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let nobody = Some(nix::unistd::Uid::from_raw(65534));
        nix::unistd::chown(file.path(), nobody, None).unwrap();
        let expected = format!("{} belongs to user 65534, not to root", file.path().display());
        assert_eq!(check(file.path()).unwrap_err().to_string(), expected);
        assert!(check_for(file.path(), 65534).is_ok());
    }

    #[test]
    fn the_running_program_is_judged_like_any_file() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(check_program().is_ok(), check(&own).is_ok());
    }
}
