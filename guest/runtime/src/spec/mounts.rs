//! The mounts of a spec: which file system types there may be, and which entries bind a path of the VM.
//!
//! This module only reads and writes entries of config.json. Whether a bind's source is allowed is decided in
//! [`crate::bind_mounts`].

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::sys::Restrictions;

/// The reason why a mount is refused; the first text is Enhanced Container Isolation's own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// The source is a directory or file of the VM.
    #[error("can't mount {0} because it's configured as a restricted host mount")]
    Restricted(String),
    /// The gate refuses the engine's socket, in its words.
    #[error("{0}")]
    Socket(String),
    /// The file system type is not in [`ALLOWED_TYPES`].
    #[error("invalid mount config: file system type {kind:?} for {destination:?} is not allowed")]
    Type { kind: String, destination: String },
    /// The entry with this index lacks a part that every mount needs.
    #[error("invalid mount config: entry {0} has no destination or no source")]
    Incomplete(usize),
    /// A source cannot be opened.
    #[error("invalid mount config: cannot open {path}")]
    Open {
        path: String,
        #[source]
        source: io::Error,
    },
    /// The files of a source would keep owners that the container does not have. A file system of FUSE has id maps once
    /// its server has answered that it knows them.
    #[error(
        "invalid mount config: cannot mount {0}: its file system has no id maps, which containers need for their owners; \
         for a directory of the host, see `bulkhead logs`"
    )]
    NoIdMaps(String),
    /// A source cannot be mounted.
    #[error("invalid mount config: cannot mount {path}")]
    Mount {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// Types that the kernel makes harmless in a user namespace, or refuses there.
const ALLOWED_TYPES: &[&str] = &["cgroup", "cgroup2", "devpts", "mqueue", "proc", "sysfs", "tmpfs"];

/// crun's own options that change the source of a bind, or the owner it is bound for.
const DROPPED_OPTIONS: &[&str] = &["idmap", "ridmap", "copy-symlink", "src-nofollow", "dest-nofollow", "tmpcopyup"];

/// A bind mount that the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    /// The entry's position in the list of mounts.
    pub(crate) index: usize,
    /// As given; a relative one is relative to the bundle.
    pub(crate) source: PathBuf,
    pub(crate) destination: PathBuf,
    /// The mounts below the source are bound as well.
    pub(crate) recursive: bool,
    pub(crate) restrictions: Restrictions,
}

/// The bind mounts of a spec; the types of all other mounts are checked here.
pub(crate) fn binds(spec: &Value) -> Result<Vec<Bind>, MountError> {
    let mut binds = Vec::new();
    for (index, mount) in spec["mounts"].as_array().into_iter().flatten().enumerate() {
        let destination = mount["destination"].as_str().ok_or(MountError::Incomplete(index))?;
        let kind = mount["type"].as_str().unwrap_or_default();
        let options: Vec<_> = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let recursive = options.contains(&"rbind");
        // Any of the three can make an entry a bind; one overlooked here would reach crun unverified.
        if kind == "bind" || recursive || options.contains(&"bind") {
            // An empty source would be the bundle itself, once joined to its path.
            let source = mount["source"].as_str().filter(|s| !s.is_empty()).ok_or(MountError::Incomplete(index))?;
            let (source, destination) = (source.into(), destination.into());
            binds.push(Bind { index, source, destination, recursive, restrictions: restrictions(&options) });
        } else if !ALLOWED_TYPES.contains(&kind) {
            // A block device, say: the kernel parses its contents with the VM's rights.
            return Err(MountError::Type { kind: kind.to_owned(), destination: destination.to_owned() });
        }
    }
    Ok(binds)
}

