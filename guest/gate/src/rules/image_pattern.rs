//! The entries of the list of images that may use the engine (`imageList.images` of the policy).

use super::image_name::{is_id, normalise, split_tag};

/// An entry of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImagePattern {
    /// `*`: every image.
    Any,
    /// `sha256:…`: the image with this ID, wherever it came from.
    Id(String),
    /// `name@sha256:…`: the image that a registry gave as this digest of this repository.
    Digest {
        /// Full name, perhaps with `*`.
        name: String,
        /// `sha256:…`.
        digest: String,
    },
    /// `name[:tag]`: the image that a registry gives by this name.
    Name {
        /// Full name, perhaps with `*`.
        name: String,
        /// `None` for any tag.
        tag: Option<String>,
    },
}

/// Returns true for a digest as dockerd writes it, in lower case. Any other spelling would never match one.
fn is_digest(text: &str) -> bool {
    text.starts_with("sha256:") && is_id(text) && !text.bytes().any(|byte| byte.is_ascii_uppercase())
}

impl ImagePattern {
    /// Reads an entry; `None` for an invalid one, which allows nothing.
    pub fn parse(text: &str) -> Option<Self> {
        if text == "*" {
            return Some(Self::Any);
        }
        if is_digest(text) {
            return Some(Self::Id(text.to_owned()));
        }
        if let Some((name, digest)) = text.split_once('@') {
            // `name:tag@digest`: the digest decides, the tag is for the reader.
            let name = normalise(split_tag(name).0);
            return (is_digest(digest) && is_name(&name)).then(|| Self::Digest { name, digest: digest.to_owned() });
        }
        let (name, tag) = split_tag(text);
        let tag = match tag {
            Some("*") => None,
            // An empty tag (`name:`) is in Docker's own examples.
            None | Some("") => Some("latest".to_owned()),
            Some(tag) if is_tag(tag) => Some(tag.to_owned()),
            Some(_) => return None,
        };
        let name = normalise(name);
        is_name(&name).then_some(Self::Name { name, tag })
    }

    /// Returns true if the entry can cover an image of the repository, a full name. Digest and tag are not compared.
    pub fn covers(&self, repository: &str) -> bool {
        match self {
            Self::Any => true,
            // IDs are for images without a repository.
            Self::Id(_) => false,
            Self::Digest { name, .. } | Self::Name { name, .. } => matches(name, repository),
        }
    }
}

/// Returns true for a valid tag. A `*` within a tag is not supported, so that `3.*` is an error and not a literal.
fn is_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

/// Returns true if a name consists of the letters of repositories, hosts with ports, IPv6 addresses, and `*`.
fn is_name(name: &str) -> bool {
    name.split('/').all(|part| !part.is_empty())
        && name.bytes().all(|byte| {
            byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-' | b'/' | b':' | b'*' | b'[' | b']')
        })
}

/// Returns true if `text` fits `pattern`, whose `*` stand for any characters but a slash.
///
/// So `testcontainers/*` does not cover a name that only begins in the same way. The time is proportional to both
/// lengths, unlike that of a matcher which backtracks.
pub(super) fn matches(pattern: &str, text: &str) -> bool {
    let (mut pattern_parts, mut text_parts) = (pattern.split('/'), text.split('/'));
    loop {
        match (pattern_parts.next(), text_parts.next()) {
            (None, None) => return true,
            (Some(pattern), Some(text)) if matches_segment(pattern, text) => {}
            _ => return false,
        }
    }
}

