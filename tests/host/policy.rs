//! The administrator's policy.

use std::{fs, path::Path};

use crate::home::{Home, refused};

#[test]
fn a_policy_file_is_checked_with_the_place_of_what_is_wrong() {
    let home = Home::new();
    let file = home.path("policy.json");
    let validate = |text: &str| {
        fs::write(&file, text).unwrap();
        home.bulkhead(&["policy", "validate", file.to_str().unwrap()])
    };
    let good = validate(
        r#"{"configurationFileVersion": 2, "enhancedContainerIsolation": {"value": true, "locked": true},
            "analyticsEnabled": {"value": false, "locked": true}}"#,
    );
    assert!(good.status.success(), "{good:?}");
    let warning = String::from_utf8_lossy(&good.stderr).into_owned();
    assert_eq!(warning, "warning: the key analyticsEnabled is not known and is ignored\n");
    for (text, place) in [
        ("{\n  \"proxy\": }", "line 2 column 12"),
        (r#"{"enhancedContainerIsolation": {"value": "on", "locked": true}}"#, "enhancedContainerIsolation.value: "),
        (r#"{"linuxVM": {"vpnkitCIDR": {"value": "8.8.8.0/24", "locked": true}}}"#, "linuxVM.vpnkitCIDR.value: "),
    ] {
        assert!(refused(&validate(text), 1).contains(place), "{text}");
    }
    let pipe = home.path("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let message = refused(&home.bulkhead(&["policy", "validate", pipe.to_str().unwrap()]), 1);
    assert!(message.contains("no regular file"), "{message}");
}

#[test]
fn the_schema_of_the_policy_is_printed_as_it_is_in_docs() {
    let output = Home::new().bulkhead(&["policy", "schema"]);
    let shipped = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/admin-settings.schema.json")).unwrap();
    assert!(output.status.success() && output.stdout == shipped);
}
