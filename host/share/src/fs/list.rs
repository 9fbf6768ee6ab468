//! Directories' contents.

use std::{
    ffi::CStr,
    mem::MaybeUninit,
    sync::{Arc, Mutex, PoisonError},
};

use rustix::{
    fd::OwnedFd,
    fs::{Mode, OFlags, RawDir, SeekFrom, fdatasync, fsync, seek},
    io::Errno,
};

use super::{
    Answer, Place, Server,
    attributes::{self, number_of_way},
    done,
    handles::{Handle, Listing},
    nodes::Origin,
    resolve::{self, Directory},
};
use crate::fuse::reply::{Attributes, Body};

/// Bytes of entries that are taken from the host at a time, at least and at most. The longest entry has 280.
const MIN_BATCH: usize = 1024;
const BATCH: usize = 32 * 1024;

/// A list of entries that fills up.
struct Entries {
    body: Body,
    room: usize,
    plus: bool,
}

impl Entries {
    fn fits(&self, name: &CStr) -> bool {
        self.body.0.len() + Body::directory_entry_len(name, self.plus) <= self.room
    }

    /// Appends an entry that fits. `found` is its node, if the list has nodes and this one was found.
    fn push(&mut self, number: u64, next: u64, kind: u32, name: &CStr, found: Option<(u64, Attributes)>) {
        if self.plus {
            let (node, attributes) = found.unwrap_or_default();
            self.body.directory_entry_plus(node, &attributes);
        }
        // The number has to be that of stat(2), which differs from the host's for an entry that is a mount point.
        let number = found.map_or(number, |(_, attributes)| attributes.number);
        self.body.directory_entry(number, next, kind, name);
    }
}

impl Server {
    pub(crate) fn open_listing(&self, number: u64) -> Answer {
        match self.place(number)? {
            // Nothing to keep: its entries never change.
            Place::Way(_) => Ok(Body::default().open(0, 0).into()),
            Place::Host(directory) => {
                self.handles.check_room()?;
                let fd = open_directory(&directory)?;
                Ok(Body::default().open(self.handles.add_listing(number, fd)?, 0).into())
            }
        }
    }

    /// The open directory of a handle of a node. One that an earlier process opened is opened again.
    fn listing(&self, handle: u64, number: u64) -> Result<Arc<Listing>, Errno> {
        match self.handles.get(handle, number)? {
            Handle::Listing(listing) => return Ok(listing),
            Handle::LostListing => {}
            Handle::File(_) | Handle::LostFile(_) | Handle::LostLocks => return Err(Errno::BADF),
        }
        let Place::Host(directory) = self.place(number)? else { return Err(Errno::STALE) };
        let fd = open_directory(&directory)?;
        // Positions are the file system's, and hold in each descriptor.
        let listing = Listing { fd, position: Mutex::new(None) };
        match self.handles.found(handle, Handle::Listing(listing.into()))? {
            Handle::Listing(listing) => Ok(listing),
            _ => Err(Errno::BADF),
        }
    }

    pub(crate) fn sync_directory(&self, number: u64, handle: u64, data_only: bool) -> Answer {
        if matches!(self.node(number)?.origin, Origin::Host(_)) {
            let listing = self.listing(handle, number)?;
            if data_only { fdatasync(&listing.fd) } else { fsync(&listing.fd) }?;
        }
        Ok(done())
    }

    /// Lists entries from a position on, as many as there is room for.
    pub(crate) fn list(&self, number: u64, handle: u64, offset: u64, room: usize, plus: bool) -> Answer {
        let mut entries = Entries { body: Body::default(), room, plus };
        match self.place(number)? {
            Place::Way(entry) => self.list_way(number, entry, offset, &mut entries),
            Place::Host(directory) => {
                let listing = self.listing(handle, number)?;
                self.list_host(&directory, &listing, offset, &mut entries)?;
            }
        }
        Ok(entries.body.into())
    }

    fn list_way(&self, number: u64, entry: usize, offset: u64, entries: &mut Entries) {
        let own = number_of_way(entry);
        let dots = [(c".", own), (c"..", own)].into_iter();
        let children = self.tree.children(entry).iter().map(|(name, child)| (name.as_c_str(), number_of_way(*child)));
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, (name, inode)) in dots.chain(children).enumerate().skip(skip) {
            if !entries.fits(name) {
                break;
            }
            let found = if entries.plus { self.find(number, name).ok() } else { None };
            entries.push(inode, at as u64 + 1, libc::DT_DIR.into(), name, found);
        }
    }

    fn list_host(
        &self,
        directory: &Directory,
        listing: &Listing,
        offset: u64,
        entries: &mut Entries,
    ) -> Result<(), Errno> {
        // Two requests for one handle are answered one after the other.
        let mut position = listing.position.lock().unwrap_or_else(PoisonError::into_inner);
        if *position != Some(offset) {
            seek(&listing.fd, SeekFrom::Start(offset))?;
        }
        *position = None;
        let device =
            self.devices.number(&resolve::stat(&*directory.fd)?, || resolve::place_of(&*directory.fd, c"."))?;
        let mut next = offset;
        // Not many more than there is room for: the next request takes the rest again.
        let batch = (entries.room / if entries.plus { 4 } else { 1 }).clamp(MIN_BATCH, BATCH);
        let mut buffer = vec![MaybeUninit::uninit(); batch];
        let mut listed = RawDir::new(&listing.fd, &mut buffer);
        while let Some(entry) = listed.next() {
            // An error after some entries is found again by the next request.
            let entry = match entry {
                Ok(entry) => entry,
                Err(error) if entries.body.0.is_empty() => return Err(error),
                Err(_) => return Ok(()),
            };
            let name = entry.file_name();
            if !entries.fits(name) {
                // The descriptor is behind entries that the guest has not got.
                return Ok(());
            }
            next = entry.next_entry_cookie();
            if self.hidden.is_place(directory, name) {
                continue;
            }
            self.push(directory, device, &entry, next, entries);
            if listed.is_buffer_empty() && entries.body.0.len() + 512 > entries.room {
                break;
            }
        }
        *position = Some(next);
        Ok(())
    }

    fn push(
        &self,
        directory: &Directory,
        device: u64,
        entry: &rustix::fs::RawDirEntry<'_>,
        next: u64,
        entries: &mut Entries,
    ) {
        let name = entry.file_name();
        let dots = matches!(name.to_bytes(), b"." | b"..");
        // The kernel ignores nodes of these two. An entry that cannot be looked up is listed with its name alone.
        let found = if entries.plus && !dots { self.find_listed(directory, name) } else { None };
        let number = attributes::number(device, entry.ino());
        let listed = || match self.share_at(directory, name) {
            Some(_) => libc::DT_DIR,
            None => file_type(entry),
        };
        let kind = found.map_or_else(|| u32::from(listed()), |(_, attributes)| attributes.mode >> 12 & 0xf);
        entries.push(number, next, kind, name, found);
    }

    fn find_listed(&self, directory: &Directory, name: &CStr) -> Option<(u64, Attributes)> {
        if self.share_at(directory, name).is_some() {
            return self.find(directory.number, name).ok();
        }
        let stat = resolve::stat_name(&*directory.fd, name).ok()?;
        self.add(directory, name, &stat).ok()
    }
}

fn open_directory(directory: &Directory) -> Result<OwnedFd, Errno> {
    resolve::open_name(&*directory.fd, c".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
}

/// The type of an entry (`DT_*`).
fn file_type(entry: &rustix::fs::RawDirEntry<'_>) -> u8 {
    use rustix::fs::FileType;
    match entry.file_type() {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}
