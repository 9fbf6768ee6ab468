//! The administrator's policy.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use serde_json::json;
use support::program;

use crate::{
    home::{Home, is_root, refused},
    start::{has_kvm, put_image},
};

const LOCKED: &str = r#"{"enhancedContainerIsolation": {"value": true, "locked": true}}"#;

/// The refusal of another image under it.
const NO_OTHER: &str = "enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json, so no other guest \
                        image can be named; leave out --kernel and --rootfs, and unset BULKHEAD_KERNEL and \
                        BULKHEAD_ROOTFS";

/// The demand on the image, and on the program, under it.
const ROOTS: &str = "must be one that only root can change";

/// The program where `policy` is this machine's: the program is in namespaces in which /etc is another one. `None`
/// where this user may not make such namespaces.
pub fn under(home: &Home, policy: &str) -> Option<Command> {
    program_under(home, policy, program())
}

/// The same for a copy of the program.
fn program_under(home: &Home, policy: &str, program: &str) -> Option<Command> {
    const PREPARE: &str = "umask 022 && mount -t tmpfs none /etc && mkdir /etc/bulkhead && \
                           printf %s \"$1\" >/etc/bulkhead/admin-settings.json && shift && exec \"$@\"";
    let command = |words: &[&str]| {
        let mut command = home.command("unshare");
        command.args(["--map-root-user", "--mount", "sh", "-c", PREPARE, "sh", policy]).args(words);
        command
    };
    command(&["true"]).output().is_ok_and(|output| output.status.success()).then(|| command(&[program]))
}

/// A kernel and a root file system beside those of [`put_image`], as options have them.
fn another_image(home: &Home) -> [String; 2] {
    put_image(home);
    ["vmlinux", "rootfs.erofs"].map(|name| {
        let other = home.path(&format!("other-{name}"));
        fs::copy(home.path("data/bulkhead/image").join(name), &other).unwrap();
        other.to_str().unwrap().to_owned()
    })
}

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
    assert_eq!(warning, "warning: unknown key analyticsEnabled is ignored\n");
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
    assert!(message.contains("not a regular file"), "{message}");
}

#[test]
fn the_result_of_a_check_is_json_for_programs_whether_the_file_is_valid_or_not() {
    let home = Home::new();
    let file = home.path("policy.json");
    for (text, valid, unknown, problem) in [
        (r#"{"configurationFileVersion": 2, "analyticsEnabled": {}}"#, true, json!(["analyticsEnabled"]), ""),
        ("{\n  \"proxy\": }", false, json!([]), "line 2 column 12"),
    ] {
        fs::write(&file, text).unwrap();
        let output = home.bulkhead(&["policy", "validate", "--format", "json", file.to_str().unwrap()]);
        assert_eq!((output.status.code(), &output.stderr[..]), (Some(i32::from(!valid)), &b""[..]));
        let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&result["valid"], &result["unknown"]), (&json!(valid), &unknown), "{result}");
        assert_eq!(result["problem"].is_null(), valid, "{result}");
        assert!(result["problem"].as_str().unwrap_or_default().contains(problem), "{result}");
    }
}

#[test]
fn the_schema_of_the_policy_is_printed_as_it_is_in_docs() {
    let output = Home::new().bulkhead(&["policy", "schema"]);
    let shipped = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/admin-settings.schema.json")).unwrap();
    assert!(output.status.success() && output.stdout == shipped);
}

