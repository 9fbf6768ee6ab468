//! The images whose containers may use the engine.
//!
//! An image counts by its content, not by its name: by its ID, and by the digests under which a registry gave it to
//! dockerd (`RepoDigests`). `docker tag`, `docker load` and `docker build` set names only, so none of them can turn an
//! image into an allowed one. A tag stands for the image that its registry has under it now or, if the registry is out
//! of reach, for the last one known.

use std::path::PathBuf;

use bulkhead_protocol::SocketExceptions;
use hyper::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use crate::{
    dockerd::{Dockerd, DockerdError, encode_segment},
    registry_digests::RegistryDigests,
    rules::{ImagePattern, normalise_image, normalise_with_tag},
};

/// The part of dockerd's description of an image that decides.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Image {
    /// `sha256:…`, the digest of its configuration.
    pub(crate) id: String,
    /// `name@sha256:…`, the digest being that of the manifest in a registry.
    #[serde(deserialize_with = "list")]
    repo_digests: Vec<String>,
    #[serde(rename = "RootFS")]
    root: Root,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Root {
    /// Digests of the uncompressed layers, the bottom first.
    #[serde(deserialize_with = "list")]
    layers: Vec<String>,
}

/// Reads a list that Go writes as `null` if it is empty.
fn list<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Image {
    /// Returns full names of repositories, and the digests under which these gave the image.
    fn digests(&self) -> impl Iterator<Item = (String, &str)> {
        self.repo_digests
            .iter()
            .filter_map(|reference| reference.split_once('@'))
            .map(|(name, digest)| (normalise_image(name), digest))
    }

    /// Returns true if all layers of `parent` are at its bottom.
    fn is_built_on(&self, parent: &Self) -> bool {
        // Every image is built on one without layers (`FROM scratch`).
        !parent.root.layers.is_empty() && self.root.layers.starts_with(&parent.root.layers)
    }
}

/// The reason for which a container may have the socket; saved with the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketGrant {
    /// The entry as written in the list.
    pub(crate) entry: String,
    /// The image is not covered by the entry, but built on one that is.
    pub(crate) derived: bool,
}

/// The administrator's list of images, with the current digests of its tags.
#[derive(Debug)]
pub(crate) struct AllowedImages {
    entries: Vec<(String, ImagePattern)>,
    derived: bool,
    registry: RegistryDigests,
}

impl AllowedImages {
    pub(crate) fn new(exceptions: &SocketExceptions, cache_file: PathBuf) -> Self {
        let entry = |text: &String| {
            let entry = ImagePattern::parse(text);
            if entry.is_none() {
                eprintln!(
                    "ignoring {text:?} in the list of images that may use the Docker socket: not an image reference"
                );
            }
            Some((text.clone(), entry?))
        };
        let entries = exceptions.images.iter().filter_map(entry).collect();
        Self { entries, derived: exceptions.derived, registry: RegistryDigests::new(cache_file) }
    }

    /// Returns true if no image is allowed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Returns true if a saved grant is valid under today's list.
    pub(crate) fn still_grants(&self, grant: &SocketGrant) -> bool {
        // By the entry's text: the image itself is not looked up again, because this runs while dockerd holds locks.
        self.entries.iter().any(|(text, entry)| {
            *entry == ImagePattern::Any || *text == grant.entry && (!grant.derived || self.derived)
        })
    }

    /// Returns the grant for containers of `image`; `None` if they may not use the engine.
    pub(crate) async fn find_grant(
        &self,
        dockerd: &Dockerd,
        image: &Image,
    ) -> Result<Option<SocketGrant>, DockerdError> {
        if let Some(entry) = self.allows(dockerd, image).await {
            return Ok(Some(SocketGrant { entry, derived: false }));
        }
        // `allowDerivedImages` is for images built on this machine. One with a digest comes from a registry, where
        // anybody can push an image with the layers of an allowed one.
        if !self.derived || !image.repo_digests.is_empty() {
            return Ok(None);
        }
        let local: Vec<Image> = dockerd.get("/images/json").await?;
        for other in local {
            // Cheap test first: with a tag in the list each `allows` can be a question to a registry.
            if other.id == image.id || !self.could_allow(&other) {
                continue;
            }
            // The list of images has no layers in it.
            let Some(parent) = find(dockerd, &other.id).await? else { continue };
            if image.is_built_on(&parent)
                && let Some(entry) = self.allows(dockerd, &parent).await
            {
                return Ok(Some(SocketGrant { entry, derived: true }));
            }
        }
        Ok(None)
    }

    /// Returns true if `allows` is worth its cost: an entry has the image's ID or repository.
    fn could_allow(&self, image: &Image) -> bool {
        self.entries.iter().any(|(_, entry)| match entry {
            ImagePattern::Id(id) => *id == image.id,
            entry => image.digests().any(|(name, _)| entry.covers(&name)),
        })
    }

