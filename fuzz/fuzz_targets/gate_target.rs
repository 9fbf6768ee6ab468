//! Request targets, bind paths and image references as the gate reads them.
#![no_main]

use bulkhead_gate::rules::{
    Asked, Entry, Inspection, Isolation, canonical, normalise_image, permits, pulls, reaches_engine_socket, segments,
};
use bulkhead_protocol::SocketCommands;
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
    let _ = Entry::parse(text).map(|entry| entry.names(&normalise_image(text)));
    // What is sent on means what was judged.
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let straight = canonical(path);
    assert_eq!(bulkhead_gate::rules::segments(&straight), bulkhead_gate::rules::segments(path));
    assert_eq!(canonical(&straight), straight);
    let _ = pulls(&segments, query);
    let asked = Asked { method: "POST", segments: &segments, query, form: false };
    let list = |allow| SocketCommands { allow, commands: vec!["image*".to_owned(), "run".to_owned()] };
    if permits(&list(true), asked) && permits(&list(false), asked) {
        // Only what helps, or what every client needs, is neither owned nor strange.
        assert!(!matches!(segments.first().map(String::as_str), Some("images" | "commit" | "build")));
    }
});
