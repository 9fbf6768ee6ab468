//! Lines between the agent and the backend, both ways.
#![no_main]

use bulkhead_protocol::{GuestMessage, HostMessage, LineReader, encode};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut reader = LineReader::new(data);
    while let Ok(Some(message)) = reader.read::<GuestMessage>() {
        // A parsed message survives being written and parsed again.
        if let Ok(line) = encode(&message) {
            assert_eq!(LineReader::new(&line[..]).read::<GuestMessage>().unwrap(), Some(message));
        }
    }
    let mut reader = LineReader::new(data);
    while let Ok(Some(_)) = reader.read::<HostMessage>() {}
});
