//! A bundle's config.json, and tables of mounts.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| {
    bulkhead_runtime::fuzzing::config(text);
    bulkhead_runtime::fuzzing::mount_table(text);
});
