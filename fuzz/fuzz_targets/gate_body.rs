//! Bodies of requests that the gate reads.
#![no_main]

use bulkhead_gate::rules::api::{Body, read, routes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|body: &[u8]| {
    for route in routes() {
        if let Body::Json(shape) = route.body
            && let Ok(read_once) = read(shape, body)
        {
            // The body that the engine gets reads to the same again.
            assert_eq!(read(shape, read_once.to_string().as_bytes()), Ok(read_once));
        }
    }
});
