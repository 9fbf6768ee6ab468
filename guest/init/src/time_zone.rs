//! The host's time zone, for containers that mount `/etc/localtime` or `/etc/timezone`.

use std::{fs, io, path::Path};

use bulkhead_policy::sources::TIME_ZONE_FILES;
use bulkhead_protocol::{MAX_TIME_ZONE, TimeZone};
use nix::mount::{MntFlags, umount2};

use crate::{error::Error, mounts};

/// Place of the files' file system until they are in theirs.
const PLACE: &str = "/run/bulkhead/time-zone";

/// Mode of the file system's root, and its size: a page for the name, and those of the rules.
const OPTIONS: &str = "mode=755,size=64k";

/// Returns true for a name as the tz database has them.
fn is_name(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/_+-".contains(&byte);
    (1..=255).contains(&name.len()) && name.bytes().all(is_plain)
}

/// Makes the files that the zone has, on a file system that is read-only.
pub(crate) fn set(zone: &TimeZone) -> Result<(), Error> {
    let rules = Some(zone.rules.as_slice()).filter(|rules| rules.len() <= MAX_TIME_ZONE);
    let name = zone.name.as_ref().filter(|name| is_name(name)).map(|name| format!("{name}\n").into_bytes());
    let contents = [rules, name.as_deref()];
    mounts::make_directory(PLACE, 0o700)?;
    let files = TIME_ZONE_FILES.into_iter().zip(contents).filter_map(|(path, contents)| Some((path, contents?)));
    let placed: Vec<_> = files.map(|(path, contents)| (path, place_of(path), contents)).collect();
    mounts::sealed("time-zone", PLACE, OPTIONS, || {
        placed
            .iter()
            .try_for_each(|(_, place, contents)| fs::write(place, contents).map_err(Error::file("write", place)))
    })?;
    for (path, place, _) in &placed {
        make_empty(path).map_err(Error::file("create", path))?;
        mounts::bind(Path::new(place), Path::new(path))?;
    }
    // The files stay, as mounts of their own.
    umount2(PLACE, MntFlags::MNT_DETACH).map_err(Error::file("unmount", PLACE))
}

/// The path of a file before it is in its place.
fn place_of(path: &str) -> String {
    format!("{PLACE}/{}", path.rsplit('/').next().unwrap_or_default())
}

/// Makes an empty file, also in the place of a link of the image.
fn make_empty(path: &str) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    fs::File::create_new(path).map(drop)
}

#[cfg(test)]
mod tests {
    use super::is_name;

    #[test]
    fn names_are_those_of_the_tz_database() {
        for name in ["UTC", "Europe/Berlin", "America/Argentina/Buenos_Aires", "Etc/GMT+1"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "Europe/Berlin\n", "a b", "é", &"x".repeat(256)] {
            assert!(!is_name(name), "{name:?}");
        }
    }
}
