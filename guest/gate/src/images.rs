//! Which images' containers may have the engine's socket.
//!
//! What counts is what an image is, not what it is called: its id, and the digests under which a registry gave it to
//! the engine (`RepoDigests`). `docker tag`, `docker load` and `docker build` give names only, so that none of them
//! makes an image an allowed one. A tag means what its registry says that it means now; when that can't be asked, what
//! it said last.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use bulkhead_guest_common::bounded;
use bulkhead_protocol::SocketExceptions;
use hyper::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};

use crate::{
    engine::{AskError, Engine, REGISTRY_PATIENCE, segment},
    policy::{Entry, encode, normalise_image, normalise_with_tag},
};

/// How long an answer of a registry holds.
const FRESH: Duration = Duration::from_secs(120);
/// Answers that are remembered.
const REMEMBERED: usize = 4096;

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
pub(crate) struct Reason {
    /// The entry of the list, as it stands there.
    pub(crate) entry: String,
    /// Its image is built from one that the entry speaks of.
    pub(crate) derived: bool,
}

#[derive(Clone, Debug)]
struct Answer {
    digest: String,
    at: Option<Instant>,
}

/// The list of images, and what registries said of it.
#[derive(Debug)]
pub(crate) struct Images {
    entries: Vec<(String, Entry)>,
    derived: bool,
    answers: Mutex<HashMap<String, Answer>>,
    /// Where answers outlive the gate.
    memory: PathBuf,
}

impl Images {
    pub(crate) fn new(exceptions: &SocketExceptions, memory: PathBuf) -> Self {
        let entry = |text: &String| {
            let entry = Entry::parse(text);
            if entry.is_none() {
                eprintln!("{text:?} in the list of images names none and allows none");
            }
            Some((text.clone(), entry?))
        };
        let entries = exceptions.images.iter().filter_map(entry).collect();
        Self { entries, derived: exceptions.derived, answers: Mutex::default(), memory }
    }

    /// Whether nobody can be allowed.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether a reason still holds under this list.
    pub(crate) fn upholds(&self, reason: &Reason) -> bool {
        self.entries
            .iter()
            .any(|(text, entry)| *entry == Entry::Any || *text == reason.entry && (!reason.derived || self.derived))
    }

    /// Why a container of `image` may have the socket, if it may.
    pub(crate) async fn judge(&self, engine: &Engine, image: &Image) -> Result<Option<Reason>, AskError> {
        if let Some(entry) = self.allows(engine, image).await {
            return Ok(Some(Reason { entry, derived: false }));
        }
        if !self.derived || !image.repo_digests.is_empty() {
            return Ok(None);
        }
        let local: Vec<Image> = engine.get("/images/json").await?;
        for other in local {
            if other.id == image.id || !self.could_allow(&other) {
                continue;
            }
            // The list does not tell of layers.
            let Some(parent) = find(engine, &other.id).await? else { continue };
            if image.is_built_on(&parent)
                && let Some(entry) = self.allows(engine, &parent).await
            {
                return Ok(Some(Reason { entry, derived: true }));
            }
        }
        Ok(None)
    }

    fn could_allow(&self, image: &Image) -> bool {
        self.entries.iter().any(|(_, entry)| match entry {
            Entry::Id(id) => *id == image.id,
            entry => image.digests().any(|(name, _)| entry.names(&name)),
        })
    }

    async fn allows(&self, engine: &Engine, image: &Image) -> Option<String> {
        for (text, entry) in &self.entries {
            let allowed = match entry {
                Entry::Any => true,
                Entry::Id(id) => *id == image.id,
                Entry::Digest { digest, .. } => {
                    image.digests().any(|(name, had)| entry.names(&name) && had == digest.as_str())
                }
                Entry::Name { tag: None, .. } => image.digests().any(|(name, _)| entry.names(&name)),
                Entry::Name { tag: Some(tag), .. } => self.has_tag(engine, image, entry, tag).await,
            };
            if allowed {
                return Some(text.clone());
            }
        }
        None
    }

    async fn has_tag(&self, engine: &Engine, image: &Image, entry: &Entry, tag: &str) -> bool {
        for (name, digest) in image.digests().filter(|(name, _)| entry.names(name)) {
            if self.digest(engine, &name, tag, HeaderMap::new()).await.is_some_and(|current| current == digest) {
                return true;
            }
        }
        false
    }

