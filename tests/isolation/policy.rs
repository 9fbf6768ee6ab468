//! The administrator's policy, row by row, where this test may be the administrator: in the emulated machine.

use std::fs;

use support::engine::Engine;

use crate::{
    FIRST, shell,
    situation::{BROKEN, POLICY},
    sockets::MOUNT,
    table::{
        Expect::{Fails, Holds, Says},
        Proof::{Code, Lines},
        Row, check,
    },
};

const LOCKED_BY: &str = "is locked by /etc/bulkhead/admin-settings.json; only the administrator of this machine can \
                         change it\n";

const CHANGED: &str = "the policy /etc/bulkhead/admin-settings.json has changed since the backend started; the change \
                       takes effect after `bulkhead stop` and `bulkhead start`, not after a restart";

const UNUSABLE: &str = "the policy /etc/bulkhead/admin-settings.json cannot be used: ";

const STRICTEST: &str = "until it is corrected, Enhanced Container Isolation is on and locked";

/// Without a file.
pub const ABSENT: &[Row] = &[Row(
    "policy",
    "absent: everybody decides for themselves",
    Lines(
        "bulkhead policy show; bulkhead settings set hostLoopback true && bulkhead settings unset hostLoopback",
        Says("no policy; the user can change all settings\n"),
    ),
)];

/// Isolation is locked, with exceptions, and the user has set it to false.
pub const LOCKED: &[Row] = &[
    Row("policy", "locked: isolation is on and nobody can change it", Code(a_locked_setting_holds)),
    Row("policy", "locked: no other guest image can be named", Code(no_other_image_can_be_named)),
    Row(
        "policy",
        "locked: its containersProxy is the containers' and the engine's",
        Lines(
            "docker run --rm alpine sh -c 'echo $HTTP_PROXY'; docker info --format '{{.HTTPProxy}}'",
            Says("http://host.docker.internal:3128\nhttp://host.docker.internal:3128\n"),
        ),
    ),
    Row("policy", "locked: its dockerSocketMount is in force", Code(exceptions_of_the_policy_hold)),
    Row("policy", "changed: said, and without effect until stop and start", Code(a_change_waits_for_stop_and_start)),
];

/// A file that was cut off.
pub const UNREADABLE: &[Row] = &[
    Row(
        "policy",
        "invalid: start, status, doctor, lists say where",
        Lines(
            "cat start.log; for verb in status doctor 'settings list' 'policy show'; do bulkhead $verb; done",
            Holds(|said| {
                let count = |text| said.matches(text).count();
                count(UNUSABLE) == 5 && count(STRICTEST) == 5 && count("line 1 column") == 5
            }),
        ),
    ),
    Row("policy", "invalid: isolation is on and locked, without exceptions", Code(the_strictest_holds)),
];

/// No version, unknown keys, isolation off and not locked.
pub const FREE: &[Row] = &[
    Row(
        "policy",
        "unknown keys, no version: accepted, and each key is named",
        Lines(
            "for verb in 'policy show' 'policy validate /etc/bulkhead/admin-settings.json' logs; do
                 bulkhead $verb >said 2>&1 || echo \"$verb: $?\"
                 for key in enhancedContainerIsolation.someday analyticsEnabled; do grep -q $key said && echo $key; done
             done",
            Holds(|said| said == "enhancedContainerIsolation.someday\nanalyticsEnabled\n".repeat(3)),
        ),
    ),
    Row("policy", "not locked: its value counts until the user sets one", Code(a_free_setting_is_a_default)),
];

fn a_locked_setting_holds(engine: &Engine) -> Result<(), String> {
    check(engine, "docker run --rm alpine cat /proc/self/uid_map", Holds(|said| said.ends_with("     65536\n")))?;
    check(engine, "bulkhead settings get enhancedContainerIsolation", Says("true\n"))?;
    for key in ["enhancedContainerIsolation", "dockerSocketMount"] {
        let value = if key == "dockerSocketMount" { "{}" } else { "false" };
        for line in [format!("bulkhead settings set {key} '{value}'"), format!("bulkhead settings unset {key}")] {
            let ran = shell(engine, &line);
            if ran.status.code() != Some(1) || ran.stdout != format!("error: {key} {LOCKED_BY}") {
                return Err(format!("{line}: {} {}", ran.status, ran.stdout));
            }
        }
        let line = format!("bulkhead settings list | grep '^{key} '");
        check(engine, &line, Holds(|said| said.contains(" locked ")))?;
    }
    Ok(())
}

fn no_other_image_can_be_named(engine: &Engine) -> Result<(), String> {
    let text = "error: enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json, so no other guest";
    // A running VM stays as it is whatever is named, so another profile is tried.
    for line in [
        "bulkhead --profile other start --kernel /dev/null --rootfs /dev/null",
        "BULKHEAD_KERNEL=/dev/null bulkhead --profile other start",
    ] {
        check(engine, line, Fails(1, text))?;
    }
    Ok(())
}

fn exceptions_of_the_policy_hold(engine: &Engine) -> Result<(), String> {
    let line = "$INSIDE docker ps --format '{{.Names}}'; $INSIDE docker push alpine";
    check(engine, line, Fails(1, "is blocked; if you wish to allow it"))?;
    check(engine, "$INSIDE docker ps --format '{{.Names}}'", Says("inside\n"))?;
    check(engine, "docker run --rm $S alpine true", Fails(125, "docker socket mount denied"))
}

fn a_change_waits_for_stop_and_start(engine: &Engine) -> Result<(), String> {
    fs::write(POLICY, BROKEN).unwrap();
    for verb in ["restart --timeout 220", "start", "status", "policy show"] {
        let ran = shell(engine, &format!("bulkhead {verb}"));
        if !(ran.status.success() && ran.stdout.contains(CHANGED)) {
            return Err(format!("{verb} under a changed policy: {} {}", ran.status, ran.stdout));
        }
    }
    // The older policy excepts this image, the newer one does not.
    check(engine, &format!("docker run --rm {MOUNT} tools docker version >said || cat said"), Says(""))?;
    check(engine, "docker run --rm alpine cat /proc/self/uid_map", Says(FIRST))
}

fn the_strictest_holds(engine: &Engine) -> Result<(), String> {
    check(engine, "docker run --rm alpine cat /proc/self/uid_map", Says(FIRST))?;
    check(engine, "docker run --rm $S tools true", Fails(125, "docker socket mount denied"))?;
    for line in [
        "bulkhead settings set enhancedContainerIsolation false",
        "bulkhead settings set dockerSocketMount '{\"imageList\": {\"images\": [\"*\"]}}'",
    ] {
        check(engine, line, Fails(1, LOCKED_BY))?;
    }
    Ok(())
}

fn a_free_setting_is_a_default(engine: &Engine) -> Result<(), String> {
    let origin = "bulkhead settings list | awk '$1 == \"enhancedContainerIsolation\" { print $2, $3 }'";
    check(engine, origin, Says("false policy\n"))?;
    check(engine, "docker run --rm alpine cat /proc/self/uid_map", Says("         0          0 4294967295\n"))?;
    let line = format!("bulkhead settings set enhancedContainerIsolation true && {origin}");
    check(engine, &line, Holds(|said| said.ends_with("true yes\n")))
}
