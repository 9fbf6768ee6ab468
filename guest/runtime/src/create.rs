//! `create` and `run`: check a bundle, prepare its mounts, rewrite its config.json and hand over to crun.
//!
//! The order of the steps is part of the protection:
//!
//! 1. The spec is checked before anything is made, so a refusal leaves nothing behind.
//! 2. The container gets its user namespace next, because everything that is mounted is id-mapped to it.
//! 3. Sources are opened in the mount namespace in which the container is assembled, and all of them are verified
//!    before the first one is mounted.
//! 4. Binds are mounted, and a read-only root is made so, before crun creates the container's own mount namespace: the
//!    kernel locks what is there by then.
//! 5. The seccomp filter is installed just before crun, which inherits it, as does every process of the container.
//! 6. The network is judged when the engine has connected it and before the container's first process runs.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use bulkhead_guest_common::{bounded, mountinfo, namespace, process::Process};
use serde_json::Value;

use crate::{
    bind_mounts::{
        self, VerifiedBind, VerifyContext,
        container_root::ContainerRoot,
        source_policy::{Requester, SourcePolicy},
    },
    cli::{CreateRequest, GlobalOptions},
    crun,
    error::Error,
    id_ranges::{self, Claim, IdRange, IdRangeTable, RangeError, Record},
    network, procfs, rootfs, runc_errors, seccomp,
    spec::{
        self, SpecError,
        checks::CheckError,
        id_mappings,
        mounts::{self, TmpfsMount},
        namespaces::{self, JoinedNamespaces},
        process::{self, LsmSupport},
    },
    staging::StagingArea,
    sys,
};

/// The directory of the table of id ranges and of the staging area; a tmpfs, since no container outlives the VM.
pub(crate) const STATE_DIR: &str = "/run/sysbox-runc";

/// The size limit of the table of mounts in bytes.
const MAX_MOUNTINFO: u64 = 64 << 20;

/// A container's user namespace and the id range that it maps.
#[derive(Debug)]
struct ContainerUserns {
    /// The id that the container's root has in the VM.
    first_id: u32,
    fd: OwnedFd,
    id: namespace::Identity,
    /// The containers that share it, this one last.
    containers: Vec<String>,
}

/// Has crun create the container, and returns how that ended; for `run` this process becomes crun.
pub(crate) fn create(globals: &GlobalOptions, request: &CreateRequest) -> Result<ExitCode, Error> {
    // Without links: where the bundle really is decides below whether this is a build step.
    let bundle =
        fs::canonicalize(&request.bundle).map_err(|source| SpecError::Read { path: request.bundle.clone(), source })?;
    let mut spec = spec::load(&bundle)?;
    let policy = SourcePolicy::default();
    // Only dockerd and BuildKit write below the data directory: a client cannot make its bundle look like a build step.
    let is_build = bundle.starts_with(policy.data_root.join("buildkit/executor"));
    spec::judge(&mut spec, (!is_build).then_some(request.id.as_str()))?;
    let joined = namespaces::open(&spec).map_err(SpecError::from)?;
    let binds = mounts::binds(&spec).map_err(SpecError::from)?;

    let engine_root = bundle.join(spec["root"]["path"].as_str().unwrap_or("rootfs"));
    let table = IdRangeTable::open(Path::new(STATE_DIR))?;
    let state_root = std::path::absolute(globals.state_root()).map_err(Error::system("find the state directory"))?;
    let userns = assign_userns(&table, &state_root, request, &joined)?;

    let staging =
        StagingArea::enter(&Path::new(STATE_DIR).join("stage")).map_err(Error::system("prepare a mount namespace"))?;
    // Mount ids differ from one mount namespace to the next, so the table and all sources are read in this one.
    let mounts =
        bounded::read_file("/proc/self/mountinfo", MAX_MOUNTINFO).map_err(Error::system("read the table of mounts"))?;
    let mounts: Vec<_> = mountinfo::parse(&mounts).collect();
    let requester = Requester { containers: &userns.containers, is_build };
    let context = VerifyContext { policy: &policy, mounts: &mounts, requester, bundle: &bundle };
    let mut verified = bind_mounts::verify(&binds, context).map_err(SpecError::from)?;
    bind_mounts::separate_engine_files(&mut verified, &staging, userns.fd.as_fd(), userns.first_id)?;

    let root = rootfs::prepare(&staging, &engine_root, userns.fd.as_fd())?;
    spec::object(&mut spec, "root").insert("path".into(), root.to_string_lossy().into_owned().into());
    mounts::drop_crun_extensions(&mut spec);
    mounts::bound_terminals(&mut spec);
    let tmpfs_mounts = mounts::premounted_tmpfs(&spec, &binds);
    let crun_destinations = mounts::crun_destinations(&spec, &binds, &tmpfs_mounts);
    let container_root = ContainerRoot::open(&root, userns.first_id, &crun_destinations)
        .map_err(Error::system("open the container's root"))?;
    mount_in_order(&mut spec, &staging, &container_root, userns.fd.as_fd(), &tmpfs_mounts, &verified)?;
    // The entries that this adds go onto the procfs and sysfs that crun mounts, so crun mounts them, too.
    procfs::attach(&mut spec, &request.id, &state_root, userns.first_id, userns.id)?;
    if spec["root"]["readonly"] == true {
        container_root.freeze(&crun_destinations).map_err(Error::system("make the container's root read-only"))?;
    }
    drop(container_root);

    // crun gets descriptors instead of the spec's paths. They survive execve(2), by which `run` becomes crun, and
    // fork(2).
    let has_own_network = network::is_own(&spec);
    let paths = joined.paths(userns.fd.as_fd()).map_err(Error::system("keep a namespace open"))?;
    namespaces::rewrite(&mut spec, &paths);
    id_mappings::map(&mut spec, userns.first_id);
    process::adapt(&mut spec, LsmSupport::detect());
    let config = staging.path("config.json");
    write_config(&config, &spec).map_err(Error::system("write the rewritten config.json"))?;
    crun::use_private_null().map_err(Error::system("create a null device"))?;
    seccomp::confine().map_err(Error::system("install the seccomp filter that refuses vsock"))?;
    let status = hand_over(globals, request, bundle, config)?;
    if has_own_network && status == ExitCode::SUCCESS {
        judge_network(globals, &request.id, &state_root)?;
    }
    Ok(status)
}

