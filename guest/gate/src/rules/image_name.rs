//! Image names in their full form, as Docker's reference library (`distribution/reference`) makes them.

const DEFAULT_DOMAIN: &str = "docker.io";
/// Repository prefix of Docker Hub's official images.
const OFFICIAL: &str = "library/";

/// Returns true if the text is the ID of an image.
pub(super) fn is_id(name: &str) -> bool {
    let digits = name.strip_prefix("sha256:").unwrap_or(name);
    digits.len() == 64 && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Splits `name[:tag]`.
pub(super) fn split_tag(reference: &str) -> (&str, Option<&str>) {
    // A colon before the last slash belongs to a registry's port.
    let last = reference.rfind('/').map_or(0, |slash| slash + 1);
    match reference[last..].find(':') {
        Some(colon) => (&reference[..last + colon], Some(&reference[last + colon + 1..])),
        None => (reference, None),
    }
}

/// Returns the full name without tag and digest: `alpine:3.20` is `docker.io/library/alpine`. An ID stays as it is.
pub fn normalise(reference: &str) -> String {
    if is_id(reference) {
        return reference.to_owned();
    }
    let (name, _) = split_tag(reference.split('@').next().unwrap_or(reference));
    // The first component is a registry only if it looks like a host; `testcontainers/ryuk` is on Docker Hub. Upper
    // case is not allowed in repositories, so it can only be a host.
    let (domain, path) = match name.split_once('/') {
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|byte| byte.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (DEFAULT_DOMAIN, name),
    };
    // The former name of Docker Hub.
    let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN } else { domain };
    let official = if domain == DEFAULT_DOMAIN && !path.contains('/') { OFFICIAL } else { "" };
    format!("{domain}/{official}{path}")
}

/// Returns the full name and the tag, `latest` by default; `None` for IDs and digests.
pub(crate) fn normalise_with_tag(reference: &str) -> Option<(String, String)> {
    if is_id(reference) || reference.contains('@') {
        return None;
    }
    let (name, tag) = split_tag(reference);
    Some((normalise(name), tag.unwrap_or("latest").to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::normalise;

    #[test]
    fn names_are_completed_and_lose_tag_and_digest() {
        for (short, full) in [
            ("alpine", "docker.io/library/alpine"),
            ("docker:cli", "docker.io/library/docker"),
            ("testcontainers/ryuk:0.8", "docker.io/testcontainers/ryuk"),
            ("index.docker.io/alpine", "docker.io/library/alpine"),
            ("localhost/x:1", "localhost/x"),
            ("registry:5000/a/b:tag", "registry:5000/a/b"),
            ("ghcr.io/o/i@sha256:00", "ghcr.io/o/i"),
            ("ghcr.io/o/i:t@sha256:00", "ghcr.io/o/i"),
        ] {
            assert_eq!(normalise(short), full);
        }
    }

    #[test]
    fn an_id_is_no_name() {
        let id = "ab".repeat(32);
        assert_eq!(normalise(&id), id);
        assert_eq!(normalise(&format!("sha256:{id}")), format!("sha256:{id}"));
    }

    proptest! {
        #[test]
        fn no_name_makes_it_panic(name in ".{0,100}") {
            normalise(&name);
        }

        #[test]
        fn a_normal_name_is_its_own_normal_form(name in "[a-z]{1,8}(/[a-z]{1,8}){0,2}(:[a-z0-9]{1,5})?") {
            let once = normalise(&name);
            prop_assert_eq!(normalise(&once), once);
        }
    }
}