/// The restrictions among a mount's options. The last of two that contradict each other wins, as with mount(8).
fn restrictions(options: &[&str]) -> Restrictions {
    let last = |on: &str, off: &str| {
        // The recursive forms (`rro`, `rnoexec`) count like the plain ones.
        let name =
            |option: &&&str| option.strip_prefix('r').filter(|rest| [on, off].contains(rest)).unwrap_or(option) == on;
        let relevant = options
            .iter()
            .rev()
            .find(|o| [on, off].contains(o) || o.strip_prefix('r').is_some_and(|o| [on, off].contains(&o)));
        relevant.as_ref().is_some_and(name)
    };
    Restrictions { read_only: last("ro", "rw"), no_exec: last("noexec", "exec"), no_suid: last("nosuid", "suid") }
}

/// The destinations on which crun is going to mount a file system itself.
pub(crate) fn crun_destinations(spec: &Value, binds: &[Bind], tmpfs_mounts: &[TmpfsMount]) -> Vec<PathBuf> {
    let mounts = spec["mounts"].as_array().into_iter().flatten().enumerate();
    mounts
        .filter(|(index, _)| binds.iter().all(|bind| bind.index != *index))
        .filter_map(|(_, mount)| mount["destination"].as_str().map(PathBuf::from))
        // crun mounts these even when the spec does not list them.
        .chain(["/dev", "/proc", "/sys"].map(PathBuf::from))
        .filter(|destination| tmpfs_mounts.iter().all(|tmpfs| tmpfs.destination != *destination))
        .collect()
}

/// A tmpfs that this program mounts before crun starts, because a restricted bind goes onto it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TmpfsMount {
    /// The entry's position in the list of mounts.
    pub(crate) index: usize,
    pub(crate) destination: PathBuf,
    pub(crate) restrictions: Restrictions,
    /// It is mounted `nodev`.
    pub(crate) no_devices: bool,
    /// The file system's own options: name and value.
    pub(crate) options: Vec<(String, String)>,
}

/// The options that a tmpfs itself takes.
const TMPFS_OPTIONS: &[&str] = &["gid", "mode", "nr_blocks", "nr_inodes", "size", "uid"];

/// Options that make no difference for a new tmpfs: its defaults, access times, and the propagation that it has anyway.
const NO_OP_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "defaults",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "private",
    "relatime",
    "rprivate",
    "rw",
    "strictatime",
    "suid",
];

/// The tmpfs mounts that have to exist before crun starts: those below which there is a restricted bind.
///
/// A bind without restrictions has no lock to lose, and can be left to crun together with its tmpfs. Nor can a tmpfs be
/// mounted here when it lies on a mount of crun's: only those count above which everything is such a tmpfs or a bind.
pub(crate) fn premounted_tmpfs(spec: &Value, binds: &[Bind]) -> Vec<TmpfsMount> {
    let mounts: Vec<_> = spec["mounts"].as_array().into_iter().flatten().enumerate().collect();
    let mut indices = Vec::new();
    for bind in binds.iter().filter(|bind| bind.restrictions != Restrictions::default()) {
        // The mounts of the spec that the bind's destination is on, directly or through others.
        let above: Vec<_> = mounts
            .iter()
            .filter(|(index, mount)| {
                let destination = Path::new(mount["destination"].as_str().unwrap_or_default());
                *index != bind.index && destination.is_absolute() && bind.destination.starts_with(destination)
            })
            .collect();
        let is_bind = |index: usize| binds.iter().any(|bind| bind.index == index);
        let tmpfs = above.iter().filter(|(index, _)| !is_bind(*index));
        // A tmpfs later in the list hides the bind, and has to go on doing so: the order of the list is kept.
        if tmpfs.clone().all(|(index, mount)| *index < bind.index && parse_tmpfs(*index, mount).is_some()) {
            indices.extend(tmpfs.map(|(index, _)| *index));
        }
    }
    // Binds can share a tmpfs, and a tmpfs can be on another one: each is mounted once, in the order of the list.
    indices.sort_unstable();
    indices.dedup();
    indices.into_iter().filter_map(|index| parse_tmpfs(index, mounts[index].1)).collect()
}

