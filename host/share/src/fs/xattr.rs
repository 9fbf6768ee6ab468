//! Extended attributes of users. Others, those of the kernel and of root, mean something else on each side.

use std::ffi::CStr;

use rustix::{
    fs::{XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr},
    io::Errno,
};

use super::{Answer, Reply, Server, done, owners, resolve};
use crate::fuse::reply::Body;

/// Longest value, and longest list of names, in bytes (xattr(7)).
const MAX_SIZE: usize = 65_536;

/// True if the guest may see an attribute.
fn visible(name: &[u8]) -> bool {
    name.starts_with(b"user.") && name != owners::NAME.to_bytes()
}

fn check(name: &CStr) -> Result<(), Errno> {
    if visible(name.to_bytes()) { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

/// The reply to a request for `size` bytes, of which 0 asks for the length.
fn sized(bytes: Vec<u8>, size: u32) -> Answer {
    match size as usize {
        0 => Ok(Body::size(bytes.len() as u32).into()),
        size if bytes.len() > size => Err(Errno::RANGE),
        _ => Ok(Reply::Body(Body(bytes))),
    }
}

impl Server {
    pub(crate) fn get_xattr(&self, number: u64, name: &CStr, size: u32) -> Answer {
        check(name)?;
        let file = resolve::open_for_changes(&self.target(number, None)?)?;
        let mut value = vec![0; MAX_SIZE];
        let len = fgetxattr(&file, name, &mut value)?;
        value.truncate(len);
        sized(value, size)
    }

    pub(crate) fn list_xattr(&self, number: u64, size: u32) -> Answer {
        let names = match self.target(number, None).and_then(|target| resolve::open_for_changes(&target)) {
            Ok(file) => {
                let mut names = vec![0; MAX_SIZE];
                let len = flistxattr(&file, &mut names)?;
                names.truncate(len);
                names
            }
            // A link, or a directory that is not the host's: it has none.
            Err(Errno::OPNOTSUPP | Errno::ROFS) => Vec::new(),
            Err(error) => return Err(error),
        };
        let names =
            names.split_inclusive(|byte| *byte == 0).filter(|name| visible(name.strip_suffix(b"\0").unwrap_or(name)));
        sized(names.flatten().copied().collect(), size)
    }

    pub(crate) fn set_xattr(&self, number: u64, name: &CStr, value: &[u8], flags: u32) -> Answer {
        check(name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        let target = self.writable_target(number, None)?;
        let file = resolve::open_for_changes(&target)?;
        self.change_file(&file, |file| fsetxattr(file, name, value, flags))?;
        Ok(done())
    }

    pub(crate) fn remove_xattr(&self, number: u64, name: &CStr) -> Answer {
        check(name)?;
        let target = self.writable_target(number, None)?;
        self.change_file(&resolve::open_for_changes(&target)?, |file| fremovexattr(file, name))?;
        Ok(done())
    }
}
