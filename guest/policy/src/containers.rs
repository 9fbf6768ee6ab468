//! Settings of a container that reach beyond it: limits, cgroup, OOM score, annotations, hooks.
//!
//! Each of them is one that a client of the engine may set, or that the engine's options let a file set. What a
//! container may do to itself is left to the engine and the kernel.

use std::path::{Component, Path};

use serde_json::Value;

/// The cgroup of all containers and build steps, as dockerd names it without `--cgroup-parent`.
pub const CGROUP: &str = "/docker";

/// The lowest `oom_score_adj` of a container. dockerd has -500: a container that is spared longer would end the engine
/// first, and with it all other containers.
pub const MIN_OOM_SCORE_ADJ: i64 = -499;

/// The resource limits that a container may have (getrlimit(2)).
///
/// They bound the container's own processes. Those that grant something are missing: `RLIMIT_RTPRIO` lets a process
/// without privilege outrank everything in the VM, `RLIMIT_NICE` some of it.
const RLIMITS: [&str; 14] = [
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_FSIZE",
    "RLIMIT_LOCKS",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RSS",
    "RLIMIT_RTTIME",
    "RLIMIT_SIGPENDING",
    "RLIMIT_STACK",
];

/// The prefixes of annotations that describe an image or a container; no runtime acts on them.
const ANNOTATIONS: [&str; 2] = ["com.docker.", "org.opencontainers.image."];

/// The program name under which dockerd sets up a container's network.
const SETKEY: &str = "libnetwork-setkey";

/// The directories of dockerd's sockets: its default, with and without the link `/var/run`.
const EXEC_ROOTS: [&str; 2] = ["-exec-root=/run/docker", "-exec-root=/var/run/docker"];

/// The length of the id of dockerd's network controller in a hook.
const CONTROLLER_LENGTH: usize = 12;

/// The length limit of a container's id in a hook; dockerd's have 64, BuildKit's 25 characters.
const MAX_ID: usize = 64;

/// The reason why a setting is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ContainerError {
    /// The cgroup is not one of a container's.
    #[error("the cgroup {0:?} is not allowed: leave out --cgroup-parent, or name one below {CGROUP}")]
    Cgroup(String),
    /// A hook is not the engine's own; crun would run it outside the container, as the VM's root.
    #[error("the hook {0:?} is not allowed: containers have no hooks but the engine's own")]
    Hook(String),
}

/// Returns whether a container may have a resource limit of this type.
pub fn is_allowed_rlimit(name: &str) -> bool {
    RLIMITS.contains(&name)
}

/// Returns whether the runtime below may see an annotation. Others stay what they are to users: text that
/// `docker inspect` shows.
pub fn is_allowed_annotation(key: &str) -> bool {
    ANNOTATIONS.iter().any(|prefix| key.starts_with(prefix))
}

/// Checks `linux.cgroupsPath`: a cgroup below [`CGROUP`], in its plain spelling.
///
/// # Errors
/// If it is another one: the VM's services have theirs beside it, and what bounds all containers together ends there.
pub fn check_cgroup(path: &str) -> Result<(), ContainerError> {
    let error = || ContainerError::Cgroup(shortened(path));
    let below = path.strip_prefix(CGROUP).and_then(|rest| rest.strip_prefix('/')).ok_or_else(error)?;
    // crun appends the text to the path of the file system, where `..` would lead out of it.
    let plain = Path::new(below).components().all(|part| matches!(part, Component::Normal(_)));
    // `components` skips empty and single-dot parts; a text that has any is not dockerd's.
    let clean = below.split('/').all(|part| !part.is_empty() && part != ".") && !below.contains(['\0', '\n']);
    if plain && clean { Ok(()) } else { Err(error()) }
}

/// The hook by which dockerd connects a container's network namespace to its network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineHook {
    /// The id of dockerd's process.
    pub pid: u32,
    /// The container, or the build step's network.
    pub container: String,
}

/// Parses a hook, which must have the form of dockerd's own: `/proc/PID/exe` with [`SETKEY`] and three arguments.
///
/// The process with this id has still to be looked at.
///
/// # Errors
/// If it has another form.
pub fn engine_hook(hook: &Value) -> Result<EngineHook, ContainerError> {
    let path = hook["path"].as_str().unwrap_or_default();
    let parse = || {
        // An environment or a time limit would change what the program does.
        if hook.as_object()?.keys().any(|key| key != "path" && key != "args") {
            return None;
        }
        let pid = path.strip_prefix("/proc/")?.strip_suffix("/exe")?;
        // `parse` would also take `+1` and leading zeros.
        let pid = Some(pid).filter(|pid| pid.bytes().all(|b| b.is_ascii_digit()) && !pid.starts_with('0'))?;
        let args: Vec<&str> = hook["args"].as_array()?.iter().map(Value::as_str).collect::<Option<_>>()?;
        let [SETKEY, root, container, controller] = args[..] else { return None };
        let is_id = |id: &str| id.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let fits = (1..=MAX_ID).contains(&container.len()) && controller.len() == CONTROLLER_LENGTH;
        (EXEC_ROOTS.contains(&root) && fits && is_id(container) && is_id(controller))
            .then(|| Some(EngineHook { pid: pid.parse().ok()?, container: container.to_owned() }))?
    };
    parse().ok_or_else(|| ContainerError::Hook(shortened(path)))
}

