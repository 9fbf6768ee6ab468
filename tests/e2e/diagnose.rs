//! The backend's examination of a VM that may hang.

use std::time::Duration;

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use support::{
    client,
    engine::{Isolation, engine},
    home::pid,
};

fn examine(control: &std::path::Path) -> Value {
    let (status, body) = client::ask(control, "GET", "/v1/examination").unwrap();
    assert_eq!(status, 200, "{body}");
    serde_json::from_str(&body).unwrap()
}

/// Ends the pause of a process when dropped.
struct Paused(Pid);

impl Drop for Paused {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGCONT);
    }
}

#[test]
#[ignore = "needs a KVM that runs Linux guests; scripts/test has one"]
fn a_guest_says_what_it_does_and_one_that_cannot_is_missing() {
    let engine = engine(Isolation::On);
    let control = engine.home.control_socket();
    let examination = examine(&control);
    assert!(examination["guest"]["threads"].as_u64().is_some_and(|threads| threads > 10), "{examination}");
    assert!(examination["guest"]["memory_kib"].as_u64() > examination["guest"]["available_kib"].as_u64());
    let looks = examination["vcpus"].as_array().unwrap();
    assert_eq!(looks.len(), 3, "{examination}");
    assert!(looks.iter().all(|look| look[0]["rip"].is_u64()), "{examination}");

    let vmm = Pid::from_raw(pid(&engine.home.status(), "vmmPid").unwrap().try_into().unwrap());
    kill(vmm, Signal::SIGSTOP).unwrap();
    let paused = Paused(vmm);
    let examination = examine(&control);
    assert!(examination["guest"].is_null() && examination["vcpus"].as_array().unwrap().is_empty(), "{examination}");
    drop(paused);
    // An answer that comes too late must not be taken for the answer to a later question.
    std::thread::sleep(Duration::from_secs(1));
    assert!(examine(&control)["guest"].is_object());
    assert_eq!(engine.get("/_ping").0, 200);
}
