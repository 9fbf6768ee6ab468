//! The isolating OCI runtime: a policy layer over crun, installed as `sysbox-runc` after the runtime it behaves like.
//!
//! dockerd, containerd and BuildKit call it instead of runc and crun, because init mounts it over every program with one
//! of these names. For `create` and `run` it checks the bundle, gives the container a user namespace with ids that no other
//! container has, id-maps its root and its bind mounts, and leaves the rest to crun. The OCI work stays in a packaged
//! program; the policy is small enough to read.
//!
//! # `create` and `run`
//!
//! 1. **Check** the spec (`spec::checks`, `spec::namespaces`, `spec::devices`, `spec::mounts`): no namespace of the
//!    VM is shared, neither by absence nor by path; only safe devices and harmless file system types; only settings that
//!    the engine writes (`spec::keys`), a cgroup of a container's, and no hook but the engine's (`spec::hooks`).
//! 2. **Id range** (`id_ranges`): 65536 ids from 100000 up, the lowest range that no living container has. The table has
//!    one file for each container, on a tmpfs and under a lock. A record counts while crun knows the container or its
//!    creator lives, so a crash leaks none. A container that joins another's namespaces shares its user namespace and range.
//! 3. **User namespace** (`sys::new_userns`): created here with the map `0 START 65536`, and given to crun to join. It
//!    belongs to START, so that the kernel counts for each container by itself. By the same count the kernel tells whether
//!    processes live in the range already; the table alone is not believed.
//! 4. **Staging area** (`staging`): a tmpfs in a private mount namespace, which crun inherits.
//! 5. **Root** (`rootfs`): the engine's mount of it is cloned and id-mapped (`open_tree`, `mount_setattr`). Engine and
//!    container have two mounts of one overlay; on disk the owners stay unshifted.
//! 6. **Bind mounts** (`bind_mounts`): each source is opened once and checked by file system and directory, not by name
//!    (`bind_mounts::source_policy`), with all mounts below it: volumes, the container's own `hosts`, `hostname`, `resolv.conf` and shared memory,
//!    docker-init, and for builds the builder's own files. Each is id-mapped and mounted into the root *before* crun creates
//!    the container's mount namespace: the kernel then locks it, so that a read-only bind cannot be remounted writable or
//!    unmounted. A read-only root is made so here for the same reason. A tmpfs that such a bind goes onto, `/dev` included,
//!    is mounted here too, by a child in the container's user namespace, so that it belongs to the container as if crun had
//!    mounted it. Below anything else that crun mounts, binds go through crun; such a bind is copied first by a child in
//!    that user namespace, in a mount namespace of its own: the kernel locks the copy, and crun's clone of it stays locked.
//! 7. **Rewrite** config.json (`spec`): id maps, namespaces, mounts, ping groups, OOM score, limits. crun gets no annotation
//!    but those that describe an image.
//! 8. **Own files of `/proc` and `/sys`** (`procfs`): the container is entered into the registry of the service that
//!    serves them, and crun mounts them over the kernel's. Where the seccomp profile lets a container mount, its mount calls
//!    are reported to that service (`spec::seccomp_notify`); a listener that the user's profile names is removed.
//! 9. **Seccomp filter** (`seccomp`): a filter of this program's own, which crun and every process of the container
//!    inherit. It refuses vsock sockets and io_uring in every ABI, whatever profile the container has.
//! 10. **crun** (`crun`): for `run` this process becomes crun, for `create` it waits. Standard streams that are the VM's
//!     `/dev/null` are replaced. An error that callers know by runc's words is translated (`runc_errors`).
//! 11. **Network devices** (`network`): for `create`, what the engine's hook has put into the container's own network
//!     namespace is looked at before the container starts. With a device of the VM it is deleted again.
//!
//! `exec` (`exec`) judges the limits of its process, prepares the standard streams and installs the filter in the same way.
//! All other commands go to crun as they are.
//!
//! In the engine's jail crun's state is in a directory that the engine does not see, whatever `--root` it gives: crun keeps
//! there the hooks that it runs at the container's end, and the cgroup that it changes.
//!
//! # Trust
//!
//! The bundle is hostile as far as a docker client or an image can write it: namespaces, mounts, annotations, and the links
//! in the image's file system. Containers that run already are hostile, too, and can swap links in volumes that they share
//! with the new one. So names are resolved once, and every decision is about an open descriptor. The engine itself is
//! trusted: where it keeps bundles and the data directory, no container can write.
//!
//! All `unsafe` code is in `sys`.

mod bind_mounts;
mod cli;
mod create;
mod crun;
mod engine_jail;
mod error;
mod exec;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod id_ranges;
mod log;
mod mount_fd;
mod network;
mod procfs;
mod rootfs;
mod rtnetlink;
mod runc_errors;
mod seccomp;
mod spec;
mod staging;
mod sys;

use std::{convert::Infallible, fs::DirBuilder, os::unix::fs::DirBuilderExt, path::Path, process::ExitCode};

use bulkhead_guest_common::error::chain;
use bulkhead_protocol::CRUN_STATE;
use cli::{Command, GlobalOptions};
use error::Error;

const HELP: &str = "\
sysbox-runc, an isolating OCI runtime

Usage: sysbox-runc [--root DIR] [--log FILE] [--log-format text|json] [--systemd-cgroup] [--debug] COMMAND …

Commands: create, run, start, exec, state, kill, delete, pause, resume, update, ps, list, spec, features";

/// Runs the program with the arguments of this process.
pub fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let mut args = args.into_iter();
    let (mut globals, first) = cli::globals(&mut args);
    let command = first.and_then(|name| cli::command(&name, args.collect()));
    // BuildKit shows its user the output of a step and not the runtime's log.
    let is_run = matches!(&command, Ok(Command::Create(create)) if create.verb == "run");
    match command.map_err(Error::from).and_then(|command| run(&mut globals, command)) {
        Ok(code) => code,
        Err(error) => {
            globals.log.error(&error);
            if is_run && globals.log.file.is_some() {
                eprintln!("{}", chain(&error));
            }
            ExitCode::FAILURE
        }
    }
}

fn run(globals: &mut GlobalOptions, command: Command) -> Result<ExitCode, Error> {
    if !matches!(command, Command::Version | Command::Help) {
        enter_jail(globals)?;
    }
    let never: Infallible = match command {
        Command::Version => {
            // dockerd parses the first line and those that start with "spec".
            println!("sysbox-runc version {}\nspec: 1.2.0", env!("CARGO_PKG_VERSION"));
            return Ok(ExitCode::SUCCESS);
        }
        Command::Help => {
            println!("{HELP}");
            return Ok(ExitCode::SUCCESS);
        }
        Command::Create(request) => return create::create(globals, &request),
        Command::Exec(request) => exec::exec(globals, request)?,
        Command::PassThrough(args) => hand_over(globals, args)?,
    };
    match never {}
}

/// Takes this program's directories and crun's, which the engine does not see, if it runs in the engine's jail.
fn enter_jail(globals: &mut GlobalOptions) -> Result<(), Error> {
    if !engine_jail::enter().map_err(Error::system("enter the directories of sysbox-runc"))? {
        return Ok(());
    }
    globals.keep_state_in(Path::new(CRUN_STATE))?;
    let made = DirBuilder::new().recursive(true).mode(0o700).create(globals.state_root());
    made.map_err(Error::system("create the state directory"))
}

fn hand_over(globals: &GlobalOptions, args: Vec<std::ffi::OsString>) -> Result<Infallible, Error> {
    let mut all = globals.for_crun();
    all.extend(args);
    crun::exec(&all)
}
