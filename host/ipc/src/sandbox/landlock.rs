//! File system rules (Landlock, `Documentation/userspace-api/landlock.rst`).

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr,
};

use super::SandboxError;

/// Directories in which network managers keep the file that `/etc/resolv.conf` links to.
const RESOLVERS: [&str; 4] = ["/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"];

fn ruleset() -> Result<RulesetCreated, SandboxError> {
    // Every access of ABI 3 is denied unless a rule allows it. An older kernel denies those that it knows, and one
    // without Landlock denies none.
    let handled: BitFlags<AccessFs> = AccessFs::from_all(ABI::V3);
    Ok(Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(handled)?.create()?)
}

pub(super) fn restrict_net() -> Result<(), SandboxError> {
    // A rule on a file ends with its inode, and resolv.conf is replaced whenever the network changes. So the rules are
    // on the directories in which it and the target of its link may appear.
    let target = std::fs::canonicalize("/etc/resolv.conf").ok();
    let directories =
        RESOLVERS.iter().map(Path::new).chain([Path::new("/etc")]).chain(target.as_deref().and_then(Path::parent));
    let mut rules = ruleset()?;
    for directory in directories {
        // Most hosts have only one of them. One that appears later stays out of reach.
        if let Ok(directory) = PathFd::new(directory) {
            rules = rules.add_rule(PathBeneath::new(directory, AccessFs::ReadFile))?;
        }
    }
    rules.restrict_self()?;
    Ok(())
}

pub(super) fn restrict_tap() -> Result<(), SandboxError> {
    ruleset()?.restrict_self()?;
    Ok(())
}

pub(super) fn restrict_vmm(sockets: Option<&Path>) -> Result<(), SandboxError> {
    // The link is resolved here, once: the rule is on the directory of this process alone.
    let mut rules = ruleset()?.add_rule(PathBeneath::new(PathFd::new("/proc/self")?, AccessFs::ReadFile))?;
    if let Some(directory) = sockets {
        // The vsock device removes its socket file when it is dropped. Connecting needs no right of Landlock.
        rules = rules.add_rule(PathBeneath::new(PathFd::new(directory)?, AccessFs::RemoveFile | AccessFs::MakeSock))?;
    }
    rules.restrict_self()?;
    Ok(())
}
