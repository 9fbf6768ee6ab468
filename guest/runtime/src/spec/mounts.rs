//! The mounts of a spec: which kinds there may be, and which of them bind a path of the VM.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::sys::Restrictions;

/// Why a mount is refused; the first text is Enhanced Container Isolation's own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// The source is a directory or file of the VM.
    #[error("can't mount {0} because it's configured as a restricted host mount")]
    Restricted(String),
    /// The gate refuses the engine's socket, in its words.
    #[error("{0}")]
    Socket(String),
    /// The file system type is none that a container needs from its runtime.
    #[error("invalid mount config: file system type {kind:?} for {destination:?} is not allowed")]
    Type {
        /// As given.
        kind: String,
        /// Where it should go.
        destination: String,
    },
    /// The entry lacks what a mount needs.
    #[error("invalid mount config: entry {0} has no destination or no source")]
    Incomplete(usize),
    /// The source can't be opened.
    #[error("invalid mount config: can't open {path}")]
    Open {
        /// The source.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The source can't be mounted.
    #[error("invalid mount config: can't mount {path}")]
    Mount {
        /// The source.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Types that the kernel makes harmless in a user namespace, or refuses there.
const TYPES: &[&str] = &["cgroup", "cgroup2", "devpts", "mqueue", "proc", "sysfs", "tmpfs"];

/// crun's own options that change what is bound or as whom.
const DROPPED: &[&str] = &["idmap", "ridmap", "copy-symlink", "src-nofollow", "dest-nofollow", "tmpcopyup"];

/// A bind mount that the spec asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bind {
    /// Its place in the list.
    pub(crate) index: usize,
    /// As given; relative to the bundle when relative.
    pub(crate) source: PathBuf,
    /// Where it goes in the container.
    pub(crate) destination: PathBuf,
    /// With the mounts below it.
    pub(crate) recursive: bool,
    /// What it takes away.
    pub(crate) restrict: Restrictions,
}

/// The bind mounts of a spec; every other type is checked here.
pub(crate) fn binds(spec: &Value) -> Result<Vec<Bind>, MountError> {
    let mut binds = Vec::new();
    for (index, mount) in spec["mounts"].as_array().into_iter().flatten().enumerate() {
        let destination = mount["destination"].as_str().ok_or(MountError::Incomplete(index))?;
        let kind = mount["type"].as_str().unwrap_or_default();
        let options: Vec<_> = mount["options"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let recursive = options.contains(&"rbind");
        if kind == "bind" || recursive || options.contains(&"bind") {
            let source = mount["source"].as_str().filter(|s| !s.is_empty()).ok_or(MountError::Incomplete(index))?;
            let (source, destination) = (source.into(), destination.into());
            binds.push(Bind { index, source, destination, recursive, restrict: restrictions(&options) });
        } else if !TYPES.contains(&kind) {
            return Err(MountError::Type { kind: kind.to_owned(), destination: destination.to_owned() });
        }
    }
    Ok(binds)
}

/// The last of two options that contradict each other wins, as with mount(8).
fn restrictions(options: &[&str]) -> Restrictions {
    let last = |on: &str, off: &str| {
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

/// Where crun is going to mount something itself.
pub(crate) fn others(spec: &Value, binds: &[Bind], covers: &[Cover]) -> Vec<PathBuf> {
    let mounts = spec["mounts"].as_array().into_iter().flatten().enumerate();
    mounts
        .filter(|(index, _)| binds.iter().all(|bind| bind.index != *index))
        .filter_map(|(_, mount)| mount["destination"].as_str().map(PathBuf::from))
        // crun mounts these even when the spec does not ask for it.
        .chain(["/dev", "/proc", "/sys"].map(PathBuf::from))
        .filter(|destination| covers.iter().all(|cover| cover.destination != *destination))
        .collect()
}

/// A tmpfs that a restricted bind goes onto.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cover {
    /// Its place in the list.
    pub(crate) index: usize,
    /// Where it goes in the container.
    pub(crate) destination: PathBuf,
    /// What it takes away.
    pub(crate) restrict: Restrictions,
    /// It has no devices.
    pub(crate) no_devices: bool,
    /// The file system's own options: name and value.
    pub(crate) options: Vec<(String, String)>,
}

/// The options of a tmpfs that are handed on to it.
const TMPFS_OPTIONS: &[&str] = &["gid", "mode", "nr_blocks", "nr_inodes", "size", "uid"];

/// Words among a mount's options that change nothing about a tmpfs that is only just made.
const IDLE: &[&str] = &[
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

/// The tmpfs mounts below which there is a bind that takes something away.
///
/// Only where all that lies above the bind is such a tmpfs or itself a bind: the rest is crun's to mount, and so is what
/// comes below it.
pub(crate) fn covers(spec: &Value, binds: &[Bind]) -> Vec<Cover> {
    let mounts: Vec<_> = spec["mounts"].as_array().into_iter().flatten().enumerate().collect();
    let mut indices = Vec::new();
    for bind in binds.iter().filter(|bind| bind.restrict != Restrictions::default()) {
        let above: Vec<_> = mounts
            .iter()
            .filter(|(index, mount)| {
                let destination = Path::new(mount["destination"].as_str().unwrap_or_default());
                *index != bind.index && destination.is_absolute() && bind.destination.starts_with(destination)
            })
            .collect();
        let is_bind = |index: usize| binds.iter().any(|bind| bind.index == index);
        let tmpfs = above.iter().filter(|(index, _)| !is_bind(*index));
        // A tmpfs that comes later hides the bind: crun keeps the order.
        if tmpfs.clone().all(|(index, mount)| *index < bind.index && cover(*index, mount).is_some()) {
            indices.extend(tmpfs.map(|(index, _)| *index));
        }
    }
    indices.sort_unstable();
    indices.dedup();
    indices.into_iter().filter_map(|index| cover(index, mounts[index].1)).collect()
}

/// A tmpfs whose options are all understood.
fn cover(index: usize, mount: &Value) -> Option<Cover> {
    let destination = PathBuf::from(mount["destination"].as_str()?);
    let options: Vec<_> =
        mount["options"].as_array().into_iter().flatten().map(Value::as_str).collect::<Option<_>>()?;
    let restrict = restrictions(&options);
    if mount["type"] != "tmpfs" || restrict.read_only || destination == Path::new("/") {
        return None;
    }
    let mut own = Vec::new();
    for option in &options {
        match option.split_once('=') {
            Some((name, value)) if TMPFS_OPTIONS.contains(&name) => own.push((name.to_owned(), value.to_owned())),
            None if IDLE.contains(option) || ["nodev", "noexec", "nosuid"].contains(option) => {}
            _ => return None,
        }
    }
    let no_devices = options.iter().rev().find(|option| ["dev", "nodev"].contains(option)) == Some(&"nodev");
    Some(Cover { index, destination, restrict, no_devices, options: own })
}

/// Takes the entries out that are mounted already.
pub(crate) fn remove(spec: &mut Value, placed: &[usize]) {
    if let Some(mounts) = spec.get_mut("mounts").and_then(Value::as_array_mut) {
        let mut index = 0;
        mounts.retain(|_| {
            index += 1;
            !placed.contains(&(index - 1))
        });
    }
}

/// A bind's mount that is prepared for crun to bind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Staged {
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What is taken away on it, besides devices.
    pub(crate) taken: Restrictions,
}

/// Options of a bind that are left to crun.
const KEPT: &[&str] =
    &["bind", "private", "rbind", "rprivate", "rshared", "rslave", "runbindable", "shared", "slave", "unbindable"];

/// Has crun bind the prepared mount.
///
/// crun sets what a bind takes away by its options once more, and fails or tries again where the kernel keeps what they
/// don't name: they name all of that and nothing else.
pub(crate) fn hand_over(spec: &mut Value, index: usize, staged: &Staged) {
    let mount = spec.get_mut("mounts").and_then(|mounts| mounts.get_mut(index)).and_then(Value::as_object_mut);
    let Some(mount) = mount else { return };
    let Restrictions { read_only, no_exec, no_suid } = staged.taken;
    let taken = [(true, "nodev"), (read_only, "ro"), (no_exec, "noexec"), (no_suid, "nosuid")];
    let given = mount.get("options").and_then(Value::as_array).into_iter().flatten();
    let kept = given.filter(|option| option.as_str().is_some_and(|option| KEPT.contains(&option)));
    let taken = taken.into_iter().filter(|(is_taken, _)| *is_taken).map(|(_, option)| option.into());
    let options = kept.cloned().chain(taken).collect();
    mount.insert("options".into(), options);
    mount.insert("source".into(), staged.path.to_string_lossy().into_owned().into());
}

/// Takes out of every mount what only this program may decide.
pub(crate) fn clean(spec: &mut Value) {
    for mount in spec.get_mut("mounts").and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(mount) = mount.as_object_mut() else { continue };
        mount.remove("uidMappings");
        mount.remove("gidMappings");
        if let Some(options) = mount.get_mut("options").and_then(Value::as_array_mut) {
            options.retain(|option| {
                let name = option.as_str().unwrap_or_default().split('=').next().unwrap_or_default();
                !DROPPED.contains(&name)
            });
        }
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
        let brief: Vec<_> =
            binds.iter().map(|b| (b.index, b.source.to_str().unwrap(), b.recursive, b.restrict.read_only)).collect();
        assert_eq!(brief, [(1, "/x", true, true), (2, "y", false, false)]);
    }

    fn tmpfs(destination: &str, options: &[&str]) -> Value {
        json!({ "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": options })
    }

    fn bind(destination: &str, options: &[&str]) -> Value {
        json!({ "destination": destination, "type": "bind", "source": "/x", "options": options })
    }

    fn covered(mounts: Vec<Value>) -> Vec<(usize, String)> {
        let spec = json!({ "mounts": mounts });
        let covers = covers(&spec, &binds(&spec).unwrap());
        covers.into_iter().map(|cover| (cover.index, cover.destination.display().to_string())).collect()
    }

    #[test]
    fn a_tmpfs_below_a_read_only_bind_is_made_here_with_all_its_options() {
        let options = ["noexec", "nosuid", "strictatime", "mode=755", "size=65536k"];
        let spec = json!({ "mounts": [tmpfs("/dev", &options), bind("/dev/ro", &["rbind", "ro"])] });
        let covers = covers(&spec, &binds(&spec).unwrap());
        let expected = Cover {
            index: 0,
            destination: "/dev".into(),
            restrict: Restrictions { read_only: false, no_exec: true, no_suid: true },
            no_devices: false,
            options: [("mode", "755"), ("size", "65536k")].map(|(a, b)| (a.to_owned(), b.to_owned())).into(),
        };
        assert_eq!(covers, [expected]);
        assert!(!others(&spec, &binds(&spec).unwrap(), &covers).contains(&"/dev".into()));
    }

    #[test]
    fn a_tmpfs_without_such_a_bind_is_cruns() {
        assert_eq!(covered(vec![tmpfs("/t", &[]), bind("/t/rw", &["rbind"]), bind("/u/ro", &["ro", "rbind"])]), []);
        assert_eq!(covered(vec![tmpfs("/t", &[]), bind("/tt", &["rbind", "ro"])]), []);
    }

    #[test]
    fn what_is_not_understood_or_lies_below_other_mounts_is_cruns() {
        let ro = |destination| bind(destination, &["rbind", "ro"]);
        assert_eq!(covered(vec![tmpfs("/t", &["huge=always"]), ro("/t/a")]), []);
        assert_eq!(covered(vec![tmpfs("/t", &["ro"]), ro("/t/a")]), []);
        let proc = json!({ "destination": "/p", "type": "proc", "source": "proc" });
        assert_eq!(covered(vec![proc, tmpfs("/p/t", &[]), ro("/p/t/a")]), []);
        assert_eq!(covered(vec![ro("/t/a"), tmpfs("/t", &[])]), []);
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
        assert_eq!(covered(mounts), [(1, "/b/t".to_owned()), (2, "/b/t/u".to_owned())]);
    }

    #[test]
    fn crun_is_told_all_that_a_bind_takes_away_and_nothing_that_the_kernel_would_refuse() {
        let options = ["rbind", "rslave", "noatime", "dev", "rro", "rw", "ro", "noexec", "rdiratime", "rsuid"];
        let mut spec = json!({ "mounts": [bind("/proc/tty", &options)] });
        let taken = binds(&spec).unwrap()[0].restrict;
        hand_over(&mut spec, 0, &Staged { path: "/stage/bind0".into(), taken });
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
            clean(&mut spec);
            hand_over(&mut spec, 0, &Staged { path: "/x".into(), taken: Restrictions::default() });
            let _ = others(&spec, &[], &covers(&spec, &[]));
            remove(&mut spec, &[1]);
            for mount in spec.get("mounts").and_then(Value::as_array).into_iter().flatten() {
                prop_assert!(mount.get("uidMappings").is_none());
            }
        }
    }
}