    /// What a registry means by a tag.
    async fn digest(&self, engine: &Engine, name: &str, tag: &str, credentials: HeaderMap) -> Option<String> {
        let reference = format!("{name}:{tag}");
        let known = self.remembered(&reference);
        if let Some(Answer { digest, at: Some(at) }) = &known
            && at.elapsed() < FRESH
        {
            return Some(digest.clone());
        }
        let path = format!(
            "/distribution/{}/json",
            reference.split('/').map(|part| encode(part, b"_.-:")).collect::<Vec<_>>().join("/")
        );
        match engine.get_with::<Distribution>(&path, credentials, REGISTRY_PATIENCE).await {
            Ok(Distribution { descriptor }) => {
                self.remember(reference, descriptor.digest.clone());
                Some(descriptor.digest)
            }
            Err(error) => {
                let instead = if known.is_some() { "what it said last counts" } else { "no image is allowed by it" };
                eprintln!("what {reference} is could not be asked at its registry: {error}; {instead}");
                known.map(|known| known.digest)
            }
        }
    }

    fn remembered(&self, reference: &str) -> Option<Answer> {
        let mut answers = self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if answers.is_empty() {
            let stored: HashMap<String, String> = read_json(&self.memory).unwrap_or_default();
            answers.extend(stored.into_iter().map(|(name, digest)| (name, Answer { digest, at: None })));
        }
        answers.get(reference).cloned()
    }

    fn remember(&self, reference: String, digest: String) {
        let mut answers = self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if answers.len() >= REMEMBERED {
            answers.clear();
        }
        answers.insert(reference, Answer { digest, at: Some(Instant::now()) });
        let stored: HashMap<&str, &str> =
            answers.iter().map(|(name, answer)| (name.as_str(), answer.digest.as_str())).collect();
        if let Err(error) = write_json(&self.memory, &stored) {
            eprintln!("what registries said can't be kept in {}: {error}", self.memory.display());
        }
    }

    /// Makes an answer one that is asked for again.
    fn age(&self, reference: &str) {
        let mut answers = self.answers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(answer) = answers.get_mut(reference) {
            answer.at = None;
        }
    }

    /// Whether it is worth asking what `reference` is when it is pulled: later the registry may be out of reach.
    pub(crate) fn pulled(&self, reference: &str) -> Option<(String, String)> {
        let (name, tag) = normalise_with_tag(reference)?;
        let listed = |entry: &Entry| matches!(entry, Entry::Name { tag: Some(listed), .. } if *listed == tag);
        self.entries.iter().any(|(_, entry)| listed(entry) && entry.names(&name)).then_some((name, tag))
    }

    /// Asks for it anew.
    pub(crate) async fn look_up(&self, engine: &Engine, (name, tag): (String, String), credentials: HeaderMap) {
        self.age(&format!("{name}:{tag}"));
        self.digest(engine, &name, &tag, credentials).await;
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Distribution {
    descriptor: Descriptor,
}

#[derive(Debug, Deserialize)]
struct Descriptor {
    digest: String,
}

/// The image of this name or id, if the engine has one.
pub(crate) async fn find(engine: &Engine, name: &str) -> Result<Option<Image>, AskError> {
    if name.is_empty() {
        return Ok(None);
    }
    match engine.get(&format!("/images/{}/json", segment(name))).await {
        Ok(image) => Ok(Some(image)),
        Err(AskError::Status(StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Longest file that is read, in bytes.
const FILE: u64 = 4 * 1024 * 1024;

/// Reads a JSON file that is not too long.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    serde_json::from_slice(&bounded::read_file(path, FILE).ok()?).ok()
}

/// Replaces a JSON file; a crash leaves the old or the new one.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> std::io::Result<()> {
    let new = path.with_extension("new");
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    fs::write(&new, serde_json::to_vec(value)?)?;
    fs::rename(&new, path)
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
            Images::new(&SocketExceptions { images, derived, commands: None }, PathBuf::new())
        };
        let direct = Reason { entry: "docker:cli".to_owned(), derived: false };
        let derived = Reason { derived: true, ..direct.clone() };
        assert!(list(&["docker:cli"], false).upholds(&direct) && !list(&["docker:cli"], false).upholds(&derived));
        assert!(list(&["docker:cli"], true).upholds(&derived));
        assert!(!list(&["docker:dind"], true).upholds(&direct) && !list(&[], true).upholds(&direct));
        assert!(list(&["*"], false).upholds(&derived));
    }

    #[test]
    fn a_pull_of_what_a_listed_tag_means_is_noticed() {
        let exceptions = SocketExceptions { images: vec!["docker:cli".into(), "a/*:*".into()], ..Default::default() };
        let images = Images::new(&exceptions, PathBuf::new());
        assert_eq!(images.pulled("docker:cli"), Some(("docker.io/library/docker".into(), "cli".into())));
        for other in ["docker", "docker:dind", "a/b:c", "docker@sha256:00"] {
            assert_eq!(images.pulled(other), None, "{other}");
        }
    }
}
