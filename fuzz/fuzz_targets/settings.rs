//! A user's settings file and the command line's values.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &[u8]| bulkhead::settings::fuzzing::settings(text));
