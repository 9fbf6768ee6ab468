//! Relations of namespaces, by their open files (ioctl_ns(2)).
//!
//! Paths in `/proc/PID/ns` are not compared anywhere: a process can end between two looks, and its number be used
//! again.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

use serde::{Deserialize, Serialize};

/// `NS_GET_USERNS` and `NS_GET_PARENT`.
const OWNER: libc::Ioctl = 0xb701;
const PARENT: libc::Ioctl = 0xb702;

/// Maximum number of nested user namespaces that are followed; the kernel allows 33 levels.
const MAX_LEVELS: usize = 64;

/// The identity of a namespace, valid for as long as the namespace exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Device of the kernel's file system of namespaces (nsfs).
    pub device: u64,
    /// Inode number of the namespace there.
    pub inode: u64,
}

impl Identity {
    /// Returns the identity of a namespace, given its open file.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(namespace)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

/// Opens the user namespace that owns a namespace.
///
/// # Errors
/// `EPERM` when the owner is outside of the caller's own user namespace.
pub fn owner(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    related(namespace, OWNER)
}

/// Returns whether a namespace belongs to a user namespace or to one nested in it.
///
/// # Errors
/// If a namespace on the way up cannot be opened.
pub fn is_within(namespace: BorrowedFd<'_>, outer: Identity) -> io::Result<bool> {
    // Upwards from the owner. The levels below `outer` may be any number of namespaces that a container has nested.
    let mut user = owner(namespace)?;
    for _ in 0..MAX_LEVELS {
        if Identity::of(&user)? == outer {
            return Ok(true);
        }
        user = match related(user.as_fd(), PARENT) {
            // EPERM: the initial user namespace has no parent, and no namespace above the caller's own may be opened.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => return Ok(false),
            parent => parent?,
        };
    }
    // Not reached with any kernel of today; a namespace that is nested more deeply is not taken for the container's.
    Ok(false)
}

/// Opens a namespace that is related to another one.
fn related(namespace: BorrowedFd<'_>, which: libc::Ioctl) -> io::Result<OwnedFd> {
    // SAFETY: the call takes no argument and touches no memory of ours.
    let number = unsafe { libc::ioctl(namespace.as_raw_fd(), which) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the result is not an error, so it is a new descriptor that nobody else owns.
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
