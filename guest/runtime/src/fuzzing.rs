//! Entry points for the fuzz targets, with the feature `fuzzing` only.

use bulkhead_guest_common::mountinfo;
use serde_json::Value;

use crate::spec::{
    self, checks, devices, id_mappings, mounts, namespaces,
    process::{self, LsmSupport},
};

/// First id of the range that the rewritten config.json uses.
const START: u32 = 100_000;

/// Checks and rewrites a config.json as `create` does, without the container's own files.
///
/// # Panics
/// If the rewritten config.json would give the container the VM's ids.
pub fn config(text: &[u8]) {
    let Ok(mut spec) = serde_json::from_slice::<Value>(text) else { return };
    if checks::check(&spec).is_err() || devices::restrict(&mut spec).is_err() {
        return;
    }
    // Judged beside the rest, of which they would leave little to the fuzzer.
    let _ = spec::judge(&mut spec.clone(), None);
    let Ok(binds) = mounts::binds(&spec) else { return };
    mounts::drop_crun_extensions(&mut spec);
    let tmpfs_mounts = mounts::premounted_tmpfs(&spec, &binds);
    let _ = mounts::crun_destinations(&spec, &binds, &tmpfs_mounts);
    let mounted: Vec<_> = tmpfs_mounts.iter().map(|tmpfs| tmpfs.index).collect();
    mounts::remove_mounted(&mut spec, &mounted);
    namespaces::rewrite(&mut spec, &[("user", "/proc/self/fd/9".to_owned())]);
    id_mappings::map(&mut spec, START);
    process::adapt(&mut spec, LsmSupport { apparmor: true, selinux: false });
    let kinds: Vec<_> = checks::namespaces(&spec).map(|(kind, _)| kind.to_owned()).collect();
    assert!(kinds.iter().any(|kind| kind == "user"), "{spec}");
    // A rewritten spec that is refused would mean that the checks and crun see different namespaces in it.
    assert!(checks::check(&spec).is_ok(), "the rewritten config.json is refused: {spec}");
}

/// Parses a table of mounts.
pub fn mount_table(table: &[u8]) {
    for mount in mountinfo::parse(table) {
        let _ = (mount.root(), mount.point());
    }
}
