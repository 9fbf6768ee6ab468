//! Namespaces that a container joins: whose they are, and that it is not the VM.
//!
//! The user namespace itself is made by this program and joined by crun: a path instead of a plain "new" makes crun do
//! the binds inside of it, from mounts that the kernel has locked by then (mount_namespaces(7)), so that a read-only
//! bind stays read-only whatever the container's root tries.
//!
//! The kernel lets a container use a namespace only if the user namespace that the container is in owns it, so a
//! container that joins another's network, say, joins its user namespace too. Every path is opened once; crun gets
//! the descriptor, so that what was judged is what is joined.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use bulkhead_procfs::namespace::{self, Identity};
use serde_json::{Value, json};

use super::checks::{self, CheckError};
use crate::sys;

/// A user namespace that owns what is joined.
#[derive(Debug)]
pub(crate) struct Owner {
    /// Keeps it alive and names it for crun.
    pub(crate) fd: OwnedFd,
    /// Its identity.
    pub(crate) id: Identity,
}

/// What a container joins.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    /// Type and open namespace.
    namespaces: Vec<(String, File)>,
    /// The user namespace that owns them all; `None` when nothing is joined.
    pub(crate) owner: Option<Owner>,
}

/// The file under `/proc/self/ns` for a type of the OCI spec.
fn proc_name(kind: &str) -> &str {
    match kind {
        "mount" => "mnt",
        "network" => "net",
        other => other,
    }
}

/// Opens and judges every namespace that is given by path, except a user namespace: that one is not the spec's choice.
pub(crate) fn open(spec: &Value) -> Result<Joined, CheckError> {
    let mut joined = Joined::default();
    let mut of_host = Vec::new();
    for (kind, path) in checks::namespaces(spec) {
        let Some(path) = path.filter(|_| kind != "user") else { continue };
        let stat = |source| CheckError::Stat { path: path.to_owned(), source };
        let own = File::open(format!("/proc/self/ns/{}", proc_name(kind))).map_err(stat)?;
        let namespace = File::open(path).map_err(stat)?;
        // The numbers of namespaces are those of one kernel-internal file system, never of a plain file.
        if Identity::of(&namespace).map_err(stat)? == Identity::of(&own).map_err(stat)? {
            of_host.extend(checks::REQUIRED.into_iter().chain(["cgroup", "time"]).find(|k| *k == kind));
            continue;
        }
        // A mount namespace of another container would bring that container's root with it.
        if kind == "mount" {
            return Err(CheckError::Foreign(path.to_owned()));
        }
        let owner = namespace::owner(namespace.as_fd()).map_err(|_| CheckError::Foreign(path.to_owned()))?;
        let owner = File::from(owner);
        let id = Identity::of(&owner).map_err(stat)?;
        if id == host_userns()? {
            return Err(CheckError::Foreign(path.to_owned()));
        }
        match &joined.owner {
            Some(first) if first.id != id => return Err(CheckError::TwoOwners),
            Some(_) => {}
            None => joined.owner = Some(Owner { fd: owner.into(), id }),
        }
        joined.namespaces.push((kind.to_owned(), namespace));
    }
    match of_host[..] {
        [] => Ok(joined),
        ["network"] => Err(CheckError::HostNetwork),
        _ => Err(CheckError::HostNamespaces(of_host)),
    }
}

fn host_userns() -> Result<Identity, CheckError> {
    let path = "/proc/self/ns/user";
    let stat = |source| CheckError::Stat { path: path.to_owned(), source };
    Identity::of(&File::open(path).map_err(stat)?).map_err(stat)
}

impl Joined {
    /// Type and path of each and of the user namespace, valid in this process and in what it turns into.
    pub(crate) fn paths(&self, userns: BorrowedFd<'_>) -> std::io::Result<Vec<(&str, String)>> {
        let others = self.namespaces.iter().map(|(kind, file)| (kind.as_str(), file.as_fd()));
        std::iter::once(("user", userns))
            .chain(others)
            .map(|(kind, fd)| {
                sys::keep_across_exec(fd)?;
                Ok((kind, format!("/proc/self/fd/{}", fd.as_raw_fd())))
            })
            .collect()
    }
}

/// Writes the list anew: the given kinds, user and cgroup always, paths only where `paths` has one.
pub(crate) fn rewrite(spec: &mut Value, paths: &[(&str, String)]) {
    let mut kinds: Vec<_> = checks::namespaces(spec).map(|(kind, _)| kind.to_owned()).collect();
    for kind in ["user", "cgroup"] {
        if !kinds.iter().any(|k| k == kind) {
            kinds.push(kind.to_owned());
        }
    }
    let list = kinds.iter().map(|kind| match paths.iter().find(|(k, _)| k == kind) {
        Some((_, path)) => json!({ "type": kind, "path": path }),
        None => json!({ "type": kind }),
    });
    let list = list.collect();
    super::object(spec, "linux").insert("namespaces".into(), list);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::testing;

    fn with_path(kind: &str, path: &str) -> Value {
        let mut spec = testing::docker();
        for namespace in spec["linux"]["namespaces"].as_array_mut().unwrap() {
            if namespace["type"] == kind {
                namespace["path"] = path.into();
            }
        }
        spec
    }

    #[test]
    fn the_hosts_network_by_path_is_refused() {
        assert!(matches!(open(&with_path("network", "/proc/self/ns/net")), Err(CheckError::HostNetwork)));
    }

    #[test]
    fn the_hosts_other_namespaces_by_path_are_refused_by_name() {
        for (kind, file) in [("pid", "pid"), ("ipc", "ipc"), ("uts", "uts"), ("mount", "mnt")] {
            let error = open(&with_path(kind, &format!("/proc/self/ns/{file}"))).unwrap_err();
            assert!(matches!(error, CheckError::HostNamespaces(kinds) if kinds == [kind]));
        }
    }

    #[test]
    fn a_plain_file_and_a_missing_path_are_refused() {
        assert!(matches!(open(&with_path("network", "/proc/self/status")), Err(CheckError::Foreign(_))));
        assert!(matches!(open(&with_path("network", "/nowhere")), Err(CheckError::Stat { .. })));
    }

    proptest! {
        #[test]
        fn user_and_cgroup_are_always_there_and_no_path_of_the_spec_remains(mut spec in testing::any_json()) {
            rewrite(&mut spec, &[]);
            let list = spec["linux"]["namespaces"].as_array().unwrap();
            for kind in ["user", "cgroup"] {
                prop_assert!(list.iter().any(|n| n["type"] == kind));
            }
            prop_assert!(list.iter().all(|n| n.get("path").is_none()));
        }
    }
}
