//! Rules of a system call filter and their translation into a program of the kernel's.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::SandboxError;

/// Mask for all bits of a 32-bit argument.
pub(super) const EQUAL: u64 = u32::MAX as u64;

/// One of several alternatives for the arguments of a call.
type Alternative = Result<SeccompRule, SandboxError>;

/// Calls and the alternatives for their arguments; a call without alternatives has no condition.
#[derive(Default)]
pub(super) struct Rules(BTreeMap<i64, Vec<SeccompRule>>);

impl Rules {
    /// Adds calls without conditions.
    pub(super) fn allow(mut self, calls: &[libc::c_long]) -> Self {
        self.0.extend(calls.iter().map(|call| (*call, Vec::new())));
        self
    }

    /// Adds a call that one of these alternatives, or of those added before, must allow.
    pub(super) fn allow_if(
        mut self,
        call: libc::c_long,
        alternatives: impl IntoIterator<Item = Alternative>,
    ) -> Result<Self, SandboxError> {
        let alternatives = alternatives.into_iter().collect::<Result<Vec<_>, _>>()?;
        self.0.entry(call).or_default().extend(alternatives);
        Ok(self)
    }

    /// Makes every call fail that is not in the rules, for this thread and those that it starts.
    pub(super) fn refuse_others(self) -> Result<(), SandboxError> {
        // A denied call fails instead of killing the process: a guest must not be able to end its VM by provoking one.
        self.install(SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)
    }

    /// Makes the calls of the rules fail with this error, and leaves all others to other filters.
    pub(super) fn refuse_listed(self, error: libc::c_int) -> Result<(), SandboxError> {
        self.install(SeccompAction::Allow, SeccompAction::Errno(error as u32))
    }

    fn install(self, others: SeccompAction, listed: SeccompAction) -> Result<(), SandboxError> {
        let program: BpfProgram = SeccompFilter::new(self.0, others, listed, TargetArch::x86_64)?.try_into()?;
        Ok(seccompiler::apply_filter(&program)?)
    }
}

/// An alternative: each of these arguments, given by index, has this value under this mask.
pub(super) fn rule(arguments: &[(u8, u64, u64)]) -> Alternative {
    // The kernel truncates the arguments in question to 32 bits, so their upper halves must not decide.
    conditions(SeccompCmpArgLen::Dword, arguments)
}

/// The same for an argument of which the kernel uses all 64 bits.
pub(super) fn rule_of_long(index: u8, mask: u64, value: u64) -> Alternative {
    conditions(SeccompCmpArgLen::Qword, &[(index, mask, value)])
}

fn conditions(length: SeccompCmpArgLen, arguments: &[(u8, u64, u64)]) -> Alternative {
    let condition = |(index, mask, value): &(u8, u64, u64)| {
        SeccompCondition::new(*index, length.clone(), SeccompCmpOp::MaskedEq(*mask), *value)
    };
    Ok(SeccompRule::new(arguments.iter().map(condition).collect::<Result<_, _>>()?)?)
}
