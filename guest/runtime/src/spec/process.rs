//! The parts of a spec that mean something else in a user namespace, or that would steer crun itself.
//!
//! Such values come from dockerd's defaults as well as from users, so they are adapted instead of refused.

use serde_json::{Map, Value};

use crate::id_ranges::LENGTH;

/// The Linux security modules that the VM's kernel has, switched on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LsmSupport {
    pub(crate) apparmor: bool,
    pub(crate) selinux: bool,
}

/// Prefixes of annotations that make crun run other code or write files outside the container (crun(1)).
const CRUN_ANNOTATIONS: &[&str] = &["run.oci.", "module.wasm.", "krun.", "org.systemd.property."];

/// The lowest `oom_score_adj` of a container; at -1000 the OOM killer never picks a process.
const MIN_OOM_SCORE: i64 = -999;

/// Adapts the values that cannot work in a user namespace, and drops those that would steer crun.
pub(crate) fn adapt(spec: &mut Value, lsm: LsmSupport) {
    // `docker run --annotation` sets any key, `run.oci.handler` among them.
    if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.retain(|key, _| !CRUN_ANNOTATIONS.iter().any(|prefix| key.starts_with(prefix)));
    }
    if let Some(process) = spec.get_mut("process").and_then(Value::as_object_mut) {
        if process.get("oomScoreAdj").and_then(Value::as_i64).is_some_and(|adj| adj < MIN_OOM_SCORE) {
            process.insert("oomScoreAdj".into(), MIN_OOM_SCORE.into());
        }
        // `--security-opt` can name a label for a module that this kernel does not have.
        if !lsm.apparmor {
            process.remove("apparmorProfile");
        }
        if !lsm.selinux {
            process.remove("selinuxLabel");
        }
    }
    if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
        if !lsm.selinux {
            linux.remove("mountLabel");
        }
        if let Some(sysctl) = linux.get_mut("sysctl").and_then(Value::as_object_mut) {
            clamp_ping_groups(sysctl);
        }
    }
}

/// Limits dockerd's `0 2147483647`, ping for all groups, to the groups that the user namespace has.
fn clamp_ping_groups(sysctl: &mut Map<String, Value>) {
    let Some(range) = sysctl.get_mut("net.ipv4.ping_group_range") else { return };
    // The kernel refuses a bound that the user namespace does not map, and the container would not start.
    let last = u64::from(LENGTH - 1);
    let bounds = range.as_str().map(|text| text.split_ascii_whitespace().map(str::parse::<u64>).collect::<Vec<_>>());
    if let Some([Ok(low), Ok(high)]) = bounds.as_deref()
        && low <= high
        && *high > last
    {
        *range = format!("{} {last}", low.min(&last)).into();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::spec::testing;

    const NO_LSM: LsmSupport = LsmSupport { apparmor: false, selinux: false };

    #[test]
    fn dockers_ping_groups_are_brought_into_the_range() {
        let mut spec = testing::docker();
        adapt(&mut spec, NO_LSM);
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ping_group_range"], "0 65535");
    }

    #[test]
    fn a_users_own_ping_groups_are_kept_where_they_fit() {
        let mut spec = json!({ "linux": { "sysctl": { "net.ipv4.ping_group_range": "10 20" } } });
        let before = spec.clone();
        adapt(&mut spec, NO_LSM);
        assert_eq!(spec, before);
    }

    #[test]
    fn no_container_is_unkillable_and_other_oom_scores_are_kept() {
        for (asked, got) in [(-1000, -999), (-999, -999), (500, 500)] {
            let mut spec = json!({ "process": { "oomScoreAdj": asked } });
            adapt(&mut spec, NO_LSM);
            assert_eq!(spec["process"]["oomScoreAdj"], got);
        }
    }

    #[test]
    fn annotations_that_steer_crun_are_dropped_and_others_kept() {
        let mut spec = json!({ "annotations": {
            "run.oci.handler": "wasm", "run.oci.hooks.stdout": "/etc/passwd", "module.wasm.image/variant": "compat",
            "org.opencontainers.image.title": "t"
        } });
        adapt(&mut spec, NO_LSM);
        assert_eq!(spec["annotations"], json!({ "org.opencontainers.image.title": "t" }));
    }

    #[test]
    fn labels_are_dropped_only_where_the_kernel_lacks_the_module() {
        let spec = json!({ "process": { "apparmorProfile": "docker-default", "selinuxLabel": "l" } });
        let mut without = spec.clone();
        adapt(&mut without, NO_LSM);
        assert_eq!(without["process"], json!({}));
        let mut with = spec.clone();
        adapt(&mut with, LsmSupport { apparmor: true, selinux: true });
        assert_eq!(with, spec);
    }

    proptest! {
        #[test]
        fn no_json_panics(mut spec in testing::any_json()) {
            adapt(&mut spec, NO_LSM);
        }

        #[test]
        fn no_ping_group_beyond_the_range_remains(low: u32, high: u32) {
            let mut spec = json!({ "linux": { "sysctl": { "net.ipv4.ping_group_range": format!("{low}\t{high}") } } });
            adapt(&mut spec, NO_LSM);
            let text = spec["linux"]["sysctl"]["net.ipv4.ping_group_range"].as_str().unwrap().to_owned();
            let numbers: Vec<u64> = text.split_ascii_whitespace().map(|n| n.parse().unwrap()).collect();
            prop_assert!(low > high || numbers[1] <= 65_535 && numbers[0] <= numbers[1]);
        }
    }
}
