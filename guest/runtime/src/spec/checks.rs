//! Checks of the spec alone: what makes it unfit for isolation, in the order in which it is reported.
//!
//! The namespaces that it names by path are opened and checked in [`super::namespaces`].

use std::io;

use serde_json::Value;

/// The reason why a spec is refused. The texts about sharing with the host are Enhanced Container Isolation's own;
/// those of a missing `linux` and of a path that is not there are sysbox-runc's.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// `root` or `linux` is missing.
    #[error("not a linux container spec")]
    NotLinux,
    /// Namespaces of the VM would be shared.
    #[error(
        "sysbox containers can't share namespaces [{}] with the host (because they use the linux user-namespace for isolation)",
        .0.join(" ")
    )]
    HostNamespaces(Vec<&'static str>),
    /// The VM's network would be shared.
    #[error(
        "sysbox containers can't share a network namespace with the host (because they use the linux user-namespace for isolation)"
    )]
    HostNetwork,
    /// A namespace is listed twice, so that two readers could take different entries.
    #[error("namespace {0} is listed more than once")]
    Duplicate(String),
    /// A namespace is of a type that the kernel does not have.
    #[error("unknown namespace type {0}")]
    UnknownType(String),
    /// A namespace to join does not exist.
    #[error("unable to stat {path:?}")]
    Stat {
        path: String,
        #[source]
        source: io::Error,
    },
    /// A namespace to join does not belong to an isolated container.
    #[error("cannot join namespace {0:?}: it does not belong to a sysbox container")]
    NotIsolated(String),
    /// The namespaces to join belong to two user namespaces, of which a process can be in only one.
    #[error("cannot join namespaces of different sysbox containers")]
    TwoOwners,
}

/// The types that must not be the VM's, in the order in which an error lists them.
pub(crate) const REQUIRED: [&str; 5] = ["pid", "ipc", "uts", "mount", "network"];

/// The namespace types of the OCI runtime specification (config-linux.md, Namespaces).
const KNOWN: [&str; 8] = ["pid", "ipc", "uts", "mount", "network", "user", "cgroup", "time"];

/// The type and the path of every entry in `linux.namespaces`.
pub(crate) fn namespaces(spec: &Value) -> impl Iterator<Item = (&str, Option<&str>)> {
    spec["linux"]["namespaces"].as_array().into_iter().flatten().map(|namespace| {
        // An empty path is a new namespace to crun, like none at all.
        let path = namespace["path"].as_str().filter(|path| !path.is_empty());
        (namespace["type"].as_str().unwrap_or_default(), path)
    })
}

/// Refuses a spec that shares a namespace with the VM by leaving it out, and one that two readers could read
/// differently.
pub(crate) fn check(spec: &Value) -> Result<(), CheckError> {
    if !spec["root"].is_object() || !spec["linux"].is_object() {
        return Err(CheckError::NotLinux);
    }
    // A type that is not listed is inherited from the runtime's parent, which is the VM.
    let missing: Vec<_> = REQUIRED.into_iter().filter(|kind| !namespaces(spec).any(|(k, _)| k == *kind)).collect();
    // dockerd leaves the entry out for `--network=host`, which has a text of its own.
    if missing == ["network"] {
        return Err(CheckError::HostNetwork);
    }
    if !missing.is_empty() {
        return Err(CheckError::HostNamespaces(missing));
    }
    let mut seen = Vec::new();
    for (kind, _) in namespaces(spec) {
        if !KNOWN.contains(&kind) {
            return Err(CheckError::UnknownType(kind.to_owned()));
        }
        if seen.contains(&kind) {
            return Err(CheckError::Duplicate(kind.to_owned()));
        }
        seen.push(kind);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::error::chain;
    use proptest::prelude::*;

    use super::*;
    use crate::spec::{SpecError, testing};

    fn without(kinds: &[&str]) -> Value {
        let mut spec = testing::docker();
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|n| !kinds.contains(&n["type"].as_str().unwrap()));
        spec
    }

    #[test]
    fn what_docker_makes_for_a_plain_run_is_accepted() {
        assert!(check(&testing::docker()).is_ok());
    }

    #[test]
    fn each_namespace_of_the_host_is_named_in_the_documented_words() {
        let error = crate::error::Error::from(SpecError::from(check(&without(&["pid"])).unwrap_err()));
        assert_eq!(
            chain(&error),
            "error in the container spec: invalid or unsupported container spec: sysbox containers can't share \
             namespaces [pid] with the host (because they use the linux user-namespace for isolation)"
        );
    }

    #[test]
    fn several_are_listed_in_one_fixed_order() {
        let error = check(&without(&["network", "pid", "ipc"])).unwrap_err();
        assert!(error.to_string().contains("namespaces [pid ipc network] with"), "{error}");
    }

    #[test]
    fn the_network_refusal_has_the_documented_words() {
        let error = crate::error::Error::from(SpecError::from(check(&without(&["network"])).unwrap_err()));
        assert_eq!(
            chain(&error),
            "error in the container spec: invalid or unsupported container spec: sysbox containers can't share a \
             network namespace with the host (because they use the linux user-namespace for isolation)"
        );
    }

    #[test]
    fn a_namespace_given_twice_is_refused() {
        let mut spec = testing::docker();
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(serde_json::json!({ "type": "pid", "path": "/p" }));
        assert!(matches!(check(&spec), Err(CheckError::Duplicate(kind)) if kind == "pid"));
    }

    proptest! {
        #[test]
        fn no_json_panics_and_what_passes_has_every_required_namespace(spec in testing::any_json()) {
            if check(&spec).is_ok() {
                for kind in REQUIRED {
                    prop_assert_eq!(namespaces(&spec).filter(|(k, _)| *k == kind).count(), 1);
                }
            }
        }
    }
}
