//! The jail of dockerd and containerd, with isolation on.
//!
//! dockerd does as the VM's root what its clients ask for, with paths, names and options that they choose. The rules of
//! the gate and of the runtime say what they may ask for. The jail is for what gets past the rules: it holds nothing
//! that is worth asking for.
//!
//! # The view
//!
//! A mount namespace whose root is the VM's image, read-only, without the VM's `/run`, `/tmp`, devices and disks
//! ([`root`] lists all that is there). dockerd and containerd share it with what they start: shims, the runtime, crun. The
//! engine's directories of the data disk are there; links below `volumes` are not followed, because containers can put
//! them in the way of a dockerd that fills a volume.
//!
//! A path of `/proc/PID` could lead out of any mount namespace. So all of them are in one Landlock domain, which handles
//! no file at all: mounting stays possible, but the kernel lets its members look only into processes of the same domain,
//! whatever capabilities they have (`root`, `cwd`, `fd`, `mem`, `ns` of proc(5), ptrace(2), `pidfd_getfd`(2)), and signal
//! only those. The domain has to be one for all: the hook by which dockerd gets a container's network is
//! `/proc/PID/exe` of dockerd, and dockerd enters namespaces of containers.
//!
//! # The jailer
//!
//! That is why the services are started by a process of its own, [`jailer`], and not by a thread of init. A thread that
//! is in the domain could be looked into by its other members, and has init's memory and descriptors. The jailer has
//! none. It makes the jail, goes in, and starts on request what init hands to it; its children are init's (`CLONE_PARENT`),
//! so that supervision is the same for all services. It ends last: the jail's mounts go with the last process in it.
//!
//! # Powers
//!
//! containerd and its children have the capabilities in a list ([`confine`]). dockerd keeps all of them, because it gives
//! to containers no capability that it does not have itself (`oci/caps`), although a container has each of them in its
//! own user namespace only. A seccomp filter refuses to all what neither the engine nor any container may do to the VM.
//!
//! # The runtime
//!
//! The runtime needs more than the engine may see: the table of id ranges, the procfs service's tree, crun's state, the
//! gate's sockets, and `/proc` and `/sys` as they are, because a container's own can only be mounted where those are in full view.
//! It asks init for them ([`crate::handover`]) and mounts them in a namespace of its own.
//!
//! # The VM's side
//!
//! `/var/lib/docker` of the VM receives the mounts that are made in the jail and passes none on. At shutdown init unmounts
//! what the engine has left there.

pub(crate) mod confine;
mod error;
pub(crate) mod jailer;
mod root;
mod spawn;
mod sys;
#[cfg(test)]
mod tests;

pub(crate) use sys::set_attributes;

use std::{
    io::{self, PipeWriter},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Command, Stdio},
};

use nix::{
    mount::MsFlags,
    sys::{
        signal::{SigSet, SigmaskHow, sigprocmask},
        socket::{AddressFamily, SockFlag, SockType, socketpair},
    },
};
use serde::{Deserialize, Serialize};

use self::sys::Packet;
use crate::{cgroup, error::Error, log, mounts, output};

/// The first argument by which init's program becomes the jailer.
pub(crate) const ARGUMENT: &str = "jail";

/// init's program in the VM's image.
const PROGRAM: &str = "/usr/sbin/bulkhead-init";

/// Longest request or answer in bytes. An environment is short: the user's variables are for containers.
const MAX_PACKET: usize = 16 * 1024;

/// A request to start a service. Two descriptors come with it: its output, and `cgroup.procs` of its group.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Path of the program, and its arguments.
    pub(crate) words: Vec<String>,
    /// The whole environment.
    pub(crate) environment: Vec<(String, String)>,
    /// Keep all capabilities, and not only those in the list.
    pub(crate) all_capabilities: bool,
}

/// The jailer's first message, and its answer to each request.
#[derive(Debug, Serialize, Deserialize)]
enum Answer {
    /// The jail is ready.
    Ready,
    /// The service runs with this process id.
    Started(i32),
    /// The reason why not.
    Failed(String),
}

/// The jail, as init sees it.
#[derive(Debug)]
pub(crate) struct Jail {
    socket: OwnedFd,
}

impl Jail {
    /// Makes the jail. The data disk must be mounted.
    pub(crate) fn make() -> Result<Self, Error> {
        let (socket, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(Error::system("create a pair of sockets"))?;
        let (reader, writer) = io::pipe().map_err(Error::system("create a pipe"))?;
        let procs = cgroup::open_procs(&cgroup::create("jail")?)?;
        let mut command = Command::new(PROGRAM);
        command
            .arg(ARGUMENT)
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::from(theirs))
            .stdout(writer.try_clone().map_err(Error::system("duplicate a pipe"))?)
            .stderr(writer);
        let mask = SigSet::empty();
        // SAFETY: between fork and exec this makes only the async-signal-safe calls write, setsid and sigprocmask, and
        // touches no memory but its own captures.
        unsafe {
            command.pre_exec(move || {
                io::Write::write_all(&mut &procs, b"0")?;
                nix::unistd::setsid()?;
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None)?;
                Ok(())
            });
        }
        let child = command.spawn().map_err(Error::file("start", PROGRAM))?;
        // Ours are the last copies of the jailer's ends: when it ends, reading fails instead of waiting forever.
        drop(command);
        output::relay("jail", reader, output::Tail::default())?;
        // Without it no service could be started again, so nothing is killed after it. The services get their own score.
        let score = format!("/proc/{}/oom_score_adj", child.id());
        if let Err(error) = std::fs::write(&score, "-1000") {
            log::info(&format!("cannot write {score}: {error}"));
        }
        let jail = Self { socket };
        match jail.receive()? {
            Answer::Ready => {}
            Answer::Failed(reason) => return Err(Error::Jail(reason)),
            Answer::Started(_) => return Err(Error::Jail("unexpected answer".to_owned())),
        }
        // The jail has its copies by now. What it mounts in them appears in the VM as well, and nothing goes the other way.
        for directory in root::ENGINE {
            mounts::propagation(directory, MsFlags::MS_SLAVE | MsFlags::MS_REC)?;
        }
        Ok(jail)
    }

    /// Starts a service in the jail and returns its process id.
    pub(crate) fn start(&self, request: &Request, output: &PipeWriter, procs: impl AsFd) -> Result<i32, Error> {
        let text = serde_json::to_vec(request).map_err(Error::system("write a request to the jailer"))?;
        let descriptors = [output.as_raw_fd(), procs.as_fd().as_raw_fd()];
        sys::send(self.socket.as_fd(), &text, &descriptors).map_err(Error::system("ask the jailer for a service"))?;
        match self.receive()? {
            Answer::Started(pid) => Ok(pid),
            Answer::Failed(reason) => Err(Error::Jail(reason)),
            Answer::Ready => Err(Error::Jail("unexpected answer".to_owned())),
        }
    }

    fn receive(&self) -> Result<Answer, Error> {
        let Packet { bytes, .. } = sys::receive(self.socket.as_fd()).map_err(Error::system("hear from the jailer"))?;
        if bytes.is_empty() {
            return Err(Error::Jail("its process has ended".to_owned()));
        }
        serde_json::from_slice(&bytes).map_err(|_| Error::Jail("unexpected answer".to_owned()))
    }
}
