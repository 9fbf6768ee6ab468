//! The parts of a spec that mean something else in a user namespace, or that would steer crun itself.
//!
//! Such values come from dockerd's defaults as well as from users, so they are adapted instead of refused.

use std::{fs, path::Path};

use bulkhead_policy::containers::{MIN_OOM_SCORE_ADJ, is_allowed_annotation, is_allowed_rlimit};
use serde_json::{Map, Value};

use crate::id_ranges::LENGTH;

/// The Linux security modules that the VM's kernel has, switched on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LsmSupport {
    pub(crate) apparmor: bool,
    pub(crate) selinux: bool,
}

impl LsmSupport {
    /// The modules of this kernel.
    pub(crate) fn detect() -> Self {
        let parameter = fs::read_to_string("/sys/module/apparmor/parameters/enabled").unwrap_or_default();
        Self { apparmor: parameter.starts_with('Y'), selinux: Path::new("/sys/fs/selinux/enforce").exists() }
    }
}

/// Adapts the values that cannot work in a user namespace, and drops those that would steer crun.
pub(crate) fn adapt(spec: &mut Value, lsm: LsmSupport) {
    // `docker run --annotation` sets any key, those too by which crun runs other code or writes files outside the
    // container.
    if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.retain(|key, _| is_allowed_annotation(key));
    }
    if let Some(process) = spec.get_mut("process") {
        adapt_process(process, lsm);
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

/// Adapts a process, the container's first or one of `exec`.
pub(crate) fn adapt_process(process: &mut Value, lsm: LsmSupport) {
    let Some(process) = process.as_object_mut() else { return };
    if process.get("oomScoreAdj").and_then(Value::as_i64).is_some_and(|adj| adj < MIN_OOM_SCORE_ADJ) {
        process.insert("oomScoreAdj".into(), MIN_OOM_SCORE_ADJ.into());
    }
    // The engine's own default limits are among them, so one which is not allowed must not fail.
    if let Some(limits) = process.get_mut("rlimits").and_then(Value::as_array_mut) {
        limits.retain(|limit| limit["type"].as_str().is_some_and(is_allowed_rlimit));
    }
    // `--security-opt` can name a label for a module that this kernel does not have.
    if !lsm.apparmor {
        process.remove("apparmorProfile");
    }
    if !lsm.selinux {
        process.remove("selinuxLabel");
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
    fn no_container_is_spared_longer_than_the_engine_and_other_oom_scores_are_kept() {
        for (asked, got) in [(-1000, -499), (-500, -499), (-499, -499), (500, 500)] {
            let mut spec = json!({ "process": { "oomScoreAdj": asked } });
            adapt(&mut spec, NO_LSM);
            assert_eq!(spec["process"]["oomScoreAdj"], got);
        }
    }

    #[test]
    fn limits_that_raise_a_priority_are_dropped_and_others_kept() {
        let limit = |name: &str| json!({ "type": name, "soft": 99, "hard": 99 });
        let mut process =
            json!({ "rlimits": [limit("RLIMIT_RTPRIO"), limit("RLIMIT_NOFILE"), limit("RLIMIT_NICE"), {}] });
        adapt_process(&mut process, NO_LSM);
        assert_eq!(process["rlimits"], json!([limit("RLIMIT_NOFILE")]));
    }

    #[test]
    fn only_annotations_that_describe_are_kept() {
        let mut spec = json!({ "annotations": {
            "run.oci.handler": "wasm", "run.oci.hooks.stdout": "/etc/passwd", "module.wasm.image/variant": "compat",
            "of.a.user": "x", "org.opencontainers.image.title": "t"
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
