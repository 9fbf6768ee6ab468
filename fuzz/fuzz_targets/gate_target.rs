//! Request targets, bind paths and image references as the gate reads them.
#![no_main]

use bulkhead_gate::policy::{Inspection, Isolation, normalise_image, reaches_engine_socket, segments};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let segments = segments(text);
    assert!(segments.iter().all(|segment| !matches!(segment.as_str(), "" | "." | "..") && !segment.contains('/')));
    assert_eq!(Inspection::of(Isolation::Off, &segments), None);
    let _ = Inspection::of(Isolation::On, &segments);
    let reaches = reaches_engine_socket(text);
    // Neither more slashes nor a dot lead elsewhere.
    assert_eq!(reaches_engine_socket(&text.replace('/', "/.//")), reaches);
    let _ = normalise_image(text);
});