/// A client's text for a log.
fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn hook() -> Value {
        let args = ["libnetwork-setkey", "-exec-root=/var/run/docker", &"a1".repeat(32), "0123456789ab"];
        json!({ "path": "/proc/123/exe", "args": args })
    }

    #[test]
    fn cgroups_of_containers_and_build_steps_are_allowed() {
        for path in ["/docker/0123", "/docker/buildkit/abc", "/docker/group/0123"] {
            assert_eq!(check_cgroup(path), Ok(()), "{path}");
        }
    }

    #[test]
    fn cgroups_beside_containers_and_paths_out_of_the_file_system_are_refused() {
        for path in [
            "",
            "/",
            "/docker",
            "/docker/",
            "/dockerx/0123",
            "/system/t14/0123",
            "../../../tmp/t14/0123",
            "docker/0123",
            "/docker/../system/0123",
            "/docker//0123",
            "/docker/./0123",
            "/docker/a\n",
            "system.slice:docker:0123",
        ] {
            assert_eq!(check_cgroup(path), Err(ContainerError::Cgroup(path.to_owned())), "{path:?}");
        }
    }

    #[test]
    fn limits_that_grant_a_priority_are_not_allowed() {
        assert!(is_allowed_rlimit("RLIMIT_NOFILE") && is_allowed_rlimit("RLIMIT_NPROC"));
        for name in ["RLIMIT_RTPRIO", "RLIMIT_NICE", "RLIMIT_", "rlimit_nofile", "NOFILE"] {
            assert!(!is_allowed_rlimit(name), "{name}");
        }
    }

    #[test]
    fn annotations_that_a_runtime_acts_on_are_not_allowed() {
        assert!(is_allowed_annotation("org.opencontainers.image.title"));
        for key in ["run.oci.handler", "module.wasm.image/variant", "krun.x", "org.systemd.property.X", "io.other", ""]
        {
            assert!(!is_allowed_annotation(key), "{key}");
        }
    }

    #[test]
    fn the_engines_own_hook_is_understood() {
        assert_eq!(engine_hook(&hook()), Ok(EngineHook { pid: 123, container: "a1".repeat(32) }));
    }

    #[test]
    fn a_hook_of_any_other_form_is_refused() {
        let changed = |key: &str, value: Value| {
            let mut hook = hook();
            hook[key] = value;
            hook
        };
        for path in ["/bin/sh", "/proc/self/exe", "/proc/1/root/bin/sh", "/proc/+1/exe", "/proc/01/exe", "/proc//exe"] {
            assert!(engine_hook(&changed("path", path.into())).is_err(), "{path}");
        }
        assert!(engine_hook(&changed("env", json!(["LD_PRELOAD=/x"]))).is_err());
        assert!(engine_hook(&changed("timeout", 1.into())).is_err());
        for (index, value) in [(0, "sh"), (0, "docker-untar"), (1, "-exec-root=/x"), (2, "../x"), (2, ""), (3, "x")] {
            let mut hook = hook();
            hook["args"][index] = value.into();
            assert!(engine_hook(&hook).is_err(), "{index} {value}");
        }
        let mut more = hook();
        more["args"].as_array_mut().unwrap().push("x".into());
        assert!(engine_hook(&more).is_err());
    }

    proptest! {
        #[test]
        fn no_allowed_cgroup_leads_out(path in "(/docker)?(/|\\.\\.|\\.|a|b|\n){0,8}") {
            if check_cgroup(&path).is_ok() {
                let parts: Vec<_> = Path::new(&path).components().skip(1).collect();
                prop_assert!(parts.len() >= 2 && parts.iter().all(|part| matches!(part, Component::Normal(_))));
                prop_assert_eq!(parts[0].as_os_str(), "docker");
            }
        }

        #[test]
        fn no_hook_panics_and_what_is_understood_is_a_process(path in "(/|proc|exe|[0-9]|\\+|\\.\\.){0,6}", args in proptest::collection::vec("[a-z0-9./-]{0,14}", 0..5)) {
            let mut hook = json!({ "path": path, "args": args });
            if let Ok(engine) = engine_hook(&hook) {
                prop_assert_eq!(format!("/proc/{}/exe", engine.pid), path.clone());
            }
            hook["args"] = super::tests::hook()["args"].clone();
            if let Ok(engine) = engine_hook(&hook) {
                prop_assert_eq!(format!("/proc/{}/exe", engine.pid), path);
            }
        }
    }
}
