//! Request targets, bind paths and image references as the gate reads them.
#![no_main]

use bulkhead_gate::rules::{
    ImagePattern, RequestInfo, api, canonical, normalise_image, permits, pulled_image, reaches_engine_socket, segments,
};
use bulkhead_protocol::SocketCommands;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let segments = segments(text);
    assert!(segments.iter().all(|segment| !matches!(segment.as_str(), "" | "." | "..") && !segment.contains('/')));
    let reaches = reaches_engine_socket(text);
    // Neither more slashes nor a dot lead elsewhere.
    assert_eq!(reaches_engine_socket(&text.replace('/', "/.//")), reaches);
    let _ = normalise_image(text);
    let _ = ImagePattern::parse(text).map(|pattern| pattern.covers(&normalise_image(text)));
    // The target that is sent on means the one that was judged.
    let (path, query) = text.split_once('?').unwrap_or((text, ""));
    let straight = canonical(path);
    assert_eq!(bulkhead_gate::rules::segments(&straight), bulkhead_gate::rules::segments(path));
    assert_eq!(canonical(&straight), straight);
    let _ = pulled_image(&segments, query);
    for method in ["GET", "POST", "DELETE"] {
        if let Some(found) = api::find(method, &segments)
            && let Ok(known) = api::Query::read(found.route.parameters, query)
        {
            assert_eq!(api::Query::read(found.route.parameters, &known.text()), Ok(known));
        }
    }
    let info = RequestInfo { method: "POST", segments: &segments, query };
    let list = |allow| SocketCommands { allow, commands: vec!["image*".to_owned(), "run".to_owned()] };
    if permits(&list(true), info) && permits(&list(false), info) {
        // Only what helps, or what every client needs, is neither owned nor strange.
        assert!(!matches!(segments.first().map(String::as_str), Some("images" | "commit" | "build")));
    }
});