/// Compares one component of a name.
fn matches_segment(pattern: &str, text: &str) -> bool {
    // The text has to begin with the first piece and end with the last. The first occurrence of each piece in between
    // leaves most for the others, so there is no need to try later ones.
    let mut pieces = pattern.split('*');
    let Some(mut rest) = pieces.next().and_then(|first| text.strip_prefix(first)) else { return false };
    let Some(last) = pieces.next_back() else { return rest.is_empty() };
    for piece in pieces {
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    // `rest` excludes everything matched so far: `a*a` does not match `a`.
    rest.ends_with(last)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(name: &str, tag: Option<&str>) -> ImagePattern {
        ImagePattern::Name { name: name.to_owned(), tag: tag.map(ToOwned::to_owned) }
    }

    #[test]
    fn entries_are_read_as_docker_documents_them() {
        for (text, expected) in [
            ("docker:cli", name("docker.io/library/docker", Some("cli"))),
            ("docker", name("docker.io/library/docker", Some("latest"))),
            ("docker.io/localstack/localstack:*", name("docker.io/localstack/localstack", None)),
            ("testcontainers/*:*", name("docker.io/testcontainers/*", None)),
            ("your-registry.com/ci-tools/*:*", name("your-registry.com/ci-tools/*", None)),
            ("localhost:5000/a", name("localhost:5000/a", Some("latest"))),
            ("kind/desktop-cloud-provider-kind:", name("docker.io/kind/desktop-cloud-provider-kind", Some("latest"))),
            ("*", ImagePattern::Any),
        ] {
            assert_eq!(ImagePattern::parse(text), Some(expected), "{text}");
        }
        let digest = format!("sha256:{}", "ab".repeat(32));
        assert_eq!(ImagePattern::parse(&digest), Some(ImagePattern::Id(digest.clone())));
        let pinned = ImagePattern::Digest { name: "docker.io/library/docker".to_owned(), digest: digest.clone() };
        assert_eq!(ImagePattern::parse(&format!("docker@{digest}")), Some(pinned.clone()));
        assert_eq!(ImagePattern::parse(&format!("docker:cli@{digest}")), Some(pinned));
    }

    #[test]
    fn what_is_no_entry_allows_nothing() {
        for text in
            ["", "docker@", "docker@sha256:12", "docker:3.*", "a//b", "/a", "a/", "docker:t a", "d\u{f6}cker", "@", ":"]
        {
            assert_eq!(ImagePattern::parse(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_wildcard_stays_within_its_part_of_the_name() {
        let entry = ImagePattern::parse("testcontainers/*:*").unwrap();
        assert!(entry.covers("docker.io/testcontainers/ryuk"));
        for other in [
            "docker.io/testcontainers",
            "docker.io/testcontainers/a/b",
            "evil.io/testcontainers/ryuk",
            "docker.io/library/testcontainers",
        ] {
            assert!(!entry.covers(other), "{other}");
        }
        assert!(ImagePattern::parse("ghcr.io/a*c/x-*-y:*").unwrap().covers("ghcr.io/abc/x-1-2-y"));
        assert!(!ImagePattern::parse("ghcr.io/a*c/x-*-y:*").unwrap().covers("ghcr.io/abc/x-y"));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_and_an_entry_names_itself(text in "[a-z0-9./:@*_-]{0,60}|.{0,60}") {
            if let Some(ImagePattern::Name { name, tag }) = ImagePattern::parse(&text) {
                prop_assert!(matches(&name, &name));
                prop_assert!(!tag.is_some_and(|tag| tag.contains(['*', ':', '/'])));
            }
        }

        #[test]
        fn wildcards_match_as_a_simple_matcher_does(pattern in "[ab*]{0,8}", text in "[ab]{0,10}") {
            fn simple(pattern: &[u8], text: &[u8]) -> bool {
                match (pattern.split_first(), text.split_first()) {
                    (None, None) => true,
                    (Some((b'*', rest)), _) => {
                        simple(rest, text) || text.split_first().is_some_and(|(_, text)| simple(pattern, text))
                    }
                    (Some((a, pattern)), Some((b, text))) => a == b && simple(pattern, text),
                    _ => false,
                }
            }
            prop_assert_eq!(matches(&pattern, &text), simple(pattern.as_bytes(), text.as_bytes()));
        }
    }
}
