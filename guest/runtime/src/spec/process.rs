//! The parts of a spec that mean something else in a user namespace, or that would steer crun itself.

use serde_json::{Map, Value};

use crate::ranges::LENGTH;

/// What the VM's kernel and this process allow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Facts {
    /// This process's own `oom_score_adj`, which a user namespace can't go below.
    pub(crate) oom_score_adj: i64,
    /// The kernel has AppArmor, switched on.
    pub(crate) apparmor: bool,
    /// The kernel has SELinux, switched on.
    pub(crate) selinux: bool,
}

/// Annotations with these beginnings make crun run other code or write files outside of the container.
const STEERING: &[&str] = &["run.oci.", "module.wasm.", "krun.", "org.systemd.property."];

/// A resource limit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Limit {
    /// `RLIMIT_…`.
    pub(crate) kind: String,
    /// The hard limit.
    pub(crate) hard: u64,
}

/// Adapts what can't work in a user namespace and is harmless to leave out.
pub(crate) fn adapt(spec: &mut Value, facts: Facts) {
    if let Some(annotations) = spec.get_mut("annotations").and_then(Value::as_object_mut) {
        annotations.retain(|key, _| !STEERING.iter().any(|prefix| key.starts_with(prefix)));
    }
    if let Some(process) = spec.get_mut("process").and_then(Value::as_object_mut) {
        if process.get("oomScoreAdj").and_then(Value::as_i64).is_some_and(|adj| adj < facts.oom_score_adj) {
            process.insert("oomScoreAdj".into(), facts.oom_score_adj.into());
        }
        if !facts.apparmor {
            process.remove("apparmorProfile");
        }
        if !facts.selinux {
            process.remove("selinuxLabel");
        }
    }
    if let Some(linux) = spec.get_mut("linux").and_then(Value::as_object_mut) {
        if !facts.selinux {
            linux.remove("mountLabel");
        }
        if let Some(sysctl) = linux.get_mut("sysctl").and_then(Value::as_object_mut) {
            clamp_ping_groups(sysctl);
        }
    }
}

/// dockerd opens ping to all groups there are; in a user namespace that is its own 65536.
fn clamp_ping_groups(sysctl: &mut Map<String, Value>) {
    let Some(range) = sysctl.get_mut("net.ipv4.ping_group_range") else { return };
    let last = u64::from(LENGTH - 1);
    let bounds = range.as_str().map(|text| text.split_ascii_whitespace().map(str::parse::<u64>).collect::<Vec<_>>());
    if let Some([Ok(low), Ok(high)]) = bounds.as_deref()
        && low <= high
        && *high > last
    {
        *range = format!("{} {last}", low.min(&last)).into();
    }
}

/// The hard limits that the container asks for; only this process, outside of the user namespace, may raise its own.
pub(crate) fn limits(spec: &Value) -> Vec<Limit> {
    let limits = spec["process"]["rlimits"].as_array().into_iter().flatten();
    limits
        .filter_map(|limit| Some(Limit { kind: limit["type"].as_str()?.to_owned(), hard: limit["hard"].as_u64()? }))
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::spec::testing;

    const FACTS: Facts = Facts { oom_score_adj: 0, apparmor: false, selinux: false };

    #[test]
    fn dockers_ping_groups_are_brought_into_the_range() {
        let mut spec = testing::docker();
        adapt(&mut spec, FACTS);
        assert_eq!(spec["linux"]["sysctl"]["net.ipv4.ping_group_range"], "0 65535");
    }

    #[test]
    fn the_persons_own_ping_groups_are_kept_where_they_fit() {
        let mut spec = json!({ "linux": { "sysctl": { "net.ipv4.ping_group_range": "10 20" } } });
        let before = spec.clone();
        adapt(&mut spec, FACTS);
        assert_eq!(spec, before);
    }

    #[test]
    fn an_oom_score_below_ours_is_raised_and_others_are_kept() {
        for (asked, got) in [(-900, 0), (0, 0), (500, 500)] {
            let mut spec = json!({ "process": { "oomScoreAdj": asked } });
            adapt(&mut spec, FACTS);
            assert_eq!(spec["process"]["oomScoreAdj"], got);
        }
    }

    #[test]
    fn annotations_that_steer_crun_are_dropped_and_others_kept() {
        let mut spec = json!({ "annotations": {
            "run.oci.handler": "wasm", "run.oci.hooks.stdout": "/etc/passwd", "module.wasm.image/variant": "compat",
            "org.opencontainers.image.title": "t"
        } });
        adapt(&mut spec, FACTS);
        assert_eq!(spec["annotations"], json!({ "org.opencontainers.image.title": "t" }));
    }

    #[test]
    fn labels_are_dropped_only_where_the_kernel_lacks_the_module() {
        let spec = json!({ "process": { "apparmorProfile": "docker-default", "selinuxLabel": "l" } });
        let mut without = spec.clone();
        adapt(&mut without, FACTS);
        assert_eq!(without["process"], json!({}));
        let mut with = spec.clone();
        adapt(&mut with, Facts { apparmor: true, selinux: true, ..FACTS });
        assert_eq!(with, spec);
    }

    proptest! {
        #[test]
        fn no_json_panics(mut spec in testing::any_json()) {
            adapt(&mut spec, FACTS);
            let _ = limits(&spec);
        }

        #[test]
        fn no_ping_group_beyond_the_range_remains(low: u32, high: u32) {
            let mut spec = json!({ "linux": { "sysctl": { "net.ipv4.ping_group_range": format!("{low}\t{high}") } } });
            adapt(&mut spec, FACTS);
            let text = spec["linux"]["sysctl"]["net.ipv4.ping_group_range"].as_str().unwrap().to_owned();
            let numbers: Vec<u64> = text.split_ascii_whitespace().map(|n| n.parse().unwrap()).collect();
            prop_assert!(low > high || numbers[1] <= 65_535 && numbers[0] <= numbers[1]);
        }
    }
}
