//! The settings that a spec may have: those that the engine and BuildKit write.
//!
//! A setting of any other name is refused. It would reach crun without anybody having thought about it, and leaving it
//! out could leave out a restriction that a user relies on. The lists are those of the engine in the image, which is
//! installed together with this program.

use serde_json::Value;

/// A setting that the engine does not write.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the setting {0} is not supported; leave it out")]
pub(crate) struct KeyError(String);

/// The objects of a spec and the keys that each may have, in OCI runtime specification 1.2.
///
/// The path has the keys that lead to the object; `*` stands for each entry of a list.
const ALLOWED: [(&[&str], &[&str]); 12] = [
    (&[], &["annotations", "domainname", "hooks", "hostname", "linux", "mounts", "ociVersion", "process", "root"]),
    (&["root"], &["path", "readonly"]),
    (&["mounts", "*"], &["destination", "gidMappings", "options", "source", "type", "uidMappings"]),
    (
        &["process"],
        // Not `scheduler` and `ioPriority`: both can put the container before everything else in the VM.
        &[
            "apparmorProfile",
            "args",
            "capabilities",
            "consoleSize",
            "cwd",
            "env",
            "noNewPrivileges",
            "oomScoreAdj",
            "rlimits",
            "selinuxLabel",
            "terminal",
            "user",
        ],
    ),
    (&["process", "user"], &["additionalGids", "gid", "uid", "umask", "username"]),
    (&["process", "capabilities"], &["ambient", "bounding", "effective", "inheritable", "permitted"]),
    // Engines write `prestart` only; the entries are judged in [`super::hooks`].
    (&["hooks"], &["prestart"]),
    (
        &["linux"],
        &[
            "cgroupsPath",
            "devices",
            "gidMappings",
            "maskedPaths",
            "mountLabel",
            "namespaces",
            "readonlyPaths",
            "resources",
            "rootfsPropagation",
            "seccomp",
            "sysctl",
            "uidMappings",
        ],
    ),
    (&["linux", "namespaces", "*"], &["path", "type"]),
    (&["linux", "devices", "*"], &["fileMode", "gid", "major", "minor", "path", "type", "uid"]),
    // Not `unified`, which names files of the cgroup.
    (&["linux", "resources"], &["blockIO", "cpu", "devices", "memory", "pids"]),
    (
        &["linux", "seccomp"],
        &["architectures", "defaultAction", "defaultErrnoRet", "flags", "listenerMetadata", "listenerPath", "syscalls"],
    ),
];

/// Refuses a spec with a setting that is not listed.
pub(crate) fn check(spec: &Value) -> Result<(), KeyError> {
    ALLOWED.iter().try_for_each(|(path, keys)| check_at(spec, path, keys, &mut Vec::new()))
}

/// Refuses a process with a setting that is not listed; `exec` gets one without a spec around it.
pub(crate) fn check_process(process: &Value) -> Result<(), KeyError> {
    let of_process = ALLOWED.iter().filter_map(|(path, keys)| Some((path.strip_prefix(&["process"])?, keys)));
    of_process.into_iter().try_for_each(|(path, keys)| check_at(process, path, keys, &mut vec!["process"]))
}

fn check_at<'a>(value: &Value, path: &[&'a str], keys: &[&str], above: &mut Vec<&'a str>) -> Result<(), KeyError> {
    let Some((first, rest)) = path.split_first() else {
        let is_other = |(key, value): &(&String, &Value)| !value.is_null() && !keys.contains(&key.as_str());
        return match value.as_object().into_iter().flatten().find(is_other) {
            // The name is a client's or a file's text and goes into a log.
            Some((key, _)) => {
                Err(KeyError(above.iter().copied().chain([key.get(..80).unwrap_or(key)]).collect::<Vec<_>>().join(".")))
            }
            None => Ok(()),
        };
    };
    if *first == "*" {
        return value.as_array().into_iter().flatten().try_for_each(|entry| check_at(entry, rest, keys, above));
    }
    above.push(first);
    let checked = check_at(&value[*first], rest, keys, above);
    above.pop();
    checked
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::spec::testing;

    #[test]
    fn what_engines_write_is_accepted() {
        assert_eq!(check(&testing::docker()), Ok(()));
        assert_eq!(check(&testing::build_step()), Ok(()));
        assert_eq!(check_process(&testing::docker()["process"]), Ok(()));
    }

    #[test]
    fn settings_that_no_engine_writes_are_refused_by_name() {
        for (pointer, key) in [
            ("", "solaris"),
            ("/process", "scheduler"),
            ("/process", "ioPriority"),
            ("/process/user", "x"),
            ("/linux", "personality"),
            ("/linux", "intelRdt"),
            ("/linux", "timeOffsets"),
            ("/linux", "netDevices"),
            ("/linux/resources", "unified"),
            ("/mounts/0", "x"),
            ("/hooks", "createRuntime"),
        ] {
            let mut spec = testing::docker();
            spec.pointer_mut(pointer).unwrap()[key] = json!({});
            let error = check(&spec).unwrap_err().to_string();
            assert!(error.contains(key), "{error}");
            // Absent to every reader.
            spec.pointer_mut(pointer).unwrap()[key] = Value::Null;
            assert_eq!(check(&spec), Ok(()), "{key}");
        }
        assert!(check_process(&json!({ "scheduler": {} })).unwrap_err().to_string().contains("process.scheduler"));
    }

    proptest! {
        #[test]
        fn no_json_panics(spec in testing::any_json()) {
            let _ = check(&spec);
            let _ = check_process(&spec);
        }
    }
}
