//! The host's hosts(5), and names of reverse lookups.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| bulkhead_net::fuzzing::hosts_file(text));
