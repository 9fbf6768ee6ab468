//! Settings that would give a container more than its share of the VM.

use bulkhead_policy::{containers, sources};

use crate::rules::Refusal;

/// Judges the cgroup above a container's own. crun follows `..` out of the cgroup file system, takes a relative path from
/// a cgroup of the VM, and anything beside `/docker` would be beside the VM's services, outside of the containers' limits.
pub(super) fn cgroup_parent(parent: &str) -> Result<(), Refusal> {
    let is_below = || sources::is_clean(parent) && containers::check_cgroup(parent).is_ok();
    if parent.is_empty() || parent == containers::CGROUP || is_below() {
        Ok(())
    } else {
        Err(Refusal::CgroupParent(parent.to_owned()))
    }
}

/// Judges the name of a limit, as the API has it: without `RLIMIT_` and in lower case.
pub(super) fn rlimit(name: &str) -> Result<(), Refusal> {
    let is_plain = name.bytes().all(|byte| byte.is_ascii_lowercase());
    if is_plain && containers::is_allowed_rlimit(&format!("RLIMIT_{}", name.to_ascii_uppercase())) {
        Ok(())
    } else {
        Err(Refusal::Limit(name.to_owned()))
    }
}

/// Returns the score that a container gets if it asks for `score`. Lower ones are raised without an error, as Docker does
/// for users who may not lower it.
pub(super) fn oom_score(score: i64) -> i64 {
    score.max(containers::MIN_OOM_SCORE_ADJ)
}

/// Judges an annotation. Those of containerd are orders to its shim, such as to share one with another container.
pub(super) fn annotation(key: &str) -> Result<(), Refusal> {
    if key.starts_with("io.containerd.") { Err(Refusal::Annotation(key.to_owned())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_below_the_containers_is_allowed_and_any_other_is_not() {
        for parent in ["", "/docker", "/docker/build", "/docker/a/b"] {
            assert_eq!(cgroup_parent(parent), Ok(()), "{parent}");
        }
        for parent in [
            "/",
            "/system/t14",
            "system",
            "docker",
            "docker/x",
            "../../../tmp/t14",
            "/docker/../system",
            "/docker/",
            "/docker//x",
            "/docker2",
            "/Docker",
            "/docker/x\0",
            "/docker\\x",
            "system.slice",
            "/docker/.",
        ] {
            assert_eq!(cgroup_parent(parent), Err(Refusal::CgroupParent(parent.to_owned())), "{parent}");
        }
    }

    #[test]
    fn limits_that_rank_processes_are_refused() {
        assert!(["nofile", "nproc", "memlock", "stack", "core"].iter().all(|name| rlimit(name).is_ok()));
        for name in ["rtprio", "nice", "RTPRIO", "rtprio ", "RLIMIT_RTPRIO", ""] {
            assert_eq!(rlimit(name), Err(Refusal::Limit(name.to_owned())));
        }
    }

    #[test]
    fn no_container_is_spared_longer_than_the_engine() {
        assert_eq!([-1000, -999, -500, -499, 0, 1000].map(oom_score), [-499, -499, -499, -499, 0, 1000]);
    }

    #[test]
    fn annotations_of_containerd_are_refused() {
        assert!(annotation("io.containerd.runc.v2.group").is_err());
        assert!(annotation("com.example.note").is_ok());
    }
}