    /// Returns the first entry that covers `image` itself.
    async fn allows(&self, dockerd: &Dockerd, image: &Image) -> Option<String> {
        for (text, entry) in &self.entries {
            let allowed = match entry {
                ImagePattern::Any => true,
                ImagePattern::Id(id) => *id == image.id,
                ImagePattern::Digest { digest, .. } => {
                    image.digests().any(|(name, had)| entry.covers(&name) && had == digest.as_str())
                }
                // Any tag: it is enough that the repository gave the image, under whatever tag and whenever.
                ImagePattern::Name { tag: None, .. } => image.digests().any(|(name, _)| entry.covers(&name)),
                ImagePattern::Name { tag: Some(tag), .. } => self.has_tag(dockerd, image, entry, tag).await,
            };
            if allowed {
                return Some(text.clone());
            }
        }
        None
    }

    /// Returns true if a registry has the image under `tag` now. A local tag proves nothing.
    async fn has_tag(&self, dockerd: &Dockerd, image: &Image, entry: &ImagePattern, tag: &str) -> bool {
        for (name, digest) in image.digests().filter(|(name, _)| entry.covers(name)) {
            if self
                .registry
                .current(dockerd, &name, tag, HeaderMap::new())
                .await
                .is_some_and(|current| current == digest)
            {
                return true;
            }
        }
        false
    }

    /// Returns repository and tag of a pulled `reference` if the list has the tag. Its digest is worth asking for at
    /// once: when the container is created, the registry may be out of reach.
    pub(crate) fn listed_tag(&self, reference: &str) -> Option<(String, String)> {
        let (name, tag) = normalise_with_tag(reference)?;
        let listed =
            |entry: &ImagePattern| matches!(entry, ImagePattern::Name { tag: Some(listed), .. } if *listed == tag);
        self.entries.iter().any(|(_, entry)| listed(entry) && entry.covers(&name)).then_some((name, tag))
    }

    /// Asks the registry for a tag's digest again, even if the last response is recent.
    pub(crate) async fn refresh_tag(&self, dockerd: &Dockerd, (name, tag): (String, String), credentials: HeaderMap) {
        self.registry.expire(&format!("{name}:{tag}"));
        self.registry.current(dockerd, &name, &tag, credentials).await;
    }
}

/// Returns the image with this name or ID, if dockerd has it.
pub(crate) async fn find(dockerd: &Dockerd, name: &str) -> Result<Option<Image>, DockerdError> {
    // `/images//json` would be the list of all images.
    if name.is_empty() {
        return Ok(None);
    }
    match dockerd.get(&format!("/images/{}/json", encode_segment(name))).await {
        Ok(image) => Ok(Some(image)),
        // 400: not a valid reference, which the creation will report to the client.
        Err(DockerdError::Status(StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST)) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(id: &str, digests: &[&str], layers: &[&str]) -> Image {
        let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        Image { id: id.to_owned(), repo_digests: owned(digests), root: Root { layers: owned(layers) } }
    }

    #[test]
    fn the_engines_description_is_read_with_null_for_empty() {
        let text = r#"{"Id":"sha256:1","RepoTags":["a:b"],"RepoDigests":null,"RootFS":{"Type":"layers"},"X":1}"#;
        assert_eq!(serde_json::from_str::<Image>(text).unwrap(), image("sha256:1", &[], &[]));
    }

    #[test]
    fn an_image_is_built_on_another_only_if_it_has_all_of_its_layers_at_the_bottom() {
        let parent = image("1", &[], &["a", "b"]);
        assert!(image("2", &[], &["a", "b", "c"]).is_built_on(&parent));
        assert!(image("2", &[], &["a", "b"]).is_built_on(&parent));
        for layers in [&["b", "a"][..], &["a"], &[], &["c", "a", "b"]] {
            assert!(!image("2", &[], layers).is_built_on(&parent), "{layers:?}");
        }
        assert!(!parent.is_built_on(&image("0", &[], &[])), "everything is built on nothing");
    }

    #[test]
    fn a_reason_holds_as_long_as_its_entry_is_listed() {
        let list = |images: &[&str], derived| {
            let images = images.iter().map(|image| (*image).to_owned()).collect();
            AllowedImages::new(&SocketExceptions { images, derived, commands: None }, PathBuf::new())
        };
        let direct = SocketGrant { entry: "docker:cli".to_owned(), derived: false };
        let derived = SocketGrant { derived: true, ..direct.clone() };
        assert!(
            list(&["docker:cli"], false).still_grants(&direct) && !list(&["docker:cli"], false).still_grants(&derived)
        );
        assert!(list(&["docker:cli"], true).still_grants(&derived));
        assert!(!list(&["docker:dind"], true).still_grants(&direct) && !list(&[], true).still_grants(&direct));
        assert!(list(&["*"], false).still_grants(&derived));
    }

    #[test]
    fn a_pull_of_what_a_listed_tag_means_is_noticed() {
        let exceptions = SocketExceptions { images: vec!["docker:cli".into(), "a/*:*".into()], ..Default::default() };
        let images = AllowedImages::new(&exceptions, PathBuf::new());
        assert_eq!(images.listed_tag("docker:cli"), Some(("docker.io/library/docker".into(), "cli".into())));
        for other in ["docker", "docker:dind", "a/b:c", "docker@sha256:00"] {
            assert_eq!(images.listed_tag(other), None, "{other}");
        }
    }
}
