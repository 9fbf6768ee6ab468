//! The layers of an overlay, from its super block options in the table of mounts.
//!
//! A path in there is escaped twice: with backslashes by the engine that mounted the overlay, as overlayfs requires for
//! colons and backslashes, and then with octal numbers by the table. The two are undone in reverse order.

use std::{ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use bulkhead_guest_common::mountinfo::unescape;

/// The layers of an overlay mount, in the order of its options: the topmost lower layer first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Layers {
    /// Read-only layers.
    pub(crate) lower: Vec<PathBuf>,
    /// The writable layer; without one the overlay is read-only.
    pub(crate) upper: Option<PathBuf>,
}

/// The reason why an overlay's options cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum LayersError {
    /// No lower layer is named.
    #[error("the overlay names no lower layer")]
    NoLower,
    /// There are layers that only hold the data of files in others; no engine uses them.
    #[error("the overlay has data-only layers, which are not supported")]
    DataOnly,
}

/// Parses the layers out of an overlay's super block options.
pub(crate) fn layers(options: &[u8]) -> Result<Layers, LayersError> {
    let mut layers = Layers::default();
    // A comma in a path is still an octal number here, so the split comes before the unescaping.
    for option in options.split(|b| *b == b',') {
        let (key, value) =
            option.iter().position(|b| *b == b'=').map_or((option, &[][..]), |at| (&option[..at], &option[at + 1..]));
        match key {
            b"lowerdir" => layers.lower = split_lower(&unescape(value))?,
            // A layer given by itself needs no backslashes, since no colon separates it from others.
            b"lowerdir+" => layers.lower.push(OsString::from_vec(unescape(value).into_owned()).into()),
            b"datadir+" => return Err(LayersError::DataOnly),
            b"upperdir" => layers.upper = Some(without_backslashes(&unescape(value))),
            // The other options do not change where the layers are. The work directory is the engine's.
            _ => {}
        }
    }
    if layers.lower.is_empty() { Err(LayersError::NoLower) } else { Ok(layers) }
}

/// Removes the backslashes that overlayfs requires in `lowerdir` and `upperdir`.
fn without_backslashes(value: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(byte) = bytes.next() {
        out.push(if *byte == b'\\' { *bytes.next().unwrap_or(byte) } else { *byte });
    }
    PathBuf::from(OsString::from_vec(out))
}

/// Splits `lowerdir` at its colons, which separate the layers; an escaped colon is part of a path.
fn split_lower(value: &[u8]) -> Result<Vec<PathBuf>, LayersError> {
    let mut parts = Vec::new();
    let mut start = 0;
    let mut at = 0;
    while at < value.len() {
        match value[at] {
            // Skips the character after it.
            b'\\' => at += 1,
            b':' => {
                parts.push(&value[start..at]);
                start = at + 1;
            }
            _ => {}
        }
        at += 1;
    }
    parts.push(&value[start.min(value.len())..]);
    if parts == [b""] {
        return Err(LayersError::NoLower);
    }
    // Two colons in a row mean that data-only layers follow (overlayfs.rst, "Data-only lower layers").
    if parts.iter().any(|part| part.is_empty()) {
        return Err(LayersError::DataOnly);
    }
    Ok(parts.into_iter().map(without_backslashes).collect())
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::mountinfo;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_layers_of_an_overlay_in_the_table_are_found() {
        let table = b"36 35 0:98 / /d rw - overlay overlay rw,lowerdir=/d/l/AB:/d/l/CD,upperdir=/d/id/diff,workdir=/d/id/work,index=off";
        let layers = layers(mountinfo::parse(table).next().unwrap().super_options).unwrap();
        assert_eq!(layers.lower, [PathBuf::from("/d/l/AB"), PathBuf::from("/d/l/CD")]);
        assert_eq!(layers.upper, Some(PathBuf::from("/d/id/diff")));
    }

    #[test]
    fn colons_commas_and_backslashes_in_layer_paths_survive() {
        let layers = layers(br"rw,lowerdir=/a\134:b:/c\054d:/e\134\134f,upperdir=/u\134:v").unwrap();
        assert_eq!(layers.lower, [PathBuf::from("/a:b"), PathBuf::from("/c,d"), PathBuf::from(r"/e\f")]);
        assert_eq!(layers.upper, Some(PathBuf::from("/u:v")));
    }

    #[test]
    fn layers_given_one_by_one_keep_their_order() {
        let layers = layers(b"ro,lowerdir+=/top,lowerdir+=/a:b").unwrap();
        assert_eq!(layers.lower, [PathBuf::from("/top"), PathBuf::from("/a:b")]);
        assert_eq!(layers.upper, None);
    }

    #[test]
    fn data_only_layers_and_no_layers_are_refused() {
        assert_eq!(layers(b"lowerdir=/a::/b"), Err(LayersError::DataOnly));
        assert_eq!(layers(b"rw,lowerdir="), Err(LayersError::NoLower));
        assert_eq!(layers(b"rw,xino=off"), Err(LayersError::NoLower));
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_panic(table in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = layers(&table);
            for mount in mountinfo::parse(&table) {
                let _ = layers(mount.super_options);
            }
        }

        #[test]
        fn escaped_lines_of_any_layer_names_read_back(names in proptest::collection::vec("[ -~]{1,12}", 1..5)) {
            let joined = names.iter().map(|n| n.replace('\\', r"\\").replace(':', r"\:")).collect::<Vec<_>>().join(":");
            let table_form = joined.bytes().map(|b| match b {
                b' ' | b',' | b'\\' => format!("\\{b:03o}"),
                _ => char::from(b).to_string(),
            }).collect::<String>();
            let read = layers(format!("rw,lowerdir={table_form}").as_bytes()).unwrap();
            prop_assert_eq!(read.lower, names.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
    }
}
