//! File system rules.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr,
};

use super::SandboxError;

pub(super) fn restrict(sockets: Option<&Path>) -> Result<(), SandboxError> {
    let handled: BitFlags<AccessFs> = AccessFs::from_all(ABI::V3);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(handled)?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/proc/self")?, AccessFs::ReadFile))?;
    if let Some(folder) = sockets {
        rules = rules.add_rule(PathBeneath::new(PathFd::new(folder)?, AccessFs::RemoveFile | AccessFs::MakeSock))?;
    }
    rules.restrict_self()?;
    Ok(())
}
