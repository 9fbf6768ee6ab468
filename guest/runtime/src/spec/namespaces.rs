//! The namespaces that a container joins: each belongs to an isolated container, and none is the VM's.
//!
//! The user namespace itself is made by this program and joined by crun. Given a path instead of a plain "new", crun
//! mounts inside that namespace, from mounts that the kernel has locked by then (mount_namespaces(7)). So a read-only
//! bind stays read-only whatever the container's root tries.
//!
//! The kernel lets a container use a namespace only if the container's user namespace owns it. A container that joins
//! another's network, say, therefore joins its user namespace as well. Every path is opened once, and crun gets the
//! descriptor: the namespace that was checked is the one that is joined.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use bulkhead_guest_common::namespace::{self, Identity};
use serde_json::{Value, json};

use super::checks::{self, CheckError};
use crate::sys;

/// The user namespace that owns the joined namespaces.
#[derive(Debug)]
pub(crate) struct OwningUserns {
    /// Keeps the namespace alive until crun has joined it.
    pub(crate) fd: OwnedFd,
    pub(crate) id: Identity,
}

/// The namespaces that a container joins.
#[derive(Debug, Default)]
pub(crate) struct JoinedNamespaces {
    /// Type and open namespace.
    namespaces: Vec<(String, File)>,
    /// The owner of them all; `None` when nothing is joined.
    pub(crate) owner: Option<OwningUserns>,
}

/// The file under `/proc/self/ns` for a type of the OCI spec.
fn proc_name(kind: &str) -> &str {
    match kind {
        "mount" => "mnt",
        "network" => "net",
        other => other,
    }
}

/// Opens and checks every namespace that is given by path, except a user namespace: that one is not the spec's choice.
pub(crate) fn open(spec: &Value) -> Result<JoinedNamespaces, CheckError> {
    let mut joined = JoinedNamespaces::default();
    let mut of_host = Vec::new();
    for (kind, path) in checks::namespaces(spec) {
        let Some(path) = path.filter(|_| kind != "user") else { continue };
        let stat = |source| CheckError::Stat { path: path.to_owned(), source };
        let own = File::open(format!("/proc/self/ns/{}", proc_name(kind))).map_err(stat)?;
        let namespace = File::open(path).map_err(stat)?;
        // A path can name the VM's own namespace, too. Device and inode number identify a namespace: they belong to a
        // file system inside the kernel, so no plain file has the same pair.
        if Identity::of(&namespace).map_err(stat)? == Identity::of(&own).map_err(stat)? {
            // All of the VM's are collected first: Docker's text lists them together.
            of_host.extend(checks::REQUIRED.into_iter().chain(["cgroup", "time"]).find(|k| *k == kind));
            continue;
        }
        // A mount namespace of another container would bring that container's root with it, past all that is checked
        // here.
        if kind == "mount" {
            return Err(CheckError::NotIsolated(path.to_owned()));
        }
        // The ioctl fails for a plain file, which does not lead to a namespace.
        let owner = namespace::owner(namespace.as_fd()).map_err(|_| CheckError::NotIsolated(path.to_owned()))?;
        let owner = File::from(owner);
        let id = Identity::of(&owner).map_err(stat)?;
        // Not the VM's own namespace, but one that a program of the VM made: as little isolated.
        if id == host_userns()? {
            return Err(CheckError::NotIsolated(path.to_owned()));
        }
        // That the owner is the user namespace of a living container is checked later, against the table of id ranges.
        match &joined.owner {
            Some(first) if first.id != id => return Err(CheckError::TwoOwners),
            Some(_) => {}
            None => joined.owner = Some(OwningUserns { fd: owner.into(), id }),
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

impl JoinedNamespaces {
    /// Type and path of each and of the user namespace, valid in this process and in the crun that it executes.
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

/// Rewrites the list: the given types, always with user and cgroup, and with no other path than those of `paths`.
pub(crate) fn rewrite(spec: &mut Value, paths: &[(&str, String)]) {
    let mut kinds: Vec<_> = checks::namespaces(spec).map(|(kind, _)| kind.to_owned()).collect();
    // Without a cgroup namespace the container would see its place in the VM's hierarchy. dockerd leaves it out for
    // `--cgroupns=host`, which isolation ignores.
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
        assert!(matches!(open(&with_path("network", "/proc/self/status")), Err(CheckError::NotIsolated(_))));
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