/// Judges what the engine has connected the created container to, and deletes a container that cannot stay.
fn judge_network(globals: &GlobalOptions, id: &str, state_root: &Path) -> Result<(), Error> {
    network::judge(&state_root.join(id)).or_else(|error| {
        crun::delete(globals.for_crun(), id)?;
        Err(error.into())
    })
}

/// Mounts the tmpfs and the binds that this program mounts itself, in the order of the spec's list.
///
/// In another order a bind would be hidden by the tmpfs that it goes onto, or a bind by the one below it.
fn mount_in_order(
    spec: &mut Value,
    staging: &StagingArea,
    root: &ContainerRoot,
    userns: BorrowedFd<'_>,
    tmpfs_mounts: &[TmpfsMount],
    verified: &[VerifiedBind<'_>],
) -> Result<(), Error> {
    let mut mounted = Vec::new();
    let mut tmpfs_mounts = tmpfs_mounts.iter().peekable();
    for bind in verified {
        while let Some(tmpfs) = tmpfs_mounts.next_if(|tmpfs| tmpfs.index < bind.index()) {
            root.mount_tmpfs(tmpfs, userns).map_err(Error::system("mount a tmpfs"))?;
            mounted.push(tmpfs.index);
        }
        match bind.mount(staging, root, userns).map_err(SpecError::from)? {
            Some(staged) => mounts::bind_staged(spec, bind.index(), &staged),
            None => mounted.push(bind.index()),
        }
    }
    // Entries are addressed by their position until here, so the list shrinks only now.
    mounts::remove_mounted(spec, &mounted);
    Ok(())
}

/// Runs crun with the arguments that were understood and the rewritten config.json.
fn hand_over(
    globals: &GlobalOptions,
    request: &CreateRequest,
    bundle: PathBuf,
    config: PathBuf,
) -> Result<ExitCode, Error> {
    let mut args: Vec<OsString> = globals.for_crun();
    args.push(request.verb.into());
    args.extend(request.options.iter().cloned());
    // The bundle's own config.json stays as the engine wrote it.
    args.extend(["--bundle".into(), bundle.into(), "--config".into(), config.into(), "--".into()]);
    args.push(request.id.clone().into());
    if request.verb == "run" {
        let never = crun::exec(&args)?;
        match never {}
    }
    // `create` waits for crun, so that an error of crun's can be reported in other words.
    let status = crun::run(&args)?;
    if let Some(message) = globals.log.json().filter(|_| status != ExitCode::SUCCESS).and_then(runc_errors::of_log) {
        return Err(Error::Translated(message));
    }
    Ok(status)
}

/// Gives the container a user namespace: a new one with a free range, or that of the container whose namespaces it
/// joins.
fn assign_userns(
    table: &IdRangeTable,
    state_root: &Path,
    request: &CreateRequest,
    joined: &JoinedNamespaces,
) -> Result<ContainerUserns, Error> {
    // The record counts as long as this process lives; crun's state directory proves the container's life after that.
    let creator = Process::find(std::process::id())
        .ok_or_else(|| Error::system("read /proc")(io::Error::from(io::ErrorKind::NotFound)))?;
    let new = Claim { id: request.id.clone(), state_root: state_root.to_owned(), creator };
    // Held until `store`, else another container could find the same range free.
    let locked = table.lock()?;
    let living = locked.living(Record::lives)?;
    let Some(owner) = &joined.owner else {
        let (start, fd) = new_userns(&living)?;
        let id = namespace::Identity::of(&fd).map_err(Error::system("stat a user namespace"))?;
        let record = locked.store(new, IdRange { start, userns: id }, &living)?;
        let containers = vec![record.id];
        return Ok(ContainerUserns { first_id: start, fd, id, containers });
    };
    // A user namespace that is in no record was made by a program of the VM or inside a container: its map is unknown.
    let not_isolated = || Error::Spec(CheckError::NotIsolated("user".into()).into());
    let range = living.iter().map(|r| r.range).find(|range| range.userns == owner.id).ok_or_else(not_isolated)?;
    let record = locked.store(new, range, &living)?;
    // A container that shares a user namespace could enter the others' namespaces anyway, so it may also have their
    // files.
    let others = living.into_iter().filter(|r| r.range == range).map(|r| r.id);
    let containers = others.chain([record.id]).collect();
    let fd = owner.fd.try_clone().map_err(Error::system("keep a namespace open"))?;
    Ok(ContainerUserns { first_id: range.start, fd, id: owner.id, containers })
}

/// Makes a user namespace with the lowest range that is free by the table and by the kernel.
fn new_userns(living: &[Record]) -> Result<(u32, OwnedFd), Error> {
    for start in id_ranges::free(living) {
        // A range in use that no record names: the table was lost. The container in it keeps its ids for itself.
        let made = sys::new_userns(start, id_ranges::LENGTH).map_err(Error::system("make a user namespace"))?;
        if let Some(fd) = made {
            return Ok((start, fd));
        }
    }
    Err(RangeError::Exhausted.into())
}

/// Writes the rewritten spec; the staging area is private, so no other process can see the file half-written.
fn write_config(path: &PathBuf, spec: &Value) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(spec)?)
}
