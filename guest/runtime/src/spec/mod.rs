//! The bundle's config.json: read with a limit, checked and rewritten.
//!
//! The document stays a [`serde_json::Value`]. Typed structures, like those of the oci-spec crate, drop each key that
//! they do not know when they are written back, where a setting that is not known must be refused. The types of this
//! program cover only the parts that it decides about:
//!
//! - [`keys`] lists the settings that a spec may have at all;
//! - [`checks`] refuses a spec by its own text, [`namespaces`] by the namespaces that it names, [`hooks`] by the
//!   programs;
//! - [`mounts`] and [`devices`] keep what is harmless, and find the binds that [`crate::bind_mounts`] decides about;
//! - [`id_mappings`], [`namespaces`] and [`process`] adapt the rest to the container's user namespace;
//! - [`seccomp_notify`] has the container's mount calls reported.
//!
//! Every value may have any JSON type: dockerd, BuildKit and a user's own bundle are parsed by the same code.

pub(crate) mod checks;
pub(crate) mod devices;
pub(crate) mod hooks;
pub(crate) mod id_mappings;
pub(crate) mod keys;
pub(crate) mod mounts;
pub(crate) mod namespaces;
pub(crate) mod process;
pub(crate) mod seccomp_notify;

use std::{
    io,
    path::{Path, PathBuf},
};

use bulkhead_guest_common::bounded;
use bulkhead_policy::containers::{self, ContainerError};
use serde_json::{Map, Value};

use checks::CheckError;
use devices::DeviceError;
use keys::KeyError;
use mounts::MountError;
use process::LsmSupport;

/// The size limit of config.json in bytes; dockerd's are about 50 KB.
const MAX_CONFIG: u64 = 16 << 20;

/// The reason why a bundle is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// It asks for a namespace that isolation cannot give.
    #[error("invalid or unsupported container spec")]
    Invalid(#[from] CheckError),
    /// It names a device of the VM.
    #[error("invalid or unsupported container spec")]
    Device(#[from] DeviceError),
    /// It has a setting that no engine writes.
    #[error("invalid or unsupported container spec")]
    Key(#[from] KeyError),
    /// A setting would reach beyond the container.
    #[error("invalid or unsupported container spec")]
    Container(#[from] ContainerError),
    /// One of its mounts is refused.
    #[error(transparent)]
    Mount(#[from] MountError),
    /// config.json cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// config.json is not JSON.
    #[error("{} is not valid JSON", path.display())]
    Syntax {
        path: PathBuf,
        #[source]
        source: serde_json::Error,
    },
}

/// Reads a bundle's config.json.
pub(crate) fn load(bundle: &Path) -> Result<Value, SpecError> {
    load_file(&bundle.join("config.json"))
}

/// Reads a JSON file of the engine.
fn load_file(path: &Path) -> Result<Value, SpecError> {
    let read = || {
        // One byte more than allowed tells a file that is too long from one that just fits.
        let text = bounded::read_file(path, MAX_CONFIG + 1)?;
        if text.len() as u64 > MAX_CONFIG {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {MAX_CONFIG} bytes")));
        }
        Ok(text)
    };
    let text = read().map_err(|source| SpecError::Read { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|source| SpecError::Syntax { path: path.to_owned(), source })
}

/// Reads, checks and adapts the process of an `exec`, which comes in a file of its own.
pub(crate) fn load_process(path: &Path) -> Result<Value, SpecError> {
    let mut process = load_file(path)?;
    keys::check_process(&process)?;
    process::adapt_process(&mut process, LsmSupport::detect());
    Ok(process)
}

/// Refuses a spec for what its text says, and takes the VM's devices out of it.
///
/// `container` is the id of a container of the engine; `None` for a step of a build.
pub(crate) fn judge(spec: &mut Value, container: Option<&str>) -> Result<(), SpecError> {
    // First the refusals with texts that Docker documents.
    checks::check(spec)?;
    devices::restrict(spec)?;
    keys::check(spec)?;
    // Without a path crun would choose one beside those of containers.
    containers::check_cgroup(spec["linux"]["cgroupsPath"].as_str().unwrap_or_default())?;
    hooks::restrict(spec, container)?;
    Ok(())
}

/// The object at `key`, created when it is missing or of another type.
pub(crate) fn object<'a>(parent: &'a mut Value, key: &str) -> &'a mut Map<String, Value> {
    let child = object_of(parent).entry(key).or_insert(Value::Null);
    object_of(child)
}

/// The array at `key`; `None` when it is missing or of another type.
pub(crate) fn array<'a>(parent: &'a mut Value, key: &str) -> Option<&'a mut Vec<Value>> {
    parent.get_mut(key).and_then(Value::as_array_mut)
}

fn object_of(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object above"),
    }
}

