//! Helpers that the test suites share: the engine that most tests use, and the VMM without an engine.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

pub mod client;
pub mod control;
pub mod engine;
pub mod guest;
pub mod home;
pub mod process;
pub mod registry;
pub mod vmm;

mod autopsy;

use std::sync::OnceLock;

/// Path of the built `bulkhead`: in the directory above the one that cargo builds tests into.
pub fn program() -> &'static str {
    static PROGRAM: OnceLock<String> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let program = test.ancestors().nth(2).unwrap().join("bulkhead");
        assert!(program.exists(), "{} is not built", program.display());
        program.into_os_string().into_string().unwrap()
    })
}
