//! A bundle's config.json, and tables of mounts.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    sysbox_runc::fuzzing::config(text);
    sysbox_runc::fuzzing::mount_table(text);
});
