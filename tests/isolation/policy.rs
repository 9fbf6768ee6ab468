//! The administrator's policy, where this test may be the administrator: in the emulated machine.

use std::{fs, path::Path};

use crate::{
    FIRST,
    engine::{Engine, Isolation, STOP},
    process::COMMAND,
    shell,
    table::{
        Expect::{Fails, Holds, Says},
        check,
    },
};

/// Where it is.
const FOLDER: &str = "/etc/bulkhead";

/// Only the emulated machine has it; nobody else's /etc is written to.
const EMULATED: &str = "/run/kvm-host/shares";

/// A policy; gone when dropped.
struct Policy;

impl Policy {
    fn write(text: &str) -> Result<Self, String> {
        if !Path::new(EMULATED).exists() {
            return Err("tried in the emulated machine only, as it writes to /etc".into());
        }
        fs::create_dir_all(FOLDER).map_err(|error| error.to_string())?;
        fs::write(Path::new(FOLDER).join("admin-settings.json"), text).map_err(|error| error.to_string())?;
        Ok(Self)
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(FOLDER);
    }
}

/// Stops the engine, runs a test under a policy and starts without one.
fn under(engine: &Engine, text: &str, test: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    // What the person wants, against the policy.
    engine.set(Isolation::Off);
    engine.home.bulkhead(&["stop"], STOP).ok();
    let result = Policy::write(text).and_then(|_policy| {
        let result = test();
        engine.home.bulkhead(&["stop"], STOP).ok();
        result
    });
    engine.set(Isolation::On);
    engine.start();
    result
}

pub fn a_locked_policy_holds(engine: &Engine) -> Result<(), String> {
    const POLICY: &str = r#"{ "configurationFileVersion": 2,
        "enhancedContainerIsolation": { "value": true, "locked": true },
        "containersProxy": { "locked": true, "mode": "manual", "http": "http://127.0.0.1:3128" } }"#;
    const LOCKED: &str = "error: enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json; \
                          only the administrator of this machine can change it\n";
    under(engine, POLICY, || {
        for line in [
            "bulkhead settings set enhancedContainerIsolation false",
            "bulkhead settings unset enhancedContainerIsolation",
        ] {
            check(engine, line, Fails(1, LOCKED))?;
        }
        let other =
            "error: enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json, so no other guest";
        check(engine, "bulkhead start --kernel /dev/null --rootfs /dev/null", Fails(1, other))?;
        check(engine, "BULKHEAD_KERNEL=/dev/null bulkhead start", Fails(1, other))?;
        engine.start();
        check(engine, "docker run --rm alpine cat /proc/self/uid_map", Says(FIRST))?;
        check(engine, "bulkhead settings get enhancedContainerIsolation", Says("true\n"))?;
        let line = "docker run --rm alpine sh -c 'echo $HTTP_PROXY'; docker info --format '{{.HTTPProxy}}'";
        check(engine, line, Says("http://host.docker.internal:3128\nhttp://host.docker.internal:3128\n"))?;
        let line = "bulkhead settings list | grep enhancedContainerIsolation";
        check(engine, line, Holds(|said| said.contains("true") && said.contains("locked")))?;
        check(engine, "bulkhead settings set enhancedContainerIsolation false", Fails(1, LOCKED))?;
        // A policy that changes counts after stop and start only, and restart says so.
        fs::write(Path::new(FOLDER).join("admin-settings.json"), "{}").unwrap();
        let ran = shell(engine, "bulkhead restart --timeout 220");
        if !(ran.status.success() && ran.stdout.contains("stop")) {
            return Err(format!("restart under a changed policy: {}", ran.stdout));
        }
        check(engine, "docker run --rm alpine cat /proc/self/uid_map", Says(FIRST))
    })
}

pub fn a_broken_policy_is_the_strictest(engine: &Engine) -> Result<(), String> {
    under(engine, "{ \"enhancedContainerIsolation\": { \"value\": false, \"locked\": tru", || {
        let printed = engine.home.bulkhead(&["start", "--timeout", "220"], COMMAND * 3);
        let said = format!("{}{}", printed.stdout, printed.stderr);
        if !(printed.status.success() && said.contains("/etc/bulkhead/admin-settings.json")) {
            return Err(format!("start does not name the file: {said}"));
        }
        println!("{said}");
        check(engine, "docker run --rm alpine cat /proc/self/uid_map", Says(FIRST))?;
        let line = "bulkhead settings set enhancedContainerIsolation false";
        check(engine, line, Fails(1, "locked by /etc/bulkhead/admin-settings.json"))
    })
}
