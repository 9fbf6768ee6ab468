//! Digests that registries gave for tags, kept over restarts of the gate.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

use hyper::HeaderMap;
use serde::Deserialize;

use crate::{
    dockerd::{Dockerd, REGISTRY_TIMEOUT},
    json_file::{read_json, write_json},
    rules::encode,
};

/// How long an answer of a registry holds.
const MAX_DIGEST_AGE: Duration = Duration::from_secs(120);
/// Answers that are remembered.
const MAX_CACHED_DIGESTS: usize = 4096;

#[derive(Clone, Debug)]
struct CachedDigest {
    digest: String,
    at: Option<Instant>,
}

#[derive(Debug)]
pub(crate) struct RegistryDigests {
    digests: Mutex<HashMap<String, CachedDigest>>,
    file: PathBuf,
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

impl RegistryDigests {
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { digests: Mutex::default(), file }
    }

    /// What a registry means by a tag.
    pub(crate) async fn current(
        &self,
        dockerd: &Dockerd,
        name: &str,
        tag: &str,
        credentials: HeaderMap,
    ) -> Option<String> {
        let reference = format!("{name}:{tag}");
        let known = self.cached(&reference);
        if let Some(CachedDigest { digest, at: Some(at) }) = &known
            && at.elapsed() < MAX_DIGEST_AGE
        {
            return Some(digest.clone());
        }
        let path = format!(
            "/distribution/{}/json",
            reference.split('/').map(|part| encode(part, b"_.-:")).collect::<Vec<_>>().join("/")
        );
        match dockerd.get_with_headers::<Distribution>(&path, credentials, REGISTRY_TIMEOUT).await {
            Ok(Distribution { descriptor }) => {
                self.store(reference, descriptor.digest.clone());
                Some(descriptor.digest)
            }
            Err(error) => {
                let instead = if known.is_some() { "what it said last counts" } else { "no image is allowed by it" };
                eprintln!("what {reference} is could not be asked at its registry: {error}; {instead}");
                known.map(|known| known.digest)
            }
        }
    }

    fn cached(&self, reference: &str) -> Option<CachedDigest> {
        let mut digests = self.digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if digests.is_empty() {
            let stored: HashMap<String, String> = read_json(&self.file).unwrap_or_default();
            digests.extend(stored.into_iter().map(|(name, digest)| (name, CachedDigest { digest, at: None })));
        }
        digests.get(reference).cloned()
    }

    fn store(&self, reference: String, digest: String) {
        let mut digests = self.digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if digests.len() >= MAX_CACHED_DIGESTS {
            digests.clear();
        }
        digests.insert(reference, CachedDigest { digest, at: Some(Instant::now()) });
        let stored: HashMap<&str, &str> =
            digests.iter().map(|(name, answer)| (name.as_str(), answer.digest.as_str())).collect();
        if let Err(error) = write_json(&self.file, &stored) {
            eprintln!("what registries said can't be kept in {}: {error}", self.file.display());
        }
    }

    /// Makes an answer one that is asked for again.
    pub(crate) fn expire(&self, reference: &str) {
        let mut digests = self.digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(answer) = digests.get_mut(reference) {
            answer.at = None;
        }
    }
}
