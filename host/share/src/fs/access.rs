//! Access that the guest has and the user's own mode denies.
//!
//! The guest's kernel has checked its process before it asks. Root of a container may write to a file of mode 0444 and
//! remove names from a directory of mode 0555, and a process without privileges on the host may not. It owns them, so
//! it gives itself access for the time of one system call.

use std::{ffi::CStr, sync::PoisonError};

use rustix::{
    fd::AsFd,
    fs::{Mode, OFlags, fchmod},
    io::Errno,
};

use super::{
    Server, attributes,
    owners::MODE_BITS,
    resolve::{self, Descriptor, Directory, Target},
};

/// A file whose mode is changed back when this is dropped.
struct Opened<F: AsFd> {
    file: F,
    mode: Mode,
}

impl<F: AsFd> Opened<F> {
    /// Adds permissions for the owner; `None` if they are there already, or if the file is another user's.
    fn new(file: F, permissions: u32) -> Option<Self> {
        let mode = u32::from(resolve::stat(&file).ok()?.stx_mode) & MODE_BITS;
        let wanted = mode | permissions;
        if wanted == mode {
            return None;
        }
        fchmod(&file, Mode::from_raw_mode(wanted)).ok()?;
        Some(Self { file, mode: Mode::from_raw_mode(mode) })
    }
}

impl<F: AsFd> Drop for Opened<F> {
    fn drop(&mut self) {
        // Fails only if the file system does by now.
        let _ = fchmod(&self.file, self.mode);
    }
}

impl Server {
    /// Changes names in directories, again with access to them if the first attempt is refused.
    pub(crate) fn change_names<T>(
        &self,
        directories: &[&Directory],
        change: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        self.move_names(directories, &[], change)
    }

    /// The same for a change that moves what has these names: a directory has to be writable to get another parent.
    pub(crate) fn move_names<T>(
        &self,
        directories: &[&Directory],
        moved: &[(&Directory, &CStr)],
        change: impl Fn() -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match change() {
            Err(Errno::ACCESS) => {}
            result => return result,
        }
        // Nobody else takes the changed mode for the file's own meanwhile.
        let _records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let open = |directory: &Directory, name: &CStr| resolve::open_name(&*directory.fd, name, flags, Mode::empty());
        let files = directories.iter().map(|directory| open(directory, c"."));
        let mut files = files.collect::<Result<Vec<_>, _>>().map_err(|_| Errno::ACCESS)?;
        // Whatever is not a directory, or is gone, needs nothing.
        files.extend(moved.iter().filter_map(|(directory, name)| open(directory, name).ok()));
        let _opened: Vec<_> = files.iter().filter_map(|file| Opened::new(file, 0o700)).collect();
        change()
    }

    /// Changes an open file, again with access to it if the first attempt is refused.
    pub(crate) fn change_file<T>(
        &self,
        file: &Descriptor,
        change: impl Fn(&Descriptor) -> Result<T, Errno>,
    ) -> Result<T, Errno> {
        match change(file) {
            Err(Errno::ACCESS) => {}
            result => return result,
        }
        let _records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let _opened = Opened::new(file, 0o600);
        change(file)
    }

    /// Opens the file of a node, again with access to it if the first attempt is refused.
    pub(crate) fn open_target(&self, target: &Target, flags: OFlags) -> Result<Descriptor, Errno> {
        match resolve::open(target, flags) {
            Err(Errno::ACCESS) if attributes::kind(&target.stat) == libc::S_IFREG => {}
            result => return result,
        }
        let _records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        let Descriptor::New(file) = resolve::open_for_changes(target)? else { return Err(Errno::ACCESS) };
        let _opened = Opened::new(&file, 0o600);
        resolve::open(target, flags)
    }
}
