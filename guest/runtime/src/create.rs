//! `create` and `run`: decide, prepare, rewrite, hand over.

use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use bulkhead_warden::{namespace, registry::Process};
use serde_json::Value;

use crate::{
    bind_mounts::{
        self, Context, Root,
        source_policy::{Asker, Policy},
    },
    cli::{Create, Globals},
    crun,
    error::Error,
    id_ranges::{self, Claim, Range, Record, Table},
    mountinfo::{self, Mount},
    refresh, rootfs, runc_errors, seccomp,
    spec::{
        self, SpecError,
        checks::{self, CheckError},
        devices, id_mappings, mounts,
        namespaces::{self, Joined},
        process::{self, Facts},
    },
    staging::Stage,
    sys, warden,
};

/// Where the table of ranges and the stage are; a tmpfs, since no container outlives the VM.
pub(crate) const STATE: &str = "/run/sysbox-runc";

/// The range of a new container, and whose user namespace it is.
#[derive(Debug)]
struct Identity {
    /// First id.
    start: u32,
    /// A user namespace with the container's id map.
    userns: OwnedFd,
    /// Which one that is.
    id: namespace::Identity,
    /// The containers that share it, this one included.
    containers: Vec<String>,
}

/// Has crun create the container, and returns how that ended; for `run` this process becomes crun.
pub(crate) fn create(globals: &Globals, request: &Create) -> Result<ExitCode, Error> {
    let bundle =
        fs::canonicalize(&request.bundle).map_err(|source| SpecError::Read { path: request.bundle.clone(), source })?;
    let mut spec = spec::load(&bundle)?;
    checks::check(&spec).map_err(SpecError::from)?;
    devices::restrict(&mut spec).map_err(SpecError::from)?;
    let joined = namespaces::open(&spec).map_err(SpecError::from)?;
    let binds = mounts::binds(&spec).map_err(SpecError::from)?;

    let path = bundle.join(spec["root"]["path"].as_str().unwrap_or("rootfs"));

    let table = Table::open(Path::new(STATE))?;
    let identity = identify(&table, globals, request, &path, &joined)?;
    // Everything from here on is opened in the namespace where it is going to be mounted from.
    let stage = Stage::enter(&Path::new(STATE).join("stage")).map_err(Error::system("prepare a mount namespace"))?;
    let mounts = read_mounts().map_err(Error::system("read the table of mounts"))?;
    let policy = Policy::default();
    let build = bundle.starts_with(policy.data_root.join("buildkit/executor"));
    let asker = Asker { containers: &identity.containers, build };
    let context = Context { policy: &policy, table: &mounts, asker, bundle: &bundle };
    let judged = bind_mounts::judge(&binds, context).map_err(SpecError::from)?;

    let root = rootfs::prepare(&stage, &path, &mounts, identity.userns.as_fd(), identity.start)?;
    spec::object(&mut spec, "root").insert("path".into(), root.to_string_lossy().into_owned().into());
    mounts::clean(&mut spec);
    let covers = mounts::covers(&spec, &binds);
    let others = mounts::others(&spec, &binds, &covers);
    let place = Root::open(&root, identity.start, &others).map_err(Error::system("open the container's root"))?;
    let mut placed = Vec::new();
    let mut covers = covers.iter().peekable();
    for bind in &judged {
        while let Some(cover) = covers.next_if(|cover| cover.index < bind.index()) {
            bind_mounts::place_cover(cover, &place, identity.userns.as_fd()).map_err(Error::system("mount a tmpfs"))?;
            placed.push(cover.index);
        }
        match bind.place(&stage, &place, identity.userns.as_fd()).map_err(SpecError::from)? {
            Some(staged) => mounts::hand_over(&mut spec, bind.index(), &staged),
            None => placed.push(bind.index()),
        }
    }
    mounts::remove(&mut spec, &placed);
    let state_root = std::path::absolute(globals.state_root()).map_err(Error::system("find the state directory"))?;
    warden::attach(&mut spec, &request.id, &state_root, identity.start, identity.id)?;
    if spec["root"]["readonly"] == true {
        place.freeze(&rootfs::top(&stage), &others).map_err(Error::system("make the container's root read-only"))?;
    }
    drop(place);
    // The engine looked into its own mount of the root before; what it cached must not outlive what is written next.
    let _ = refresh::forget(&path);

    let paths = joined.paths(identity.userns.as_fd()).map_err(Error::system("keep a namespace open"))?;
    namespaces::rewrite(&mut spec, &paths);
    id_mappings::map(&mut spec, identity.start);
    process::adapt(&mut spec, facts());
    let config = stage.path("config.json");
    write_config(&config, &spec).map_err(Error::system("write the rewritten config.json"))?;
    crun::shield_null().map_err(Error::system("make a null device"))?;
    seccomp::confine().map_err(Error::system("close vsock to the container"))?;

    let mut args: Vec<OsString> = globals.for_crun.clone();
    args.push(request.verb.into());
    args.extend(request.options.iter().cloned());
    args.extend(["--bundle".into(), bundle.into(), "--config".into(), config.into(), "--".into()]);
    args.push(request.id.clone().into());
    if request.verb == "run" {
        let never = crun::exec(&args)?;
        match never {}
    }
    let status = crun::run(&args)?;
    if let Some(message) = globals.log.json().filter(|_| status != ExitCode::SUCCESS).and_then(runc_errors::of_log) {
        return Err(Error::Told(message));
    }
    Ok(status)
}

