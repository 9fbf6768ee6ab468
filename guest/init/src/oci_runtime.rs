//! Which program stands behind each OCI runtime's path.
//!
//! dockerd and BuildKit find runtimes by well-known names; with isolation on, each of these names is the isolating
//! runtime, and the program that it drives is reachable under a path of its own only.

use std::{
    fs,
    path::{Path, PathBuf},
};

use nix::mount::MsFlags;

use crate::{config::ISOLATING_RUNTIME_PATH, error::Error, mounts};

/// Where the isolating runtime finds the real crun.
const REAL_CRUN: &str = "/usr/libexec/bulkhead/crun";

const SEARCH_PATH: [&str; 6] = ["/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"];

/// The distinct files, links resolved, that `name` can be found as.
fn resolve_all(folders: &[&str], name: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        folders.iter().filter_map(|folder| fs::canonicalize(Path::new(folder).join(name)).ok()).collect();
    found.sort();
    found.dedup();
    found
}

/// Makes [`REAL_CRUN`] the real crun, unless the image has it there.
fn keep_crun(real: Option<&PathBuf>) -> Result<(), Error> {
    if fs::metadata(REAL_CRUN).is_ok_and(|meta| meta.is_file() && meta.len() > 0) {
        return Ok(());
    }
    let real = real.ok_or(Error::MissingProgram { name: "crun" })?;
    let real_crun = Path::new(REAL_CRUN);
    if !real_crun.exists() {
        mounts::overlay("/usr/libexec")?;
        mounts::make_directory("/usr/libexec/bulkhead", 0o755)?;
        fs::File::create(real_crun).map_err(Error::file("make", REAL_CRUN))?;
    }
    mounts::bind(real, real_crun)
}

/// Puts the isolating runtime behind every runtime's name.
pub(crate) fn isolate() -> Result<(), Error> {
    let isolating = Path::new(ISOLATING_RUNTIME_PATH);
    if !isolating.is_file() {
        return Err(Error::MissingProgram { name: "sysbox-runc" });
    }
    let crun = resolve_all(&SEARCH_PATH, "crun");
    keep_crun(crun.first())?;
    for path in resolve_all(&SEARCH_PATH, "runc").iter().chain(&crun) {
        mounts::bind(isolating, path)?;
        // A bind mount can't be made read-only in one call.
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mounts::propagation(&path.to_string_lossy(), flags)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linked_folders_count_once_and_every_other_copy_counts() {
        let root = tempfile::tempdir().unwrap();
        let folder = |name: &str| root.path().join(name).to_string_lossy().into_owned();
        for name in ["one", "two"] {
            fs::create_dir(folder(name)).unwrap();
            fs::write(root.path().join(name).join("runc"), "").unwrap();
        }
        std::os::unix::fs::symlink(folder("one"), folder("link")).unwrap();
        let folders = [folder("one"), folder("link"), folder("two"), folder("none")];
        let found = resolve_all(&folders.each_ref().map(String::as_str), "runc");
        let root = root.path().canonicalize().unwrap();
        assert_eq!(found, [root.join("one/runc"), root.join("two/runc")]);
    }
}