#[test]
fn a_locked_policy_leaves_the_installed_image_and_refuses_to_have_another_named() {
    let home = Home::new();
    let [kernel, rootfs] = another_image(&home);
    let doctor = |policy: &str, variables: &[(&str, &String)]| {
        let output = under(&home, policy)?.arg("doctor").envs(variables.iter().copied()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        Some(text.lines().find(|line| line.contains(" image: ")).unwrap_or_else(|| panic!("{text}")).to_owned())
    };
    let both = [("BULKHEAD_KERNEL", &kernel), ("BULKHEAD_ROOTFS", &rootfs)];
    let Some(line) = doctor(LOCKED, &both) else { return };
    assert!(line.ends_with(&format!(" FAIL image: {NO_OTHER}")), "{line}");
    for variable in both {
        let line = doctor(LOCKED, &[variable]).unwrap();
        assert!(line.ends_with(&format!(" FAIL image: {NO_OTHER}")), "{line}");
    }
    // That one is damaged, and was looked at, if it is root's.
    let line = doctor(LOCKED, &[]).unwrap();
    let looked_at = line.contains("/data/bulkhead/image/vmlinux does not match the SHA-256");
    assert!(looked_at || !is_root() && line.contains(ROOTS), "{line}");
    let free = r#"{"enhancedContainerIsolation": {"value": true, "locked": false}}"#;
    for policy in [free, "{}"] {
        let line = doctor(policy, &both).unwrap();
        assert!(line.contains(" PASS image: ") && line.contains("/other-rootfs.erofs"), "{line}");
    }
    assert!(doctor("{", &both).unwrap().contains(NO_OTHER), "a policy that cannot be used is the strictest");
}

#[test]
fn start_refuses_another_image_under_a_locked_policy() {
    let home = Home::new();
    let [kernel, rootfs] = another_image(&home);
    if !has_kvm() {
        return;
    }
    // With more memory than there is, what finds its image ends, too.
    let start = |arguments: &[&str], variables: &[(&str, &String)]| {
        let mut command = under(&home, LOCKED)?;
        command.env("BULKHEAD_TRY_ANY_KVM", "1").envs(variables.iter().copied());
        Some(refused(&command.args(["start", "--memory", "900T"]).args(arguments).output().unwrap(), 1))
    };
    let Some(message) = start(&["--kernel", &kernel, "--rootfs", &rootfs], &[]) else { return };
    assert_eq!(message, format!("error: {NO_OTHER}\n"));
    let message = start(&[], &[("BULKHEAD_KERNEL", &kernel), ("BULKHEAD_ROOTFS", &rootfs)]).unwrap();
    assert_eq!(message, format!("error: {NO_OTHER}\n"));
    let message = start(&[], &[]).unwrap();
    assert!(message.contains("but this machine has") || !is_root() && message.contains(ROOTS), "{message}");
}

#[test]
fn an_image_that_others_can_change_is_refused_under_a_locked_policy_with_its_path_and_the_remedy() {
    let home = Home::new();
    put_image(&home);
    let directory = fs::canonicalize(home.path("data/bulkhead/image")).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let problem = format!(
        "enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json, so the guest image {ROOTS}, but {} is \
         writable by users other than its owner; use the bulkhead of an installed package, or ask the administrator to \
         install one",
        directory.display()
    );
    let Some(mut command) = under(&home, LOCKED) else { return };
    let output = command.args(["policy", "show"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains(&format!("\nguest image: `start` is refused: {problem}\n")), "{text}");
    let free = under(&home, "{}").unwrap().args(["policy", "show"]).output().unwrap();
    assert!(!String::from_utf8(free.stdout).unwrap().contains("guest image"));
    if has_kvm() {
        let mut command = under(&home, LOCKED).unwrap();
        let output = command.arg("start").env("BULKHEAD_TRY_ANY_KVM", "1").output().unwrap();
        assert_eq!(refused(&output, 1), format!("error: {problem}\n"));
    }
}

#[test]
fn a_program_that_others_can_change_starts_nothing_under_a_locked_policy() {
    let home = Home::new();
    put_image(&home);
    let copy = home.path("bulkhead");
    fs::copy(program(), &copy).unwrap();
    let copy = fs::canonicalize(copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o757)).unwrap();
    let copy = copy.to_str().unwrap();
    let problem = format!(
        "enhancedContainerIsolation is locked by /etc/bulkhead/admin-settings.json, so the program {ROOTS}, but {copy} is \
         writable by users other than its owner; use the bulkhead of an installed package, or ask the administrator to \
         install one"
    );
    let Some(mut command) = program_under(&home, LOCKED, copy) else { return };
    let text = String::from_utf8(command.args(["policy", "show"]).output().unwrap().stdout).unwrap();
    assert!(text.contains(&format!("\nprogram: `start` is refused: {problem}\n")), "{text}");
    // An image that is not root's is found first, and for another user than root none is.
    if has_kvm() && is_root() {
        let mut command = program_under(&home, LOCKED, copy).unwrap();
        let output = command.arg("start").env("BULKHEAD_TRY_ANY_KVM", "1").output().unwrap();
        assert_eq!(refused(&output, 1), format!("error: {problem}\n"));
    }
}

#[test]
fn policy_show_says_whether_image_names_count_for_this_user() {
    let home = Home::new();
    let policy = r#"{"enhancedContainerIsolation": {"value": true, "locked": true, "dockerSocketMount":
                     {"imageList": {"images": ["docker:cli"]}}}}"#;
    let show = |proxy: Option<&str>| {
        let mut command = under(&home, policy)?;
        for variable in ["HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"] {
            command.env_remove(variable);
        }
        let output = command.args(["policy", "show"]).envs(proxy.map(|url| ("HTTPS_PROXY", url))).output().unwrap();
        Some(String::from_utf8(output.stdout).unwrap())
    };
    let Some(text) = show(None) else { return };
    assert!(text.ends_with("\nimage names: OK\n"), "{text}");
    let text = show(Some("http://mine:1")).unwrap();
    assert!(text.ends_with("the user can choose the engine's proxy; lock `proxy` or `containersProxy`\n"), "{text}");
}

#[test]
fn a_backend_refuses_another_image_under_a_locked_policy_whoever_asks() {
    let home = Home::new();
    let [kernel, rootfs] = another_image(&home);
    if !has_kvm() {
        return;
    }
    let Some(mut command) = under(&home, LOCKED) else { return };
    let _backend = Home::listening(command.arg("backend").env("BULKHEAD_TRY_ANY_KVM", "1"));
    let answer = home.post("/v1/start", &json!({"kernel": kernel, "rootfs": rootfs}).to_string());
    assert!(answer.starts_with("HTTP/1.1 2"), "{answer}");
    let deadline = Instant::now() + Duration::from_secs(20);
    let status = loop {
        let status = home.status();
        if status["state"] == "failed" {
            break status;
        }
        assert!(Instant::now() < deadline, "{status}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status["reason"], NO_OTHER);
}
