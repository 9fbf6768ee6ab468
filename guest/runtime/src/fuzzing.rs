//! What the fuzz targets reach of the runtime. Only with the feature `fuzzing`.

use serde_json::Value;

use crate::{
    mountinfo,
    spec::{
        checks, devices, id_mappings, mounts, namespaces,
        process::{self, Facts},
    },
};

/// First id of the range that the rewritten config.json uses.
const START: u32 = 100_000;

/// Checks and rewrites a config.json as `create` does, without the container's own files.
///
/// # Panics
/// When what is rewritten would give the container the VM's ids.
pub fn config(text: &[u8]) {
    let Ok(mut spec) = serde_json::from_slice::<Value>(text) else { return };
    if checks::check(&spec).is_err() || devices::restrict(&mut spec).is_err() {
        return;
    }
    let Ok(binds) = mounts::binds(&spec) else { return };
    mounts::clean(&mut spec);
    let covers = mounts::covers(&spec, &binds);
    let _ = mounts::others(&spec, &binds, &covers);
    let placed: Vec<_> = covers.iter().map(|cover| cover.index).collect();
    mounts::remove(&mut spec, &placed);
    namespaces::rewrite(&mut spec, &[("user", "/proc/self/fd/9".to_owned())]);
    id_mappings::map(&mut spec, START);
    process::adapt(&mut spec, Facts { apparmor: true, selinux: false });
    let kinds: Vec<_> = checks::namespaces(&spec).map(|(kind, _)| kind.to_owned()).collect();
    assert!(kinds.iter().any(|kind| kind == "user"), "{spec}");
    assert!(checks::check(&spec).is_ok(), "what was rewritten is refused: {spec}");
}

/// Reads a table of mounts and its overlays' options.
pub fn mount_table(table: &[u8]) {
    let _ = mountinfo::parse(table);
    let _ = mountinfo::layers(table);
}
