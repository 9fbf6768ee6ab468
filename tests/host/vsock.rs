//! `vsock` as far as it goes without a VM.

use crate::home::{Home, refused};

#[test]
fn ports_of_the_vms_services_are_refused() {
    let home = Home::new();
    for arguments in [
        &["vsock", "connect", "1023"][..],
        &["vsock", "connect", "0"],
        &["vsock", "connect", "4294967295"],
        &["vsock", "listen", "1023"],
        &["vsock", "listen", "1073741824"],
        &["vsock", "forward", "8080:1023"],
        &["vsock", "forward", "./socket:1"],
    ] {
        let output = home.bulkhead(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(message.contains("1024"), "{message}");
    }
}

#[test]
fn without_an_engine_one_line_says_how_to_start_it() {
    let home = Home::new();
    let _backend = home.backend();
    for arguments in [["vsock", "connect", "5000"], ["vsock", "listen", "5000"], ["vsock", "forward", "./socket:5000"]]
    {
        let message = refused(&home.bulkhead(&arguments), 1);
        assert!(message.contains("the engine is not running; `bulkhead start` starts it"), "{message}");
    }
}
