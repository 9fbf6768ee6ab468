//! Helpers that the test suites share: the engine that most tests use, the VMM without an engine (feature `host`), the
//! file server of the guest (feature `procfs`), and file systems that tests mount (feature `file-systems`).

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a helper that fails is a test that fails")]

#[cfg(feature = "host")]
mod autopsy;
#[cfg(feature = "host")]
pub mod client;
#[cfg(feature = "host")]
pub mod control;
#[cfg(feature = "host")]
pub mod engine;
#[cfg(feature = "host")]
pub mod guest;
#[cfg(feature = "host")]
pub mod home;
#[cfg(feature = "host")]
pub mod ports;
#[cfg(feature = "host")]
pub mod process;
#[cfg(feature = "procfs")]
pub mod procfs;
#[cfg(feature = "host")]
pub mod registry;
#[cfg(feature = "file-systems")]
pub mod small_file_system;
pub mod tree;
#[cfg(feature = "host")]
pub mod vmm;

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
