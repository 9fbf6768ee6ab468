//! Refuses to change a setting that the administrator's policy locks.
//!
//! A user has two ways to a value, and both are checked here: `bulkhead settings set` and `unset` change the file, and
//! the options of `bulkhead start` and `run` go before it. The backend checks the options again (`backend/plan.rs`),
//! because any program of the user can send it a request.
//!
//! A value that is written into the file by hand is not refused, but has no effect: `Settings::get` returns the locked
//! one. A guest image of the user's own could leave isolation out; `image/mod.rs` refuses it.

use serde_json::Value;

use super::{definition::Definition, error::SettingsError, policy::Policy};

/// Refuses to set or unset a locked setting, also to the locked value: the file would keep it without effect, and it
/// would come into force on the day the policy is gone.
pub(super) fn refuse_change(policy: &Policy, definition: &Definition) -> Result<(), SettingsError> {
    match policy.lock(definition) {
        Some(file) => Err(SettingsError::Locked { key: definition.key, file: file.to_owned() }),
        None => Ok(()),
    }
}

/// Refuses an option that differs from the value in effect of a locked setting. The same value is accepted: a script
/// may pass its options on every machine.
pub(super) fn refuse_option(
    policy: &Policy,
    definition: &Definition,
    in_effect: &Value,
    option: &Value,
) -> Result<(), SettingsError> {
    if option == in_effect { Ok(()) } else { refuse_change(policy, definition) }
}
