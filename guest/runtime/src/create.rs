//! `create` and `run`: decide, prepare, rewrite, hand over.

use std::{
    convert::Infallible,
    ffi::OsString,
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::process::{Resource, Rlimit};
use serde_json::Value;

use crate::{
    binds::{self, Context},
    cli::{Create, Globals},
    crun,
    error::Error,
    mountinfo::{self, Mount},
    paths::{Asker, Policy},
    ranges::{self, Process, Record, Table},
    root,
    spec::{
        self, SpecError,
        checks::{self, CheckError},
        ids, mounts,
        namespaces::{self, Joined, NamespaceId},
        process::{self, Facts, Limit},
    },
    stage::Stage,
    sys,
};

/// Where the table of ranges and the stage are; a tmpfs, since no container outlives the VM.
pub(crate) const STATE: &str = "/run/sysbox-runc";

/// Longest state file of crun that is read, in bytes.
const MAX_STATUS: u64 = 1 << 20;

/// The range of a new container, and whose user namespace it is.
#[derive(Debug)]
struct Identity {
    /// First id.
    start: u32,
    /// A user namespace with the container's id map.
    userns: OwnedFd,
    /// The containers that share it, this one included.
    containers: Vec<String>,
}

/// Turns this process into crun creating the container; returns only on failure.
pub(crate) fn create(globals: &Globals, request: &Create) -> Result<Infallible, Error> {
    let bundle =
        fs::canonicalize(&request.bundle).map_err(|source| SpecError::Read { path: request.bundle.clone(), source })?;
    let mut spec = spec::load(&bundle)?;
    checks::check(&spec).map_err(SpecError::from)?;
    let joined = namespaces::open(&spec).map_err(SpecError::from)?;
    let binds = mounts::binds(&spec).map_err(SpecError::from)?;

    let table = Table::open(Path::new(STATE))?;
    let identity = identify(&table, globals, request, &joined)?;
    // Everything from here on is opened in the namespace where it is going to be mounted from.
    let stage = Stage::enter(&Path::new(STATE).join("stage")).map_err(Error::system("prepare a mount namespace"))?;
    let mounts = read_mounts().map_err(Error::system("read the table of mounts"))?;
    let policy = Policy::default();
    let build = bundle.starts_with(policy.data_root.join("buildkit/executor"));
    let asker = Asker { containers: &identity.containers, build };
    let context = Context { policy: &policy, table: &mounts, asker, bundle: &bundle };
    let judged = binds::judge(&binds, context).map_err(SpecError::from)?;

    let path = bundle.join(spec["root"]["path"].as_str().unwrap_or("rootfs"));
    let root = root::prepare(&stage, &path, &mounts, identity.userns.as_fd(), identity.start)?;
    spec::object(&mut spec, "root").insert("path".into(), root.to_string_lossy().into_owned().into());
    mounts::clean(&mut spec);
    for bind in &judged {
        let source = bind.place(&stage, identity.userns.as_fd()).map_err(SpecError::from)?;
        mounts::set_source(&mut spec, bind.index(), &source);
    }

    let paths = joined.paths().map_err(Error::system("keep a namespace open"))?;
    namespaces::rewrite(&mut spec, &paths);
    ids::map(&mut spec, identity.start);
    process::adapt(&mut spec, facts());
    raise_limits(&process::limits(&spec));
    let config = stage.path("config.json");
    write_config(&config, &spec).map_err(Error::system("write the rewritten config.json"))?;
    crun::own_streams(identity.start);

    let mut args: Vec<OsString> = globals.for_crun.clone();
    args.push(request.verb.into());
    args.extend(request.options.iter().cloned());
    args.extend(["--bundle".into(), bundle.into(), "--config".into(), config.into(), "--".into()]);
    args.push(request.id.clone().into());
    crun::exec(&args)
}

/// Finds the container's range: its own, or that of the container whose namespaces it joins.
fn identify(table: &Table, globals: &Globals, request: &Create, joined: &Joined) -> Result<Identity, Error> {
    let state_root = std::path::absolute(globals.state_root()).map_err(Error::system("find the state directory"))?;
    let creator = Process::find(std::process::id())
        .ok_or_else(|| Error::system("read /proc")(io::Error::from(io::ErrorKind::NotFound)))?;
    let new = Record { id: request.id.clone(), state_root, start: 0, creator };
    let locked = table.lock()?;
    let Some(owner) = &joined.owner else {
        let record = locked.claim(new, Record::lives)?;
        let userns = sys::new_userns(record.start, ranges::LENGTH).map_err(Error::system("make a user namespace"))?;
        return Ok(Identity { start: record.start, userns, containers: vec![record.id] });
    };
    let living = locked.living(Record::lives)?;
    let foreign = || Error::Spec(CheckError::Foreign("user".into()).into());
    let start = living.iter().find(|r| user_namespace_of(r) == Some(owner.id)).map(|r| r.start).ok_or_else(foreign)?;
    let record = locked.share(Record { start, ..new }, Record::lives)?;
    let others = living.into_iter().filter(|r| r.start == start).map(|r| r.id);
    let containers = others.chain([record.id]).collect();
    let userns = owner.fd.try_clone().map_err(Error::system("keep a namespace open"))?;
    Ok(Identity { start, userns, containers })
}

/// The user namespace of a container's first process, as crun's state tells it.
fn user_namespace_of(record: &Record) -> Option<NamespaceId> {
    let path = record.state_root.join(&record.id).join("status");
    let mut text = Vec::new();
    File::open(path).ok()?.take(MAX_STATUS).read_to_end(&mut text).ok()?;
    let status: Value = serde_json::from_slice(&text).ok()?;
    let metadata = fs::metadata(format!("/proc/{}/ns/user", status["pid"].as_u64()?)).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

fn read_mounts() -> io::Result<Vec<Mount>> {
    let mut table = Vec::new();
    File::open("/proc/self/mountinfo")?.take(mountinfo::MAX_TABLE).read_to_end(&mut table)?;
    Ok(mountinfo::parse(&table))
}

fn facts() -> Facts {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Facts {
        oom_score_adj: read("/proc/self/oom_score_adj").trim().parse().unwrap_or(0),
        apparmor: read("/sys/module/apparmor/parameters/enabled").starts_with('Y'),
        selinux: Path::new("/sys/fs/selinux/enforce").exists(),
    }
}

/// Makes room for the container's limits, which it could not raise from inside of its user namespace.
fn raise_limits(limits: &[Limit]) {
    for limit in limits {
        let Some(resource) = resource(&limit.kind) else { continue };
        let own = rustix::process::getrlimit(resource);
        if own.maximum.is_some_and(|maximum| maximum < limit.hard) {
            // u64::MAX is "unlimited" in a spec. Where the kernel refuses, crun tells about it with the limit's name.
            let maximum = Some(limit.hard).filter(|hard| *hard != u64::MAX);
            let _ = rustix::process::setrlimit(resource, Rlimit { current: own.current, maximum });
        }
    }
}

fn resource(kind: &str) -> Option<Resource> {
    Some(match kind {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        _ => return None,
    })
}

/// The stage is private and empty, so the file needs no temporary name.
fn write_config(path: &PathBuf, spec: &Value) -> io::Result<()> {
    let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(&serde_json::to_vec(spec)?)
}
