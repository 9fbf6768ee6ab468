//! Which images' containers may have the engine's socket.
//!
//! What counts is what an image is, not what it is called: its id, and the digests under which a registry gave it to
//! the engine (`RepoDigests`). `docker tag`, `docker load` and `docker build` give names only, so that none of them
//! makes an image an allowed one. A tag means what its registry says that it means now; when that can't be asked, what
//! it said last.

use std::path::PathBuf;

use bulkhead_protocol::SocketExceptions;
use hyper::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use crate::{
    dockerd::{Dockerd, DockerdError, segment},
    registry_digests::RegistryDigests,
    rules::{ImagePattern, normalise_image, normalise_with_tag},
};

/// An image, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Image {
    /// `sha256:…` of its configuration.
    pub(crate) id: String,
    #[serde(deserialize_with = "list")]
    repo_digests: Vec<String>,
    #[serde(rename = "RootFS")]
    root: Root,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Root {
    #[serde(deserialize_with = "list")]
    layers: Vec<String>,
}

/// Go writes an empty list as `null`.
fn list<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

impl Image {
    /// Full names of repositories, and the digests under which these gave the image.
    fn digests(&self) -> impl Iterator<Item = (String, &str)> {
        self.repo_digests
            .iter()
            .filter_map(|reference| reference.split_once('@'))
            .map(|(name, digest)| (normalise_image(name), digest))
    }

    /// Whether it has all of `parent` at its bottom.
    fn is_built_on(&self, parent: &Self) -> bool {
        !parent.root.layers.is_empty() && self.root.layers.starts_with(&parent.root.layers)
    }
}

/// Why a container may have the socket; kept with the container.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SocketGrant {
    /// The entry of the list, as it stands there.
    pub(crate) entry: String,
    /// Its image is built from one that the entry speaks of.
    pub(crate) derived: bool,
}

/// The list of images, and what registries said of it.
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
                eprintln!("{text:?} in the list of images names none and allows none");
            }
            Some((text.clone(), entry?))
        };
        let entries = exceptions.images.iter().filter_map(entry).collect();
        Self { entries, derived: exceptions.derived, registry: RegistryDigests::new(cache_file) }
    }

    /// Whether nobody can be allowed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a reason still holds under this list.
    pub(crate) fn still_grants(&self, reason: &SocketGrant) -> bool {
        self.entries.iter().any(|(text, entry)| {
            *entry == ImagePattern::Any || *text == reason.entry && (!reason.derived || self.derived)
        })
    }

    /// Why a container of `image` may have the socket, if it may.
    pub(crate) async fn find_grant(
        &self,
        dockerd: &Dockerd,
        image: &Image,
    ) -> Result<Option<SocketGrant>, DockerdError> {
        if let Some(entry) = self.allows(dockerd, image).await {
            return Ok(Some(SocketGrant { entry, derived: false }));
        }
        if !self.derived || !image.repo_digests.is_empty() {
            return Ok(None);
        }
        let local: Vec<Image> = dockerd.get("/images/json").await?;
        for other in local {
            if other.id == image.id || !self.could_allow(&other) {
                continue;
            }
            // The list does not tell of layers.
            let Some(parent) = find(dockerd, &other.id).await? else { continue };
            if image.is_built_on(&parent)
                && let Some(entry) = self.allows(dockerd, &parent).await
            {
                return Ok(Some(SocketGrant { entry, derived: true }));
            }
        }
        Ok(None)
    }

    fn could_allow(&self, image: &Image) -> bool {
        self.entries.iter().any(|(_, entry)| match entry {
            ImagePattern::Id(id) => *id == image.id,
            entry => image.digests().any(|(name, _)| entry.covers(&name)),
        })
    }

    async fn allows(&self, dockerd: &Dockerd, image: &Image) -> Option<String> {
        for (text, entry) in &self.entries {
            let allowed = match entry {
                ImagePattern::Any => true,
                ImagePattern::Id(id) => *id == image.id,
                ImagePattern::Digest { digest, .. } => {
                    image.digests().any(|(name, had)| entry.covers(&name) && had == digest.as_str())
                }
                ImagePattern::Name { tag: None, .. } => image.digests().any(|(name, _)| entry.covers(&name)),
                ImagePattern::Name { tag: Some(tag), .. } => self.has_tag(dockerd, image, entry, tag).await,
            };
            if allowed {
                return Some(text.clone());
            }
        }
        None
    }

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

    /// Whether it is worth asking what `reference` is when it is pulled: later the registry may be out of reach.
    pub(crate) fn listed_tag(&self, reference: &str) -> Option<(String, String)> {
        let (name, tag) = normalise_with_tag(reference)?;
        let listed =
            |entry: &ImagePattern| matches!(entry, ImagePattern::Name { tag: Some(listed), .. } if *listed == tag);
        self.entries.iter().any(|(_, entry)| listed(entry) && entry.covers(&name)).then_some((name, tag))
    }

    /// Asks for it anew.
    pub(crate) async fn refresh_tag(&self, dockerd: &Dockerd, (name, tag): (String, String), credentials: HeaderMap) {
        self.registry.expire(&format!("{name}:{tag}"));
        self.registry.current(dockerd, &name, &tag, credentials).await;
    }
}

/// The image of this name or id, if the engine has one.
pub(crate) async fn find(dockerd: &Dockerd, name: &str) -> Result<Option<Image>, DockerdError> {
    if name.is_empty() {
        return Ok(None);
    }
    match dockerd.get(&format!("/images/{}/json", segment(name))).await {
        Ok(image) => Ok(Some(image)),
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
