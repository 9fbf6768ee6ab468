//! Request paths as dockerd's router sees them: decoded, with an optional `/v1.NN` in front.
//!
//! Go's server decodes the path once, the router cleans it, and each route exists with and without a version. A path
//! that the gate read in another way than dockerd would pass unchecked, so everything that could be a checked route is
//! treated as one.

/// Decodes percent escapes once; an invalid escape stays as it is.
pub(super) fn decode(path: &str) -> Vec<u8> {
    let bytes = path.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    // A decoded `%` is not looked at again: `%2563` is `%63`, not `c`, for Go as well.
    while let Some(&byte) = bytes.get(at) {
        let digit = |offset: usize| bytes.get(at + offset).and_then(|digit| char::from(*digit).to_digit(16));
        if let (b'%', Some(high), Some(low)) = (byte, digit(1), digit(2)) {
            decoded.push((high * 16 + low) as u8);
            at += 3;
        } else {
            decoded.push(byte);
            at += 1;
        }
    }
    decoded
}

/// Returns true for a version as dockerd's router takes it, `v[0-9.]+`.
fn is_version(segment: &str) -> bool {
    segment
        .strip_prefix('v')
        .is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'))
}

/// Percent-encodes a segment of a path: all bytes but ASCII letters, digits and those in `kept`.
pub fn encode(segment: &str, kept: &[u8]) -> String {
    encode_bytes(segment.as_bytes(), kept)
}

/// Percent-encodes any bytes.
pub(super) fn encode_bytes(text: &[u8], kept: &[u8]) -> String {
    use std::fmt::Write;

    let mut encoded = String::with_capacity(text.len());
    for &byte in text {
        if byte.is_ascii_alphanumeric() || kept.contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// A path in parts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The segment with the version, `v1.45`.
    version: Option<String>,
    /// The segments, without empty and dot segments and without the version.
    pub segments: Vec<String>,
}

impl Target {
    /// Splits a path.
    pub fn of(path: &str) -> Self {
        let mut segments = clean(path);
        let versioned = segments.first().is_some_and(|first| is_version(first));
        let version = versioned.then(|| segments.remove(0));
        Self { version, segments }
    }

    /// Returns the same version of another path.
    #[must_use]
    pub fn with_segments(self, segments: Vec<String>) -> Self {
        Self { segments, ..self }
    }

    /// Returns the one spelling of the path that every reader splits into the same segments.
    pub fn path(&self) -> String {
        // No slash, dot segment or escape is left inside of a segment: all of those were resolved or get encoded.
        let add = |text: String, segment: &String| text + "/" + &encode(segment, b"_.-~:@");
        let text = self.version.iter().chain(&self.segments).fold(String::new(), add);
        if text.is_empty() { "/".to_owned() } else { text }
    }
}

/// Returns the one spelling of a path, version included, that every reader splits into the same [`segments`].
pub fn canonical(path: &str) -> String {
    Target::of(path).path()
}

/// Returns the decoded segments, without empty and dot segments.
fn clean(path: &str) -> Vec<String> {
    // Bytes that are not UTF-8 become U+FFFD, here and in `Target::path`, so both mean the same (wrong) name.
    let decoded = String::from_utf8_lossy(&decode(path)).into_owned();
    let mut segments: Vec<String> = Vec::new();
    for segment in decoded.split('/') {
        match segment {
            "" | "." => {}
            // At the root `..` stays there.
            ".." => {
                segments.pop();
            }
            name => segments.push(name.to_owned()),
        }
    }
    segments
}

/// Splits a path into its segments, without empty and dot segments and without the version.
pub fn segments(path: &str) -> Vec<String> {
    Target::of(path).segments
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_version_is_removed_only_in_front_and_only_once() {
        assert_eq!(segments("/v1.45/v1.45/x"), ["v1.45", "x"]);
        assert_eq!(segments("/volumes/v1"), ["volumes", "v1"]);
    }

    #[test]
    fn escapes_are_decoded_once() {
        assert_eq!(segments("/%2563reate"), ["%63reate"]);
        assert_eq!(segments("/a%2Fb"), ["a", "b"]);
        assert_eq!(segments("/a%zz%4"), ["a%zz%4"]);
    }

    #[test]
    fn a_canonical_path_has_one_spelling() {
        for path in ["/v1.43/images/a/push", "//v1.43/./images//a%2Fpush/", "/v1.43/%69mages/x/../a/push"] {
            assert_eq!(canonical(path), "/v1.43/images/a/push");
        }
        assert_eq!(canonical("/%2563"), "/%2563");
        assert_eq!((canonical("*"), canonical("")), ("/%2A".to_owned(), "/".to_owned()));
    }

    proptest! {
        #[test]
        fn a_canonical_path_means_the_same_and_is_stable(path in "[a-zA-Z0-9/.%?#*\u{e9} -]{0,60}|.{0,60}") {
            let once = canonical(&path);
            prop_assert_eq!(segments(&once), segments(&path));
            prop_assert_eq!(canonical(&once), once.clone());
            prop_assert!(once.parse::<hyper::Uri>().is_ok_and(|uri| uri.path() == once));
        }

        #[test]
        fn no_target_makes_the_parser_panic_or_leaves_dots(path in ".{0,200}") {
            for segment in segments(&path) {
                prop_assert!(!segment.is_empty() && segment != "." && segment != ".." && !segment.contains('/'));
            }
        }

        #[test]
        fn encoding_any_characters_changes_nothing(path in "[a-z./]{0,60}", mask in any::<u64>()) {
            let encoded: String = path
                .bytes()
                .enumerate()
                .map(|(at, byte)| if mask >> (at % 64) & 1 == 1 { format!("%{byte:02X}") } else { char::from(byte).to_string() })
                .collect();
            prop_assert_eq!(segments(&path), segments(&encoded));
        }
    }
}
