//! Questions to the guest's name server.
#![no_main]

use bulkhead_net::fuzzing::{World, dns_question};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|message: &[u8]| dns_question(message, &World::addresses()));