/// Finds the container's range: its own, or that of the container whose namespaces it joins.
fn identify(
    table: &Table,
    globals: &Globals,
    request: &Create,
    path: &Path,
    joined: &Joined,
) -> Result<Identity, Error> {
    let state_root = std::path::absolute(globals.state_root()).map_err(Error::system("find the state directory"))?;
    let creator = Process::find(std::process::id())
        .ok_or_else(|| Error::system("read /proc")(io::Error::from(io::ErrorKind::NotFound)))?;
    let new = Claim { id: request.id.clone(), state_root, root: path.to_owned(), creator };
    let locked = table.lock()?;
    let living = locked.living(Record::lives)?;
    let Some(owner) = &joined.owner else {
        let start = id_ranges::lowest_free(&living)?;
        let userns = sys::new_userns(start, id_ranges::LENGTH).map_err(Error::system("make a user namespace"))?;
        let id = namespace::Identity::of(&userns).map_err(Error::system("stat a user namespace"))?;
        let record = locked.store(new, Range { start, userns: id }, &living)?;
        return Ok(Identity { start, userns, id, containers: vec![record.id] });
    };
    let foreign = || Error::Spec(CheckError::Foreign("user".into()).into());
    let range = living.iter().map(|r| r.range).find(|range| range.userns == owner.id).ok_or_else(foreign)?;
    let record = locked.store(new, range, &living)?;
    let others = living.into_iter().filter(|r| r.range == range).map(|r| r.id);
    let containers = others.chain([record.id]).collect();
    let userns = owner.fd.try_clone().map_err(Error::system("keep a namespace open"))?;
    Ok(Identity { start: range.start, userns, id: owner.id, containers })
}

fn read_mounts() -> io::Result<Vec<Mount>> {
    let mut table = Vec::new();
    File::open("/proc/self/mountinfo")?.take(mountinfo::MAX_TABLE).read_to_end(&mut table)?;
    Ok(mountinfo::parse(&table))
}

fn facts() -> Facts {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Facts {
        apparmor: read("/sys/module/apparmor/parameters/enabled").starts_with('Y'),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
    }
}

/// The stage is private and empty, so the file needs no temporary name.
fn write_config(path: &PathBuf, spec: &Value) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(spec)?)
}
