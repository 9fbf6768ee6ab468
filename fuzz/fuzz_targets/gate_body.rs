//! Bodies of requests that the gate looks into.
#![no_main]

use bulkhead_gate::rules::Inspection;
use bytes::Bytes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    for inspection in [Inspection::Container, Inspection::Volume, Inspection::Service] {
        if let Ok(passed) = inspection.judge(Bytes::copy_from_slice(body)) {
            // The body that the engine gets passes the filter again, unchanged.
            assert_eq!(inspection.judge(passed.body.clone()), Ok(passed));
        }
    }
});
