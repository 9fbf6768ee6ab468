//! `/proc/PID/mountinfo`, as proc_pid_mountinfo(5) describes it.
//!
//! Paths, sources and options in the table are chosen by the process that mounts, in containers as well. So the parser
//! works on bytes, splits a line only at separators that the kernel escapes inside of fields, and skips lines of any
//! other form.

use std::{borrow::Cow, ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

/// One mount. Fields borrow from the table; paths are decoded on demand, since most readers need one of few lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mount<'a> {
    /// Unique id, the number that statx(2) gives as `stx_mnt_id`.
    pub id: u64,
    /// Id of the mount that this one is mounted on.
    pub parent: u64,
    /// `major:minor` of the file system.
    pub device: &'a [u8],
    /// File system type with its subtype (`fuse.bulkhead`).
    pub fs_type: &'a [u8],
    /// Options of this mount, separated by commas.
    pub options: &'a [u8],
    /// Options of the super block, separated by commas. Still escaped: a comma inside of a value is escaped as well, so
    /// readers split first and [`unescape`] the parts.
    pub super_options: &'a [u8],
    root: &'a [u8],
    point: &'a [u8],
}

impl<'a> Mount<'a> {
    /// The directory of the file system that is the root of this mount.
    pub fn root(&self) -> PathBuf {
        path(self.root)
    }

    /// The mount point, as seen from the root of the process.
    pub fn point(&self) -> PathBuf {
        path(self.point)
    }

    /// Returns whether the mount shows its file system from the top.
    pub fn is_whole(&self) -> bool {
        self.root == b"/"
    }

    /// Returns whether this mount has an option.
    pub fn has_option(&self, option: &[u8]) -> bool {
        self.options.split(|byte| *byte == b',').any(|one| one == option)
    }

    fn parse(line: &'a [u8]) -> Option<Self> {
        // Exactly one space between fields, so an empty field is one.
        let mut fields = line.split(|byte| *byte == b' ');
        let id = number(fields.next()?)?;
        let parent = number(fields.next()?)?;
        let device = fields.next()?;
        let (root, point) = (fields.next()?, fields.next()?);
        let options = fields.next()?;
        // Zero or more optional fields (`shared:7`) end with a single dash.
        fields.by_ref().find(|field| *field == b"-")?;
        let fs_type = fields.next()?;
        // The source may be empty, and then two spaces follow each other.
        let _source = fields.next()?;
        // Last in the line. Fields that a later kernel may append are ignored.
        let super_options = fields.next().unwrap_or_default();
        Some(Self { id, parent, device, fs_type, options, super_options, root, point })
    }
}

/// Parses a table, in its order: a mount follows the one that it is mounted on.
pub fn parse(table: &[u8]) -> impl DoubleEndedIterator<Item = Mount<'_>> + Clone {
    table.split(|byte| *byte == b'\n').filter_map(Mount::parse)
}

/// Decodes the octal escapes (`\040`) of a field.
///
/// The kernel escapes space, tab, newline and backslash as three digits, so the first one is at most 3. Anything else
/// after a backslash is kept as it is.
pub fn unescape(field: &[u8]) -> Cow<'_, [u8]> {
    // Nearly all fields are plain, and a table can have thousands of lines.
    if !field.contains(&b'\\') {
        return Cow::Borrowed(field);
    }
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        rest = tail;
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            // Continues behind the escape: a decoded backslash does not begin another one.
            rest = after;
        } else {
            out.push(*first);
        }
    }
    Cow::Owned(out)
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field).into_owned()))
}

fn number(field: &[u8]) -> Option<u64> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINE: &[u8] = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext4 /dev/root rw,errors=continue";

    /// A field as the kernel writes it.
    fn escape(bytes: &[u8]) -> Vec<u8> {
        let escaped = bytes.iter().flat_map(|byte| match byte {
            b' ' | b'\t' | b'\n' | b'\\' | b'#' => format!("\\{byte:03o}").into_bytes(),
            _ => vec![*byte],
        });
        escaped.collect()
    }

    #[test]
    fn a_line_with_optional_fields_and_escapes_is_read() {
        let mount = parse(LINE).next().unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (36, 35, &b"98:0"[..]));
        assert_eq!((mount.root(), mount.point()), ("/mnt1".into(), "/mnt 2".into()));
        assert_eq!((mount.fs_type, mount.super_options), (&b"ext4"[..], &b"rw,errors=continue"[..]));
        assert!(mount.has_option(b"noatime") && !mount.has_option(b"no") && !mount.is_whole());
    }

    #[test]
    fn a_source_may_be_empty_and_super_block_options_missing() {
        let table =
            b"1 0 0:1 / / rw - tmpfs  rw\n2 1 0:2 / /x rw - proc proc\n3 1 0:2 / /x rw - proc\n4 1 0:2 / /x rw\n";
        let read: Vec<_> = parse(table).map(|mount| (mount.id, mount.super_options)).collect();
        assert_eq!(read, [(1, &b"rw"[..]), (2, &b""[..])]);
    }

    #[test]
    fn only_three_octal_digits_are_an_escape() {
        for plain in [&br"\"[..], br"\04", br"\400", br"\+12", br"\08a", br"\x20"] {
            assert_eq!(&*unescape(plain), plain, "{plain:?}");
        }
        assert_eq!(&*unescape(br"\134040"), br"\040");
    }

    #[test]
    fn this_processs_table_is_read_to_the_last_line() {
        let table = std::fs::read("/proc/self/mountinfo").unwrap();
        assert_eq!(parse(&table).count(), table.split(|byte| *byte == b'\n').count() - 1);
    }

    proptest! {
        #[test]
        fn a_field_is_read_as_it_was_before_it_was_escaped(field in proptest::collection::vec(any::<u8>(), 0..60)) {
            let escaped = escape(&field);
            prop_assert_eq!(&*unescape(&escaped), &field[..]);
        }

        #[test]
        fn a_line_of_any_paths_is_read_back(
            root in proptest::collection::vec(1_u8.., 1..20),
            point in proptest::collection::vec(1_u8.., 1..20),
            optional in "( (shared|master):[0-9])?",
            ids in (any::<u64>(), any::<u64>()),
        ) {
            let (id, parent) = ids;
            let table = [
                format!("{id} {parent} 0:9 ").as_bytes(), &escape(&root), b" ", &escape(&point),
                format!(" rw{optional} - fuse.x s rw\n").as_bytes(),
            ]
            .concat();
            let mounts: Vec<_> = parse(&table).collect();
            prop_assert_eq!(mounts.len(), 1);
            prop_assert_eq!((mounts[0].id, mounts[0].parent, mounts[0].fs_type), (id, parent, &b"fuse.x"[..]));
            prop_assert_eq!(mounts[0].root().into_os_string().into_vec(), root);
            prop_assert_eq!(mounts[0].point().into_os_string().into_vec(), point);
        }

        #[test]
        fn no_table_makes_the_parser_panic(table in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..512),
            "([0-9]{1,3}| |-|\n|/|\\\\[0-9]{0,3}|proc|rw|,){0,60}".prop_map(String::into_bytes),
        ]) {
            for mount in parse(&table) {
                let _ = (mount.root(), mount.point(), mount.is_whole(), mount.has_option(b"rw"));
            }
        }
    }
}
