//! Namespaces by their open files (ioctl_ns(2)).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use serde::{Deserialize, Serialize};

/// `NS_GET_USERNS` and `NS_GET_PARENT`.
const OWNER: libc::Ioctl = 0xb701;
const PARENT: libc::Ioctl = 0xb702;

/// User namespaces in one another, of which the kernel allows 33 levels.
const MOST_LEVELS: usize = 64;

/// Which namespace it is, for as long as there is that namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Of the kernel's own file system of namespaces.
    pub device: u64,
    /// The namespace's number there.
    pub inode: u64,
}

impl Identity {
    /// Of an open file of `/proc/PID/ns`.
    ///
    /// # Errors
    /// When the descriptor can't be looked at.
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(namespace)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// The user namespace that owns a namespace.
///
/// # Errors
/// `EPERM` when the owner is outside of the caller's own user namespace.
pub fn owner(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    related(namespace, OWNER)
}

/// Whether a namespace belongs to a user namespace or to one inside of it.
pub fn is_within(namespace: BorrowedFd<'_>, outer: Identity) -> io::Result<bool> {
    let mut user = owner(namespace)?;
    for _ in 0..MOST_LEVELS {
        if Identity::of(&user)? == outer {
            return Ok(true);
        }
        user = match related(user.as_fd(), PARENT) {
            // The first one has none.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(false),
            parent => parent?,
        };
    }
    Ok(false)
}

fn related(namespace: BorrowedFd<'_>, which: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no argument and touches no memory of ours.
    let number = unsafe { libc::ioctl(namespace.as_raw_fd(), which) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a result that is no error is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    fn own(name: &str) -> File {
        File::open(format!("/proc/self/ns/{name}")).unwrap()
    }

    #[test]
    fn a_namespace_is_within_the_user_namespace_that_owns_it_and_no_other() {
        let owner = Identity::of(owner(own("uts").as_fd()).unwrap()).unwrap();
        assert!(is_within(own("uts").as_fd(), owner).unwrap());
        let other = Identity { inode: owner.inode + 1, ..owner };
        assert!(!is_within(own("uts").as_fd(), other).unwrap());
    }

    #[test]
    fn an_identity_is_the_same_for_each_file_of_a_namespace_and_survives_its_text() {
        let identity = Identity::of(own("user")).unwrap();
        assert_eq!(Identity::of(own("user")).unwrap(), identity);
        assert_ne!(Identity::of(own("uts")).unwrap(), identity);
        let text = serde_json::to_vec(&identity).unwrap();
        assert_eq!(serde_json::from_slice::<Identity>(&text).unwrap(), identity);
    }
}
