//! Hooks: programs that crun runs outside the container, as the VM's root.
//!
//! The engine needs one, to connect the container's network namespace. Any other would come from a file that the
//! engine's options let it read (the Container Device Interface), and such a file can be a container's.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use bulkhead_policy::containers::{ContainerError, engine_hook};
use serde_json::Value;

/// The engine's program, on the read-only root of the VM.
const ENGINE: &str = "/usr/sbin/dockerd";

/// Refuses every hook but the engine's own, and has that one run the engine's program by its path.
///
/// `container` is the one that the hook must be about; `None` for a build step, whose network has an id of its own.
pub(crate) fn restrict(spec: &mut Value, container: Option<&str>) -> Result<(), ContainerError> {
    restrict_to(spec, container, Path::new(ENGINE))
}

fn restrict_to(spec: &mut Value, container: Option<&str>, engine: &Path) -> Result<(), ContainerError> {
    let Some(hooks) = spec.get_mut("hooks").and_then(Value::as_object_mut) else { return Ok(()) };
    for (stage, hooks) in hooks {
        for hook in hooks.as_array_mut().into_iter().flatten() {
            let path = hook["path"].as_str().unwrap_or_default().to_owned();
            let own = engine_hook(hook)?;
            let is_own = stage == "prestart" && container.is_none_or(|id| id == own.container);
            if !is_own || !runs(own.pid, engine) {
                return Err(ContainerError::Hook(path));
            }
            // Another process could have the number by the time that crun starts the hook. The program is the same, and
            // knows by its first argument what to do.
            hook["path"] = engine.to_string_lossy().into();
        }
    }
    Ok(())
}

/// True if the process runs the program.
fn runs(pid: u32, program: &Path) -> bool {
    let identity = |path: PathBuf| fs::metadata(path).map(|file| (file.dev(), file.ino()));
    match (identity(format!("/proc/{pid}/exe").into()), identity(program.to_owned())) {
        (Ok(running), Ok(program)) => running == program,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_guest_common::error::chain;
    use serde_json::json;

    use super::*;

    const CONTAINER: &str = "c0ffee";

    fn spec(stage: &str, pid: u32) -> Value {
        let args = ["libnetwork-setkey", "-exec-root=/var/run/docker", CONTAINER, "0123456789ab"];
        json!({ "hooks": { stage: [{ "path": format!("/proc/{pid}/exe"), "args": args }] } })
    }

    fn restricted(mut spec: Value, container: Option<&str>) -> Result<Value, ContainerError> {
        restrict_to(&mut spec, container, &std::env::current_exe().unwrap()).map(|()| spec)
    }

    #[test]
    fn the_hook_of_the_engines_process_runs_the_engines_program_by_its_path() {
        for container in [Some(CONTAINER), None] {
            let spec = restricted(spec("prestart", std::process::id()), container).unwrap();
            assert_eq!(spec["hooks"]["prestart"][0]["path"], *std::env::current_exe().unwrap().to_string_lossy());
            assert_eq!(spec["hooks"]["prestart"][0]["args"][2], CONTAINER);
        }
    }

    #[test]
    fn the_same_hook_of_another_process_stage_or_container_is_refused() {
        let own = std::process::id();
        // No process has this id, and the parent runs another program.
        for pid in [u32::MAX, std::os::unix::process::parent_id()] {
            assert!(restricted(spec("prestart", pid), None).is_err());
        }
        assert!(restricted(spec("poststop", own), None).is_err());
        assert!(restricted(spec("prestart", own), Some("other")).is_err());
    }

    #[test]
    fn a_foreign_hook_is_refused_by_name() {
        let spec = json!({ "hooks": { "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", "id"] }] } });
        let error = crate::spec::SpecError::from(restricted(spec, None).unwrap_err());
        assert!(chain(&error).contains("the hook \"/bin/sh\" is not allowed"), "{}", chain(&error));
    }

    #[test]
    fn a_spec_without_hooks_stays_as_it_is() {
        for spec in [json!({}), json!({ "hooks": null }), json!({ "hooks": { "prestart": null } })] {
            assert_eq!(restricted(spec.clone(), Some(CONTAINER)).unwrap(), spec);
        }
    }
}
