//! Reads with a bound: files that a container, a client or a crash may have made long.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

/// Reads at most `max` bytes from the start of a file; the rest is left out without an error.
///
/// # Errors
/// As open(2) and read(2).
pub fn read_file(path: impl AsRef<Path>, max: u64) -> io::Result<Vec<u8>> {
    read(File::open(path)?, max)
}

/// Reads at most `max` bytes, up to the end of what `from` gives.
///
/// # Errors
/// As read(2).
pub fn read(from: impl Read, max: u64) -> io::Result<Vec<u8>> {
    // Grows with what is there, so a generous bound costs nothing. A pseudo file has no size to allocate by in any
    // case.
    let mut bytes = Vec::new();
    from.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_the_bound() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "12345").unwrap();
        assert_eq!(read_file(&path, 3).unwrap(), b"123");
        assert_eq!(read_file(&path, 5).unwrap(), b"12345");
        assert_eq!(read_file(&path, 9).unwrap(), b"12345");
        assert_eq!(read_file(dir.path().join("none"), 9).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
