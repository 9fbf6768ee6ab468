//! `exec`: another process in a container.
//!
//! The container was checked when it was created. The process brings settings of its own: limits, an OOM score and the
//! like, which the engine takes from the container and from its own options. They are judged as those of the first
//! process.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs::File,
    io::{self, Write},
    os::fd::AsRawFd,
    path::Path,
};

use rustix::fs::MemfdFlags;

use crate::{
    cli::{ExecRequest, GlobalOptions},
    create::STATE_DIR,
    crun,
    error::Error,
    id_ranges::IdRangeTable,
    seccomp, spec, sys,
};

/// Becomes crun, which runs the process.
pub(crate) fn exec(globals: &GlobalOptions, request: ExecRequest) -> Result<Infallible, Error> {
    let process = match &request.process {
        Some(path) => Some(judged(path)?),
        None => None,
    };
    if let Some(first_id) = first_id_of(globals, &request.id) {
        crun::chown_pipes(first_id);
    }
    crun::use_private_null().map_err(Error::system("create a null device"))?;
    // A process that enters a container does not inherit the filter of the container's first one.
    seccomp::confine().map_err(Error::system("install the seccomp filter that refuses vsock"))?;
    // The descriptor must live until crun has replaced this process.
    let path = process.as_ref().map(|file| OsString::from(format!("/proc/self/fd/{}", file.as_raw_fd())));
    let mut args = globals.for_crun();
    args.extend(request.for_crun(path));
    crun::exec(&args)
}

/// The adapted copy of a process file, in memory: nothing can change it any more, and nothing is left behind.
fn judged(path: &Path) -> Result<File, Error> {
    let process = spec::load_process(path)?;
    let write = || -> io::Result<File> {
        let mut file = File::from(rustix::fs::memfd_create(c"process", MemfdFlags::CLOEXEC)?);
        file.write_all(&serde_json::to_vec(&process)?)?;
        // crun opens it by its path, so where this descriptor stands does not matter.
        sys::keep_across_exec(&file)?;
        Ok(file)
    };
    write().map_err(Error::system("write the process's settings"))
}

/// The first id of a container's range, from the table.
fn first_id_of(globals: &GlobalOptions, id: &str) -> Option<u32> {
    let state_root = std::path::absolute(globals.state_root()).ok()?;
    // The id alone can be in use twice: BuildKit has a state directory of its own.
    let records = IdRangeTable::open(Path::new(STATE_DIR)).ok()?.named(id);
    records.iter().find(|record| record.state_root == state_root).map(|record| record.range.start)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};

    use super::*;

    #[test]
    fn the_copy_has_no_limit_that_raises_a_priority() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let limits = r#"[{"type":"RLIMIT_RTPRIO","soft":99,"hard":99},{"type":"RLIMIT_CORE","soft":0,"hard":0}]"#;
        std::fs::write(file.path(), format!(r#"{{"args":["id"],"oomScoreAdj":-1000,"rlimits":{limits}}}"#)).unwrap();
        let mut copy = judged(file.path()).unwrap();
        let mut text = String::new();
        copy.rewind().unwrap();
        copy.read_to_string(&mut text).unwrap();
        let process: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(process["oomScoreAdj"], -499);
        assert_eq!(process["rlimits"].as_array().unwrap().len(), 1);
        assert_eq!(process["args"][0], "id");
    }

    #[test]
    fn a_process_with_a_scheduler_and_a_file_that_is_no_json_are_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for text in [r#"{"scheduler":{"policy":"SCHED_FIFO"}}"#, "{", ""] {
            std::fs::write(file.path(), text).unwrap();
            assert!(judged(file.path()).is_err(), "{text}");
        }
    }
}
