//! File system rules.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr,
};

use super::SandboxError;

/// Folders in which programs keep what `/etc/resolv.conf` may be a link to.
const RESOLVERS: [&str; 4] = ["/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf", "/run/connman"];

fn ruleset() -> Result<RulesetCreated, SandboxError> {
    let handled: BitFlags<AccessFs> = AccessFs::from_all(ABI::V3);
    Ok(Ruleset::default().set_compatibility(CompatLevel::BestEffort).handle_access(handled)?.create()?)
}

/// A rule on a file ends with the file, and resolv.conf is replaced when the network changes: rules are on its folders.
pub(super) fn restrict_net() -> Result<(), SandboxError> {
    let target = std::fs::canonicalize("/etc/resolv.conf").ok();
    let folders =
        RESOLVERS.iter().map(Path::new).chain([Path::new("/etc")]).chain(target.as_deref().and_then(Path::parent));
    let mut rules = ruleset()?;
    for folder in folders {
        if let Ok(folder) = PathFd::new(folder) {
            rules = rules.add_rule(PathBeneath::new(folder, AccessFs::ReadFile))?;
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
    let mut rules = ruleset()?.add_rule(PathBeneath::new(PathFd::new("/proc/self")?, AccessFs::ReadFile))?;
    if let Some(folder) = sockets {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(folder)?, AccessFs::RemoveFile | AccessFs::MakeSock))?;
    }
    rules.restrict_self()?;
    Ok(())
}
