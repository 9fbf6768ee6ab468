//! Recognises paths that mean something else to each process: those through `/proc/self`.
//!
//! Programs mount on `/proc/self/fd/7` to be sure of the target; systemd and runc do. The worker resolves paths in its
//! own process, where that would be the worker's descriptor, so the start of such a path is opened by the caller's
//! directory in procfs. Paths that are not recognised are resolved without magic links, fail, and continue in the
//! kernel.

/// The start of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Start {
    /// The root or the working directory.
    Path,
    /// A link in the caller's directory of procfs (`fd/7`, `cwd` or `root`), and the rest of the path.
    Link(String, Vec<u8>),
}

/// Maximum number of digits of a descriptor.
const MAX_DIGITS: usize = 10;

impl Start {
    /// Finds the start of a caller's path.
    pub(crate) fn of(path: &[u8]) -> Self {
        Self::link(path).unwrap_or(Self::Path)
    }

    fn link(path: &[u8]) -> Option<Self> {
        // Compared part by part, in any spelling with repeated slashes and dots. One with `..` is not recognised, since
        // the part before it may be a link.
        let rest = path.strip_prefix(b"/")?;
        let (first, rest) = part(rest)?;
        let (kind, rest) = match first {
            b"proc" => {
                let (whose, rest) = part(rest)?;
                (whose == b"self" || whose == b"thread-self").then_some(())?;
                part(rest)?
            }
            // /dev/fd is a link to /proc/self/fd on every system that has it.
            b"dev" => part(rest)?,
            _ => return None,
        };
        let is_dev = first == b"dev";
        match kind {
            b"fd" => {
                // Only digits: the name becomes part of a path below the caller's directory in procfs.
                let (number, rest) = part(rest)?;
                let fits = number.len() <= MAX_DIGITS && number.iter().all(u8::is_ascii_digit);
                let number = std::str::from_utf8(number).ok().filter(|_| fits)?;
                Some(Self::Link(format!("fd/{number}"), rest.to_vec()))
            }
            b"cwd" if !is_dev => Some(Self::Link("cwd".to_owned(), rest.to_vec())),
            b"root" if !is_dev => Some(Self::Link("root".to_owned(), rest.to_vec())),
            _ => None,
        }
    }
}

/// The first part of a path that is not `.`, and the rest without leading slashes.
fn part(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut path = path;
    loop {
        let start = path.iter().position(|byte| *byte != b'/')?;
        path = &path[start..];
        let end = path.iter().position(|byte| *byte == b'/').unwrap_or(path.len());
        let (name, rest) = path.split_at(end);
        if name == b"." {
            path = rest;
            continue;
        }
        let after = rest.iter().position(|byte| *byte != b'/').unwrap_or(rest.len());
        return Some((name, &rest[after..]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn link(name: &str, rest: &str) -> Start {
        Start::Link(name.to_owned(), rest.as_bytes().to_vec())
    }

    #[test]
    fn the_callers_own_descriptors_are_found_in_any_spelling() {
        assert_eq!(Start::of(b"/proc/self/fd/7"), link("fd/7", ""));
        assert_eq!(Start::of(b"/proc/thread-self/fd/12"), link("fd/12", ""));
        assert_eq!(Start::of(b"//proc/./self//fd/7/"), link("fd/7", ""));
        assert_eq!(Start::of(b"/proc/self/fd/7/a/../b"), link("fd/7", "a/../b"));
        assert_eq!(Start::of(b"/dev/fd/3"), link("fd/3", ""));
        assert_eq!(Start::of(b"/proc/self/cwd/x"), link("cwd", "x"));
        assert_eq!(Start::of(b"/proc/self/root"), link("root", ""));
    }

    #[test]
    fn all_other_paths_are_paths() {
        for path in [
            &b"/proc"[..],
            b"/",
            b"",
            b"proc/self/fd/7",
            b"/proc/1/fd/7",
            b"/proc/self/fd",
            b"/proc/self/fd/",
            b"/proc/self/fd/x",
            b"/proc/self/fd/-1",
            b"/proc/self/fd/99999999999",
            b"/proc/self/../self/fd/7",
            b"/dev/cwd",
            b"/x/proc/self/fd/7",
        ] {
            assert_eq!(Start::of(path), Start::Path, "{path:?}");
        }
    }

    proptest! {
        #[test]
        fn no_path_panics_and_a_link_is_one_of_three(path in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..60),
            "(/|proc|self|thread-self|fd|dev|7|\\.|\\.\\.|cwd){0,12}".prop_map(String::into_bytes),
        ]) {
            if let Start::Link(name, rest) = Start::of(&path) {
                let number = name.strip_prefix("fd/").map(|number| number.parse::<u64>().is_ok());
                prop_assert!(number.unwrap_or(["cwd", "root"].contains(&name.as_str())));
                prop_assert!(!rest.starts_with(b"/"));
            }
        }
    }
}
