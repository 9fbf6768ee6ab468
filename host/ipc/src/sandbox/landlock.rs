//! Rules on files, ports and other processes (Landlock, `Documentation/userspace-api/landlock.rst`).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, Scope,
};

use super::{SandboxError, Shared};

/// Directories in which network managers keep the file that `/etc/resolv.conf` links to.
const RESOLVERS: [&str; 4] = ["/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"];

/// Returns rules that deny every access to files and these to TCP ports, and the abstract unix sockets of processes
/// outside of the sandbox and signals to them.
fn ruleset(ports: BitFlags<AccessNet>) -> Result<RulesetCreated, SandboxError> {
    // ABI 6. An older kernel denies what it knows, and one without Landlock denies nothing.
    Ok(Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(ports)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?)
}

pub(super) fn restrict_net() -> Result<(), SandboxError> {
    // A rule on a file ends with its inode, and resolv.conf is replaced whenever the network changes. So the rules are
    // on the directories in which it, the file of hosts and the targets of their links may appear.
    let targets = ["/etc/resolv.conf", "/etc/hosts"].map(|link| std::fs::canonicalize(link).ok());
    let targets = targets.iter().flatten().filter_map(|target| target.parent());
    let directories = RESOLVERS.iter().map(Path::new).chain([Path::new("/etc")]).chain(targets);
    // The guest's connections go to any port, so only listening is denied.
    let mut rules = ruleset(AccessNet::BindTcp.into())?;
    for directory in directories {
        // Most hosts have only one of them. One that appears later stays out of reach.
        if let Ok(directory) = PathFd::new(directory) {
            rules = rules.add_rule(PathBeneath::new(directory, AccessFs::ReadFile))?;
        }
    }
    rules.restrict_self()?;
    Ok(())
}

/// Restricts a process to these directories.
pub(super) fn restrict_share(shares: &[Shared<'_>]) -> Result<(), SandboxError> {
    // The first version of Landlock refuses to move files between directories, whatever the rules.
    let refer = Ruleset::default().set_compatibility(CompatLevel::HardRequirement).handle_access(AccessFs::Refer);
    if refer.is_err() {
        return Ok(());
    }
    let reading = AccessFs::ReadFile | AccessFs::ReadDir;
    let writing = reading
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::RemoveDir
        | AccessFs::RemoveFile
        | AccessFs::MakeDir
        | AccessFs::MakeReg
        | AccessFs::MakeSock
        | AccessFs::MakeFifo
        | AccessFs::MakeSym
        | AccessFs::Refer;
    let mut rules = ruleset(AccessNet::from_all(ABI::V6))?;
    for share in shares {
        let access = if share.read_only { reading } else { writing };
        rules = rules.add_rule(PathBeneath::new(share.directory, access))?;
    }
    rules.restrict_self()?;
    Ok(())
}

/// Restricts a process that needs nothing but what it has open.
pub(super) fn restrict_all() -> Result<(), SandboxError> {
    ruleset(AccessNet::from_all(ABI::V6))?.restrict_self()?;
    Ok(())
}
