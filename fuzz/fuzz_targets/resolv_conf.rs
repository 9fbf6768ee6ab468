//! The host's resolv.conf.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| bulkhead_net::fuzzing::resolv_conf(text));
