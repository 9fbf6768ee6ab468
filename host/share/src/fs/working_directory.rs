//! The working directory of a thread, as the place of names for system calls that take a path and no descriptor.
//!
//! Such a path could also begin with `/proc/self/fd`, which takes the kernel some ten times as long.

use std::{cell::RefCell, io, sync::Arc};

use nix::sched::{CloneFlags, unshare};
use rustix::{fd::OwnedFd, process::fchdir};

/// The working directory of a thread.
enum Place {
    /// It is that of other threads, too.
    Shared,
    /// It is the thread's alone, and this one, if it was ever entered.
    Own(Option<Arc<OwnedFd>>),
}

thread_local! {
    static PLACE: RefCell<Place> = const { RefCell::new(Place::Shared) };
}

/// Gives the calling thread a working directory of its own (unshare(2): `CLONE_FS`).
pub(crate) fn separate() -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS)?;
    PLACE.set(Place::Own(None));
    Ok(())
}

/// Makes a directory that of the calling thread; returns false if it cannot be, or if other threads share it.
pub(crate) fn enter(directory: &Arc<OwnedFd>) -> bool {
    PLACE.with_borrow_mut(|place| {
        let Place::Own(at) = place else { return false };
        // The number of a descriptor would not do: it may be another directory's by now.
        if at.as_ref().is_some_and(|at| Arc::ptr_eq(at, directory)) {
            return true;
        }
        if fchdir(&**directory).is_err() {
            return false;
        }
        *at = Some(Arc::clone(directory));
        true
    })
}

#[cfg(test)]
mod tests {
    use std::{env, thread};

    use super::*;

    fn open(path: &std::path::Path) -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open(path).unwrap().into())
    }

    #[test]
    fn a_thread_enters_directories_only_if_no_other_thread_is_moved_along() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let before = env::current_dir().unwrap();
        assert!(!enter(&open(first.path())));
        thread::scope(|scope| {
            let moves = || {
                separate().unwrap();
                let own = open(first.path());
                for (directory, path) in [(&own, &first), (&open(second.path()), &second), (&own, &first)] {
                    assert!(enter(directory) && enter(directory));
                    assert_eq!(env::current_dir().unwrap(), path.path().canonicalize().unwrap());
                }
                let file = tempfile::tempfile().unwrap();
                assert!(!enter(&Arc::new(file.into())), "a file is not a directory");
                assert_eq!(env::current_dir().unwrap(), first.path().canonicalize().unwrap());
            };
            scope.spawn(moves).join().unwrap();
        });
        assert_eq!(env::current_dir().unwrap(), before);
    }
}
