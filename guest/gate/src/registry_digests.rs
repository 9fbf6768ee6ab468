//! Digests that registries gave for tags, kept over restarts of the gate.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::Mutex,
    time::{Duration, Instant},
};

use bulkhead_guest_common::error::chain;
use hyper::HeaderMap;
use serde::Deserialize;

use crate::{
    dockerd::{Dockerd, REGISTRY_TIMEOUT},
    json_file::{read_json, write_json},
    rules::encode,
};

/// Time for which a registry's response is used without asking again.
const MAX_DIGEST_AGE: Duration = Duration::from_secs(120);
/// Maximum number of digests kept.
const MAX_CACHED_DIGESTS: usize = 4096;

/// A registry's last response for a tag.
#[derive(Clone, Debug)]
struct CachedDigest {
    digest: String,
    /// Time of the response; `None` if it is from the file or has been expired.
    at: Option<Instant>,
}

/// The digests by `name:tag`.
#[derive(Debug)]
pub(crate) struct RegistryDigests {
    digests: Mutex<HashMap<String, CachedDigest>>,
    file: PathBuf,
}

/// Response to `GET /distribution/{name}/json`.
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
    /// Digests that are saved in `file`, which need not exist yet.
    pub(crate) fn new(file: PathBuf) -> Self {
        Self { digests: Mutex::default(), file }
    }

    /// Returns the digest that a tag stands for; `None` if its registry has never said.
    ///
    /// `credentials` are those of the client that pulls; without them the registry is asked anonymously.
    pub(crate) async fn current(
        &self,
        dockerd: &Dockerd,
        name: &str,
        tag: &str,
        credentials: HeaderMap,
    ) -> Option<String> {
        let reference = format!("{name}:{tag}");
        let known = self.cached(&reference);
        // Many containers that are created in a row cost one question.
        if let Some(CachedDigest { digest, at: Some(at) }) = &known
            && at.elapsed() < MAX_DIGEST_AGE
        {
            return Some(digest.clone());
        }
        // dockerd asks the registry, with its own proxy, mirrors and certificates.
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
                // An attacker who cuts the network off can only keep the old digest in force.
                let instead = if known.is_some() { "using the last known digest" } else { "it allows no image" };
                eprintln!("cannot ask the registry for the digest of {reference}: {}; {instead}", chain(&error));
                known.map(|known| known.digest)
            }
        }
    }

    /// Returns the last response; reads the file on first use.
    fn cached(&self, reference: &str) -> Option<CachedDigest> {
        let mut digests = self.digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if digests.is_empty() {
            let stored: HashMap<String, String> = read_json(&self.file).unwrap_or_default();
            digests.extend(stored.into_iter().map(|(name, digest)| (name, CachedDigest { digest, at: None })));
        }
        digests.get(reference).cloned()
    }

    /// Keeps a response, here and in the file.
    fn store(&self, reference: String, digest: String) {
        let mut digests = self.digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // With wildcards in the list, names can come from clients. Starting over is simple, and rare.
        if digests.len() >= MAX_CACHED_DIGESTS {
            digests.clear();
        }
        digests.insert(reference, CachedDigest { digest, at: Some(Instant::now()) });
        let stored: HashMap<&str, &str> =
            digests.iter().map(|(name, answer)| (name.as_str(), answer.digest.as_str())).collect();
        if let Err(error) = write_json(&self.file, &stored) {
            eprintln!("cannot save digests of tags in {}: {error}", self.file.display());
        }
    }

    /// Makes the next request for a tag ask its registry; the digest stays as the last known one.
    pub(crate) fn expire(&self, reference: &str) {
        let mut digests = self.digests.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(answer) = digests.get_mut(reference) {
            answer.at = None;
        }
    }
}
