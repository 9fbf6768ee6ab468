//! Names and options that clients and users choose, as the gate, the runtime and init judge them.
#![no_main]

use bulkhead_policy::{containers, daemon, logs, networks, sources, volumes};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    // Options that are taken are taken again, and nothing of them is refused then.
    if let Ok(serde_json::Value::Object(wanted)) = serde_json::from_str(text) {
        for isolation in [false, true] {
            let taken = daemon::take(&wanted, isolation);
            assert!(taken.options.keys().all(|name| wanted.contains_key(name)));
            let again = daemon::take(&taken.options, isolation);
            assert_eq!((&again.options, again.refused.len()), (&taken.options, 0));
        }
    }
    let (first, rest) = text.split_once('=').unwrap_or((text, ""));
    // No driver reads a file of the VM or connects to a socket, whichever is the default.
    if logs::judge("", [(first, rest)]).is_ok() && first.ends_with("address") {
        assert!(!rest.starts_with(['/', '.']) && !rest.to_ascii_lowercase().starts_with("unix"));
    }
    let vm = networks::VmNetwork::default();
    let _ = networks::option(first, rest, &vm);
    let _ = (vm.subnet(text), vm.address(text), networks::endpoint_option(text));
    let _ = (sources::bind(text), sources::volume_name(text), containers::check_cgroup(text));
    let _ = volumes::judge("local", [("type", first), ("o", rest), ("device", text)]);
});
