//! Profiles and their settings.

use std::{fs, os::unix::fs::MetadataExt};

use support::program;

use crate::home::{Home, refused};

#[test]
fn an_unknown_profile_is_refused_by_every_verb_that_needs_one() {
    let home = Home::new();
    for verb in [
        &["stop"][..],
        &["status"],
        &["ports"],
        &["ports", "unpublish", "80"],
        &["logs"],
        &["restart"],
        &["settings", "list"],
    ] {
        let arguments = [&["--profile", "nowhere"], verb].concat();
        let message = refused(&home.bulkhead(&arguments), 1);
        assert!(message.contains("no profile `nowhere`"), "{message}");
    }
    assert!(fs::read_dir(home.path("config")).unwrap().next().is_none());
    assert_eq!(home.bulkhead(&["--profile", "../etc", "status"]).status.code(), Some(2));
}

#[test]
fn words_have_colours_only_where_they_are_asked_for_or_seen() {
    let home = Home::new();
    let outputs = |variable: Option<(&str, &str)>| {
        [&["status"][..], &["list"], &["doctor"], &["settings", "get", "nothing"]].map(|arguments| {
            let mut command = home.command(program());
            command.args(arguments).envs(variable);
            let output = command.output().unwrap();
            String::from_utf8([output.stdout, output.stderr].concat()).unwrap()
        })
    };
    // Its output is a pipe.
    assert!(outputs(None).iter().all(|text| !text.contains('\x1b')));
    let [status, _, doctor, error] = outputs(Some(("CLICOLOR_FORCE", "1")));
    assert!(!status.contains('\x1b'), "an engine that is stopped is neither good nor bad: {status}");
    assert!(doctor.contains("\x1b[32mPASS\x1b[0m"), "{doctor}");
    assert!(error.starts_with("\x1b[1m\x1b[31merror\x1b[0m: "), "{error:?}");
}

#[test]
fn ports_of_the_vm_are_kept_for_the_next_start_and_only_without_isolation() {
    let home = Home::new();
    let message = refused(&home.bulkhead(&["ports", "publish", "8080"]), 1);
    assert!(message.contains("only while isolation is off (bulkhead settings set"), "{message}");
    assert!(home.bulkhead(&["settings", "set", "enhancedContainerIsolation", "false"]).status.success());
    let saved = || String::from_utf8(home.bulkhead(&["settings", "get", "vmPorts"]).stdout).unwrap().trim().to_owned();
    assert!(home.bulkhead(&["ports", "publish", "8080", "127.0.0.1:53:5353/udp", "8080:8080/tcp"]).status.success());
    assert_eq!(saved(), "8080:8080/tcp,127.0.0.1:53:5353/udp");
    assert!(home.bulkhead(&["ports", "unpublish", "8080"]).status.success());
    assert_eq!(saved(), "127.0.0.1:53:5353/udp");
    let message = refused(&home.bulkhead(&["ports", "unpublish", "8080"]), 1);
    assert!(message.contains("8080:8080/tcp is not a published port of the VM"), "{message}");
    for wrong in ["0", "http", "1:2:3", "80/sctp"] {
        let output = home.bulkhead(&["ports", "publish", wrong]);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && message.contains("must be ports such as 8080"), "{message}");
    }
}

#[test]
fn settings_are_kept_per_profile_and_wrong_values_are_refused() {
    let home = Home::new();
    let get = |profile: &str, key: &str| {
        let output = home.bulkhead(&["--profile", profile, "settings", "get", key]);
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!(get("default", "enhancedContainerIsolation"), "true");
    assert!(home.bulkhead(&["settings", "set", "enhancedContainerIsolation", "false"]).status.success());
    assert!(home.bulkhead(&["--profile", "ci", "settings", "set", "cpus", "4"]).status.success());
    assert_eq!(get("default", "enhancedContainerIsolation"), "false");
    assert_eq!(get("ci", "enhancedContainerIsolation"), "true");
    assert_eq!(get("ci", "cpus"), "4");
    assert_eq!(get("default", "cpus"), "auto");
    let file = home.path("config/bulkhead/default/settings.json");
    assert_eq!(fs::read_to_string(&file).unwrap(), "{\n  \"enhancedContainerIsolation\": false\n}\n");
    assert_eq!(fs::metadata(&file).unwrap().mode() & 0o777, 0o600);
    for (key, value) in [("cpus", "0"), ("cpus", "many"), ("memoryMiB", "8G"), ("enhancedContainerIsolation", "yes")] {
        assert!(refused(&home.bulkhead(&["settings", "set", key, value]), 1).contains(key));
    }
    assert!(refused(&home.bulkhead(&["settings", "set", "nothing", "1"]), 1).contains("unknown setting `nothing`"));
    assert!(home.bulkhead(&["settings", "unset", "enhancedContainerIsolation"]).status.success());
    assert_eq!(get("default", "enhancedContainerIsolation"), "true");
    fs::write(&file, "{").unwrap();
    assert!(refused(&home.bulkhead(&["settings", "list"]), 1).contains("settings.json is not a JSON object"));
}

#[test]
fn network_settings_that_cannot_be_are_refused_with_what_can_be_and_without_passwords() {
    let home = Home::new();
    for (key, value, expected) in [
        ("network", "bridge", "user, none, passt or tap=NAME"),
        ("network", "tap=", "tap=NAME"),
        ("network", "tap=a/../b", "tap=NAME"),
        ("vpnkitCIDR", "8.8.8.0/24", "a private IPv4 network with a prefix of 16 to 28 bits"),
        ("vpnkitCIDR", "172.17.0.0/16", "172.17.0.0/16, which the engine uses"),
        ("vpnkitCIDR", "192.168.65.7/24", "by its first address"),
        ("hostLoopback", "maybe", "true or false"),
        ("proxyHttpMode", "pac", "system or manual"),
        ("overrideProxyHttp", "http://me:s3cret@proxy:99999", "http://proxy.example.org:3128"),
        ("overrideProxyHttps", "gopher://me:s3cret@proxy", "http://proxy.example.org:3128"),
        ("overrideProxyExclude", "a b", "separated by commas"),
    ] {
        let message = refused(&home.bulkhead(&["settings", "set", key, value]), 1);
        assert!(message.contains(key) && message.contains(expected), "{message}");
        assert!(!message.contains("s3cret"), "{message}");
    }
    assert!(!home.path("config/bulkhead/default/settings.json").exists());
}

#[test]
fn a_proxys_password_is_printed_only_when_it_is_asked_for_by_name() {
    let home = Home::new();
    let proxy = "http://me:s3cret@proxy.example.org:3128";
    assert!(home.bulkhead(&["settings", "set", "overrideProxyHttp", proxy]).status.success());
    for arguments in [&["settings", "list"][..], &["settings", "list", "--format", "json"]] {
        let text = String::from_utf8(home.bulkhead(arguments).stdout).unwrap();
        assert!(text.contains("http://***@proxy.example.org:3128") && !text.contains("s3cret"), "{text}");
    }
    let one = home.bulkhead(&["settings", "get", "overrideProxyHttp"]).stdout;
    assert_eq!(String::from_utf8(one).unwrap().trim_end(), proxy);
    let file = home.path("config/bulkhead/default/settings.json");
    assert_eq!(fs::metadata(file).unwrap().mode() & 0o777, 0o600);
}