#[cfg(test)]
pub(crate) mod testing {
    //! Values for property tests: any JSON, and specs that are nearly right.

    use proptest::prelude::*;
    use serde_json::{Value, json};

    /// Any JSON, with the words that specs are made of.
    pub(crate) fn any_json() -> impl Strategy<Value = Value> {
        let word = prop_oneof![
            Just("type".to_owned()),
            Just("path".to_owned()),
            Just("namespaces".to_owned()),
            Just("bind".to_owned()),
            Just("user".to_owned()),
            Just("pid".to_owned()),
            Just("linux".to_owned()),
            Just("root".to_owned()),
            Just("options".to_owned()),
            Just("source".to_owned()),
            Just("destination".to_owned()),
            ".{0,6}",
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            word.clone().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 6, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::btree_map(word.clone(), inner, 0..6)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    /// A spec like dockerd's for `docker run alpine`, with each setting that the engine can write.
    pub(crate) fn docker() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "root": { "path": "/var/lib/docker/overlay2/x/merged", "readonly": true },
            "hostname": "h",
            "domainname": "d",
            "annotations": {},
            "hooks": {},
            "process": {
                "terminal": true, "consoleSize": { "height": 24, "width": 80 }, "args": ["sh"], "cwd": "/", "env": ["A=b"],
                "user": { "uid": 0, "gid": 0, "umask": 18, "additionalGids": [0, 10] },
                "capabilities": { "bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": [] },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 1024 }],
                "noNewPrivileges": true, "apparmorProfile": "docker-default", "oomScoreAdj": 0
            },
            "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] }],
            "linux": {
                "sysctl": { "net.ipv4.ping_group_range": "0 2147483647" },
                "cgroupsPath": "/docker/x",
                "resources": { "devices": [], "memory": {}, "cpu": {}, "pids": {}, "blockIO": {} },
                "rootfsPropagation": "rslave",
                "seccomp": { "defaultAction": "SCMP_ACT_ALLOW", "defaultErrnoRet": 1, "architectures": [], "syscalls": [] },
                "devices": [{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 0, "gid": 0 }],
                "maskedPaths": ["/proc/kcore"],
                "readonlyPaths": ["/proc/sys"],
                "namespaces": [
                    { "type": "mount" }, { "type": "network" }, { "type": "uts" }, { "type": "pid" }, { "type": "ipc" },
                    { "type": "cgroup" }
                ]
            }
        })
    }

    /// A spec like BuildKit's for a step of a build.
    pub(crate) fn build_step() -> Value {
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": { "uid": 0, "gid": 0 }, "args": ["/bin/sh"], "env": [], "cwd": "/", "capabilities": {},
                "rlimits": [], "selinuxLabel": ""
            },
            "root": { "path": "/var/lib/docker/buildkit/executor/x/rootfs" },
            "hostname": "buildkitsandbox",
            "mounts": [{ "destination": "/etc/hosts", "type": "bind", "source": "/x", "options": ["rbind", "ro"] }],
            "hooks": { "prestart": [] },
            "linux": {
                "resources": { "devices": [] }, "cgroupsPath": "/docker/buildkit/x", "namespaces": [{ "type": "pid" }],
                "seccomp": {}, "maskedPaths": [], "readonlyPaths": [], "mountLabel": ""
            }
        })
    }
}
