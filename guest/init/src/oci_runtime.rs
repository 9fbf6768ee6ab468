//! The redirection of OCI runtimes to the isolating one.
//!
//! dockerd and BuildKit find runtimes by well-known names. With isolation on, each of these names is the isolating
//! runtime, and the crun that it executes has a path that neither of the two looks for.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{config::ISOLATING_RUNTIME_PATH, error::Error, mounts};

/// Path at which the isolating runtime finds the real crun.
const REAL_CRUN: &str = "/usr/libexec/bulkhead/crun";

/// Directories in which programs look for a runtime.
const SEARCH_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// Returns the distinct files, with links resolved, that `name` can be found as.
fn resolve_all(directories: &[&str], name: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        directories.iter().filter_map(|directory| fs::canonicalize(Path::new(directory).join(name)).ok()).collect();
    found.sort();
    found.dedup();
    found
}

/// Makes the real crun available as [`REAL_CRUN`], unless the image has it there.
fn keep_crun(real: Option<&PathBuf>) -> Result<(), Error> {
    // An empty file is only a mount point.
    if fs::metadata(REAL_CRUN).is_ok_and(|meta| meta.is_file() && meta.len() > 0) {
        return Ok(());
    }
    let real = real.ok_or(Error::MissingProgram { name: "crun" })?;
    let real_crun = Path::new(REAL_CRUN);
    // The root is read-only, so the mount point needs an overlay.
    if !real_crun.exists() {
        mounts::overlay("/usr/libexec")?;
        mounts::make_directory("/usr/libexec/bulkhead", 0o755)?;
        fs::File::create(real_crun).map_err(Error::file("create", REAL_CRUN))?;
    }
    mounts::bind(real, real_crun)
}

/// Mounts the isolating runtime over every program named `runc` or `crun`.
pub(crate) fn isolate() -> Result<(), Error> {
    let isolating = Path::new(ISOLATING_RUNTIME_PATH);
    if !isolating.is_file() {
        return Err(Error::MissingProgram { name: "sysbox-runc" });
    }
    // First, while the name still leads to the real one.
    let crun = resolve_all(&SEARCH_PATH, "crun");
    keep_crun(crun.first())?;
    for path in resolve_all(&SEARCH_PATH, "runc").iter().chain(&crun) {
        mounts::bind(isolating, path)?;
        // mount(2) ignores MS_RDONLY when it makes a bind mount; that takes a second call.
        mounts::make_read_only(&path.to_string_lossy())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linked_directories_count_once_and_every_other_copy_counts() {
        let root = tempfile::tempdir().unwrap();
        let directory = |name: &str| root.path().join(name).to_string_lossy().into_owned();
        for name in ["one", "two"] {
            fs::create_dir(directory(name)).unwrap();
            fs::write(root.path().join(name).join("runc"), "").unwrap();
        }
        std::os::unix::fs::symlink(directory("one"), directory("link")).unwrap();
        let directories = [directory("one"), directory("link"), directory("two"), directory("none")];
        let found = resolve_all(&directories.each_ref().map(String::as_str), "runc");
        let root = root.path().canonicalize().unwrap();
        assert_eq!(found, [root.join("one/runc"), root.join("two/runc")]);
    }
}