/// A tmpfs entry of which every option is understood; any other is left to crun.
fn parse_tmpfs(index: usize, mount: &Value) -> Option<TmpfsMount> {
    let destination = PathBuf::from(mount["destination"].as_str()?);
    let options: Vec<_> =
        mount["options"].as_array().into_iter().flatten().map(Value::as_str).collect::<Option<_>>()?;
    let restrictions = restrictions(&options);
    // In a read-only tmpfs no mount point for the bind could be created.
    if mount["type"] != "tmpfs" || restrictions.read_only || destination == Path::new("/") {
        return None;
    }
    let mut own = Vec::new();
    // An option that is in neither list may mean something that crun understands and this program does not.
    for option in &options {
        match option.split_once('=') {
            Some((name, value)) if TMPFS_OPTIONS.contains(&name) => own.push((name.to_owned(), value.to_owned())),
            None if NO_OP_OPTIONS.contains(option) || ["nodev", "noexec", "nosuid"].contains(option) => {}
            _ => return None,
        }
    }
    let no_devices = options.iter().rev().find(|option| ["dev", "nodev"].contains(option)) == Some(&"nodev");
    Some(TmpfsMount { index, destination, restrictions, no_devices, options: own })
}

/// Removes the entries that are mounted already.
pub(crate) fn remove_mounted(spec: &mut Value, mounted: &[usize]) {
    if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
        let mut index = 0;
        mounts.retain(|_| {
            index += 1;
            !mounted.contains(&(index - 1))
        });
    }
}

/// The mount of a bind that is left to crun, ready in the staging area.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StagedBind {
    pub(crate) path: PathBuf,
    /// The restrictions in force on it, all of them locked.
    pub(crate) restrictions: Restrictions,
}

/// Options of a bind that crun gets as they are: the kind of bind and its propagation.
const KEPT_OPTIONS: &[&str] =
    &["bind", "private", "rbind", "rprivate", "rshared", "rslave", "runbindable", "shared", "slave", "unbindable"];

/// Has crun bind the mount in the staging area instead of the spec's source.
///
/// crun remounts a bind with the restrictions that its options name. The kernel refuses a remount that would clear a
/// locked one, on which crun fails or retries, so the options name exactly those in force.
pub(crate) fn bind_staged(spec: &mut Value, index: usize, staged: &StagedBind) {
    let mount = spec.get_mut("mounts").and_then(|mounts| mounts.get_mut(index)).and_then(Value::as_object_mut);
    let Some(mount) = mount else { return };
    let Restrictions { read_only, no_exec, no_suid } = staged.restrictions;
    let restrictions = [(true, "nodev"), (read_only, "ro"), (no_exec, "noexec"), (no_suid, "nosuid")];
    let given = mount.get("options").and_then(Value::as_array).into_iter().flatten();
    let kept = given.filter(|option| option.as_str().is_some_and(|option| KEPT_OPTIONS.contains(&option)));
    let restrictions = restrictions.into_iter().filter(|(in_force, _)| *in_force).map(|(_, option)| option.into());
    let options = kept.cloned().chain(restrictions).collect();
    mount.insert("options".into(), options);
    mount.insert("source".into(), staged.path.to_string_lossy().into_owned().into());
}

/// Removes from every mount the parts that only this program decides.
pub(crate) fn drop_crun_extensions(spec: &mut Value) {
    for mount in spec.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(mount) = mount.as_object_mut() else { continue };
        // Id maps of the spec's choice could show a volume's files under ids of another container.
        mount.remove("uidMappings");
        mount.remove("gidMappings");
        if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
            options.retain(|option| {
                // crun's form with a value, `idmap=uids=0-1-2` say, is the same option.
                let name = option.as_str().unwrap_or_default().split('=').next().unwrap_or_default();
                !DROPPED_OPTIONS.contains(&name)
            });
        }
    }
}

/// Pseudo-terminals of a container. The VM has at least four times as many for all of them.
const MAX_TERMINALS: u32 = 1024;

/// Bounds the pseudo-terminals of each devpts, which would otherwise take all that the kernel has.
///
/// A container that may mount can mount another one, without the bound: it may take more of the machine anyway.
pub(crate) fn bound_terminals(spec: &mut Value) {
    let mounts = spec.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten();
    for mount in mounts.filter(|mount| mount["type"] == "devpts") {
        let Some(mount) = mount.as_object_mut() else { continue };
        let given = mount.get("options").and_then(Value::as_array).into_iter().flatten();
        // The last one counts, so a larger one must not come behind ours.
        let kept = given.filter(|option| option.as_str().is_some_and(|option| !option.starts_with("max=")));
        let options = kept.cloned().chain([format!("max={MAX_TERMINALS}").into()]).collect();
        mount.insert("options".into(), options);
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::error::chain;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::spec::testing;

    #[test]
    fn binds_are_found_by_type_and_by_option() {
        let spec = json!({ "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/a", "type": "bind", "source": "/x", "options": ["rbind", "ro", "rprivate"] },
            { "destination": "/b", "type": "none", "source": "y", "options": ["bind", "ro", "rw"] },
        ] });
        let binds = binds(&spec).unwrap();
        let brief: Vec<_> = binds
            .iter()
            .map(|b| (b.index, b.source.to_str().unwrap(), b.recursive, b.restrictions.read_only))
            .collect();
        assert_eq!(brief, [(1, "/x", true, true), (2, "y", false, false)]);
    }

    fn tmpfs(destination: &str, options: &[&str]) -> Value {
        json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options })
    }

    fn bind(destination: &str, options: &[&str]) -> Value {
        json!({ "destination": destination, "type": "bind", "source": "/x", "options": options })
    }

    fn premounted(mounts: Vec<Value>) -> Vec<(usize, String)> {
        let spec = json!({ "mounts": mounts });
        let tmpfs_mounts = premounted_tmpfs(&spec, &binds(&spec).unwrap());
        tmpfs_mounts.into_iter().map(|tmpfs| (tmpfs.index, tmpfs.destination.display().to_string())).collect()
    }

    #[test]
    fn a_tmpfs_below_a_read_only_bind_is_made_here_with_all_its_options() {
        let options = ["noexec", "nosuid", "strictatime", "mode=755", "size=65536k"];
        let spec = json!({ "mounts": [tmpfs("/dev", &options), bind("/dev/ro", &["rbind", "ro"])] });
        let tmpfs_mounts = premounted_tmpfs(&spec, &binds(&spec).unwrap());
        let expected = TmpfsMount {
            index: 0,
            destination: "/dev".into(),
            restrictions: Restrictions { read_only: false, no_exec: true, no_suid: true },
            no_devices: false,
            options: [("mode", "755"), ("size", "65536k")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
        };
        assert_eq!(tmpfs_mounts, [expected]);
        assert!(!crun_destinations(&spec, &binds(&spec).unwrap(), &tmpfs_mounts).contains(&"/dev".into()));
    }

    #[test]
    fn a_tmpfs_without_such_a_bind_is_cruns() {
        assert_eq!(premounted(vec![tmpfs("/t", &[]), bind("/t/rw", &["rbind"]), bind("/u/ro", &["ro", "rbind"])]), []);
        assert_eq!(premounted(vec![tmpfs("/t", &[]), bind("/tt", &["rbind", "ro"])]), []);
    }

    #[test]
    fn what_is_not_understood_or_lies_below_other_mounts_is_cruns() {
        let ro = |destination| bind(destination, &["rbind", "ro"]);
        assert_eq!(premounted(vec![tmpfs("/t", &["huge=always"]), ro("/t/a")]), []);
        assert_eq!(premounted(vec![tmpfs("/t", &["ro"]), ro("/t/a")]), []);
        let proc = json!({ "destination": "/p", "type": "proc", "source": "proc" });
        assert_eq!(premounted(vec![proc, tmpfs("/p/t", &[]), ro("/p/t/a")]), []);
        assert_eq!(premounted(vec![ro("/t/a"), tmpfs("/t", &[])]), []);
    }

    #[test]
    fn tmpfs_on_tmpfs_and_on_a_bind_are_found_in_order() {
        let mounts = vec![
            bind("/b", &["rbind"]),
            tmpfs("/b/t", &[]),
            tmpfs("/b/t/u", &[]),
            tmpfs("/other", &[]),
            bind("/b/t/u/ro", &["rbind", "ro"]),
        ];
        assert_eq!(premounted(mounts), [(1, "/b/t".to_owned()), (2, "/b/t/u".to_owned())]);
    }

    #[test]
    fn crun_gets_exactly_the_restrictions_that_are_in_force() {
        let options = ["rbind", "rslave", "noatime", "dev", "rro", "rw", "ro", "noexec", "rdiratime", "rsuid"];
        let mut spec = json!({ "mounts": [bind("/proc/tty", &options)] });
        let restrictions = binds(&spec).unwrap()[0].restrictions;
        bind_staged(&mut spec, 0, &StagedBind { path: "/stage/bind0".into(), restrictions });
        let expected = bind("/proc/tty", &["rbind", "rslave", "nodev", "ro", "noexec"]);
        assert_eq!(spec["mounts"][0]["options"], expected["options"]);
        assert_eq!(spec["mounts"][0]["source"], "/stage/bind0");
    }

    #[test]
    fn a_block_device_is_no_mount_for_a_container() {
        let spec = json!({ "mounts": [{ "destination": "/x", "type": "ext4", "source": "/dev/vda" }] });
        assert!(matches!(binds(&spec), Err(MountError::Type { .. })));
    }

    #[test]
    fn the_refusal_has_the_documented_words() {
        let error = crate::error::Error::from(crate::spec::SpecError::from(MountError::Restricted(
            "/etc/docker/daemon.json".into(),
        )));
        assert_eq!(
            chain(&error),
            "error in the container spec: can't mount /etc/docker/daemon.json because it's configured as a restricted host mount"
        );
    }

    #[test]
    fn each_devpts_has_a_bound_of_its_own_and_keeps_its_other_options() {
        let mut spec = json!({ "mounts": [
            { "destination": "/dev/pts", "type": "devpts", "options": ["nosuid", "mode=0620", "max=9999999"] },
            { "destination": "/x", "type": "devpts" },
            { "destination": "/proc", "type": "proc", "options": ["max=1"] },
        ] });
        bound_terminals(&mut spec);
        assert_eq!(spec["mounts"][0]["options"], json!(["nosuid", "mode=0620", "max=1024"]));
        assert_eq!(spec["mounts"][1]["options"], json!(["max=1024"]));
        assert_eq!(spec["mounts"][2]["options"], json!(["max=1"]));
    }

    proptest! {
        #[test]
        fn read_only_is_what_the_last_option_says(options in proptest::collection::vec("(r?ro|r?rw|rbind|exec|noexec)", 0..6)) {
            let words: Vec<_> = options.iter().map(String::as_str).collect();
            let last = words.iter().rev().find(|w| w.ends_with("ro") || w.ends_with("rw"));
            prop_assert_eq!(restrictions(&words).read_only, last.is_some_and(|w| w.ends_with("ro")));
        }

        #[test]
        fn no_json_panics_and_no_id_map_of_the_spec_remains(mut spec in testing::any_json()) {
            let _ = binds(&spec);
            drop_crun_extensions(&mut spec);
            bound_terminals(&mut spec);
            bind_staged(&mut spec, 0, &StagedBind { path: "/x".into(), restrictions: Restrictions::default() });
            let _ = crun_destinations(&spec, &[], &premounted_tmpfs(&spec, &[]));
            remove_mounted(&mut spec, &[1]);
            for mount in spec.get("mounts").and_then(Value::as_array).into_iter().flatten() {
                prop_assert!(mount.get("uidMappings").is_none());
            }
        }
    }
}
