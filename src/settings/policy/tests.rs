use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::PathBuf,
};

use nix::{sys::stat::Mode, unistd::mkfifo};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::{
    super::{Base, NetworkKind, Settings, SettingsError, definition::SUBNET},
    *,
};

fn me() -> u32 {
    nix::unistd::geteuid().as_raw()
}

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("admin-settings.json")
    }

    fn read(&self) -> Policy {
        Policy::read(&PolicySource::new(vec![self.file()], me()))
    }
}

fn policy(text: impl AsRef<[u8]>) -> Policy {
    let place = Place::new();
    fs::write(place.file(), text).unwrap();
    place.read()
}

/// Settings of a user who wants as little protection as possible.
fn lax(policy: Policy) -> Settings {
    let text = r#"{"enhancedContainerIsolation": false, "vpnkitCIDR": "10.2.0.0/24", "proxyHttpMode": "system",
                   "overrideProxyHttp": "http://mine:1",
                   "dockerDaemonOptions": "{\"debug\": true, \"proxies\": {\"http-proxy\": \"http://mine:1\"}}"}"#;
    Settings::parse(text.as_bytes(), Path::new("settings.json")).unwrap().under(policy)
}

#[test]
fn exceptions_for_the_socket_are_locked_with_isolation() {
    let mine = r#"{"dockerSocketMount": "{\"imageList\": {\"images\": [\"mine\"]}}", "blockDockerLoad": false}"#;
    let images = |text: &str| {
        let settings = Settings::parse(mine.as_bytes(), Path::new("settings.json")).unwrap();
        settings.under(policy(text)).socket_exceptions().images
    };
    let theirs = r#""dockerSocketMount": {"imageList": {"images": ["theirs:*"]}}"#;
    assert_eq!(images("{}"), ["mine"]);
    assert_eq!(images(r#"{"enhancedContainerIsolation": {"locked": false, "value": true}}"#), ["mine"]);
    assert!(images(r#"{"enhancedContainerIsolation": {"locked": true, "value": true}}"#).is_empty());
    assert!(images("{").is_empty(), "a broken policy allows nobody");
    let with = |locked| format!(r#"{{"enhancedContainerIsolation": {{"locked": {locked}, "value": true, {theirs}}}}}"#);
    assert_eq!((images(&with(true)), images(&with(false))), (vec!["theirs:*".to_owned()], vec!["mine".to_owned()]));
    assert_eq!(Settings::default().under(policy(with(false))).socket_exceptions().images, ["theirs:*"]);
    let load = policy(r#"{"blockDockerLoad": {"locked": true, "value": true}}"#);
    assert!(Settings::parse(mine.as_bytes(), Path::new("s")).unwrap().under(load).block_load());
    assert!(!Settings::default().block_load());
}

#[test]
fn allowed_directories_are_a_limit_and_have_the_users_default_in_them() {
    let shared = |settings: Settings| {
        settings.shared_directories().into_iter().map(|directory| directory.path).collect::<Vec<_>>()
    };
    let mine = || Settings::parse(br#"{"filesharingDirectories": [{"path": "/mine"}]}"#, Path::new("s")).unwrap();
    assert!(Policy::default().allowed_directories().is_none());
    assert_eq!((shared(Settings::default()), shared(mine())), (vec!["$HOME".to_owned()], vec!["/mine".to_owned()]));
    let some = policy(
        r#"{"filesharingAllowedDirectories": [{"path": "/srv//x/"}, {"path": "$TMP/y", "sharedByDefault": true}]}"#,
    );
    let allowed = some.allowed_directories().unwrap();
    assert_eq!(allowed.paths, [Path::new("/srv/x"), Path::new("/tmp/y")]);
    assert!(allowed.file.ends_with("admin-settings.json"));
    // The plan of a VM leaves out what is not below; the list stays the user's.
    assert_eq!(shared(Settings::default().under(some.clone())), ["$TMP/y"]);
    assert_eq!(shared(mine().under(some.clone())), ["/mine"]);
    assert!(some.lock(&super::super::definition::SHARES).is_none());
    let none = policy(r#"{"filesharingAllowedDirectories": []}"#);
    assert_eq!(none.allowed_directories().unwrap().paths, Vec::<PathBuf>::new());
    assert!(shared(Settings::default().under(none)).is_empty());
    assert!(policy("{").allowed_directories().is_none(), "the limit is unknown");
}

fn problem(policy: &Policy) -> &str {
    policy.facts().unwrap().problem.as_deref().unwrap()
}

fn assert_strictest(policy: Policy) {
    assert!(policy.lock(&ISOLATION).is_some());
    let warning = policy.facts().unwrap().warning().unwrap();
    assert!(warning.contains("cannot be used") && warning.contains("on and locked"), "{warning}");
    assert!(lax(policy).isolation());
}

#[test]
fn without_a_file_everybody_decides_for_themselves() {
    let policy = Place::new().read();
    assert_eq!(policy, Policy::default());
    assert!(policy.facts().is_none() && !lax(policy).isolation());
    assert!(Settings::default().isolation());
}

#[test]
fn a_locked_value_wins_over_settings_and_a_free_one_is_a_default() {
    let locked = r#"{"configurationFileVersion": 2, "enhancedContainerIsolation": {"value": true, "locked": true}}"#;
    assert!(lax(policy(locked)).isolation());
    let off = policy(r#"{"enhancedContainerIsolation": {"value": false, "locked": true}}"#);
    assert!(!Settings::default().under(off).isolation());
    let free = policy(r#"{"enhancedContainerIsolation": {"value": true, "locked": false}}"#);
    assert!(free.lock(&ISOLATION).is_none() && !lax(free).isolation());
    let free = policy(r#"{"linuxVM": {"vpnkitCIDR": {"value": "10.9.0.0/24", "locked": false}}}"#);
    assert_eq!(Settings::default().under(free.clone()).subnet().to_string(), "10.9.0.0/24");
    assert_eq!(lax(free).subnet().to_string(), "10.2.0.0/24");
}

#[test]
fn isolation_is_locked_on_by_an_explicit_or_an_unusable_policy_only() {
    let lock = |text: &str| policy(text).isolation_lock().is_some();
    assert!(lock(r#"{"enhancedContainerIsolation": {"value": true, "locked": true}}"#) && lock("{"));
    for text in [
        "{}",
        r#"{"enhancedContainerIsolation": {"value": true, "locked": false}}"#,
        r#"{"enhancedContainerIsolation": {"value": false, "locked": true}}"#,
    ] {
        assert!(!lock(text), "{text}");
    }
    assert!(Policy::default().isolation_lock().is_none());
}

#[test]
fn a_locked_proxy_is_locked_as_a_whole_and_under_every_name() {
    let settings = lax(policy(
        r#"{"proxy": {"locked": true, "mode": "manual", "https": "http://theirs:2", "exclude": [".corp"]}}"#,
    ));
    let proxy = settings.proxy().unwrap();
    assert_eq!((proxy.http, proxy.exclude), (None, vec![".corp".to_owned()]));
    assert_eq!(proxy.https.unwrap().to_string(), "http://theirs:2");
    assert_eq!(Value::Object(settings.daemon_options()), json!({"debug": true}));
    // This mode means the proxy of the environment, not the user's own.
    let settings = lax(policy(r#"{"proxy": {"locked": true, "mode": "system"}}"#));
    assert!(settings.proxy().is_none() && !settings.daemon_options().contains_key("proxies"));
}

#[test]
fn locked_options_of_dockerd_replace_the_persons() {
    let settings =
        lax(policy(r#"{"linuxVM": {"dockerDaemonOptions": {"locked": true, "value": "{\"debug\": false}"}}}"#));
    assert_eq!(Value::Object(settings.daemon_options()), json!({"debug": false}));
    assert!(settings.daemon_options_win() && !lax(Policy::default()).daemon_options_win());
}

#[test]
fn a_locked_setting_cannot_be_set_or_unset_and_the_error_names_the_file() {
    let place = Place::new();
    fs::write(place.file(), r#"{"enhancedContainerIsolation": {"value": true, "locked": true}}"#).unwrap();
    let policy = place.read();
    let home = place.directory.path().to_owned();
    let base = Base::from_variables(|name| (name == "HOME").then(|| home.clone()), me()).unwrap();
    let paths = base.profile(&"default".parse().unwrap()).unwrap();
    for value in [Some(false.into()), Some(true.into()), None] {
        let error = Settings::update(&paths, &policy, &ISOLATION, value).unwrap_err();
        assert!(matches!(&error, SettingsError::Locked { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("enhancedContainerIsolation") && text.contains(place.file().to_str().unwrap()), "{text}");
    }
    assert!(!paths.settings().exists());
    Settings::update(&paths, &policy, &SUBNET, Some("10.1.0.0/24".into())).unwrap();
    assert!(paths.settings().exists());
}

#[test]
fn an_option_may_say_the_same_as_what_is_locked_and_nothing_else() {
    let mut policy = policy("{}");
    policy.rules.insert(super::super::NETWORK.key, Rule { value: "none".into(), locked: true });
    let settings = Settings::default().under(policy);
    assert_eq!(settings.network(), NetworkKind::None);
    assert!(settings.permit_options(Some(2), Some(512), Some(8), Some(&NetworkKind::None)).is_ok());
    let error = settings.permit_options(None, None, None, Some(&NetworkKind::User)).unwrap_err();
    assert!(error.to_string().starts_with("network is locked by "), "{error}");
}

#[test]
fn what_cannot_be_read_or_understood_means_isolation_on_and_locked() {
    for text in [
        "",
        " ",
        "{",
        "[]",
        "null",
        "true",
        "\u{feff}{}",
        "{} {}",
        r#"{"configurationFileVersion": 3}"#,
        r#"{"configurationFileVersion": "2"}"#,
        r#"{"configurationFileVersion": null}"#,
        r#"{"enhancedContainerIsolation": null}"#,
        r#"{"enhancedContainerIsolation": false}"#,
        r#"{"enhancedContainerIsolation": [false, false]}"#,
        r#"{"enhancedContainerIsolation": {"value": false}}"#,
        r#"{"enhancedContainerIsolation": {"locked": false}}"#,
        r#"{"enhancedContainerIsolation": {"locked": "false", "value": false}}"#,
        r#"{"enhancedContainerIsolation": {"locked": false, "value": 0}}"#,
        r#"{"enhancedContainerIsolation": {"locked": true, "locked": false, "value": false}}"#,
        r#"{"enhancedContainerIsolation": {"locked": true, "value": true},
            "enhancedContainerIsolation": {"locked": false, "value": false}}"#,
        r#"{"EnhancedContainerIsolation": {"locked": true, "value": true}}"#,
        r#"{"enhancedContainerIsolation": {"locked": false, "value": false, "dockerSocketMount": null}}"#,
        r#"{"enhancedContainerIsolation": {"locked": false, "value": false, "dockerSocketMount":
            {"commandList": {"type": {"deny": null}, "commands": []}}}}"#,
        r#"{"linuxVM": {"vpnkitCIDR": {"locked": false, "value": "8.8.8.0/24"}}}"#,
        r#"{"linuxVM": {"dockerDaemonOptions": {"locked": false, "value": "[]"}}}"#,
        r#"{"portBindingBehavior": {"locked": false, "value": "anywhere"}}"#,
        r#"{"filesharingAllowedDirectories": [{"path": "$HOME/../x"}]}"#,
        r#"{"containersProxy": {"locked": false, "transparentPorts": "80,x"}}"#,
    ] {
        assert_strictest(policy(text));
    }
    assert_strictest(policy(b"{\"proxy\": \"\xff\"}"));
    assert_strictest(policy(vec![b'['; 100_000]));
    assert_strictest(policy(vec![b' '; (1 << 20) + 1]));
}

#[test]
fn a_problem_is_told_with_its_place_and_without_passwords() {
    for (text, expected) in [
        ("{\n  \"proxy\": }", "expected value at line 2 column 12"),
        (r#"{"enhancedContainerIsolation": {"value": 1}}"#, "enhancedContainerIsolation.value: invalid type"),
        (
            r#"{"linuxVM": {"vpnkitCIDR": {"locked": true, "value": "x"}}}"#,
            "linuxVM.vpnkitCIDR.value: must be a private",
        ),
        (r#"{"proxy": {"locked": true, "http": "ftp://me:s3cret@x"}}"#, "proxy.http: must be a proxy"),
        (
            r#"{"containersProxy": {"locked": true, "https": "me:s3cret@x:y"}}"#,
            "containersProxy.https: must be a proxy",
        ),
        (r#"{"containersProxy": {"locked": true, "exclude": 1}}"#, "containersProxy.exclude: invalid type"),
        (
            r#"{"filesharingAllowedDirectories": [{"path": "/a"}, {"path": "b"}]}"#,
            "filesharingAllowedDirectories[1].path",
        ),
        (r#"{"BlockDockerLoad": {}}"#, "BlockDockerLoad: unknown key; did you mean blockDockerLoad?"),
    ] {
        let policy = policy(text);
        assert!(problem(&policy).contains(expected) && !problem(&policy).contains("s3cret"), "{}", problem(&policy));
    }
}

#[test]
fn keys_that_are_not_known_are_ignored_and_named() {
    let policy = policy(
        r#"{"kubernetes": {"locked": true, "enabled": false}, "enhancedContainerIsolation":
            {"locked": false, "value": false, "futureKey": [1]}, "linuxVM": {"wslEngineEnabled": {"locked": true}},
            "proxy": {"locked": true, "transparentPorts": "*"}, "containersProxy": {"locked": true, "ports": "*"}}"#,
    );
    assert!(policy.facts().unwrap().problem.is_none());
    let unknown = [
        "kubernetes",
        "enhancedContainerIsolation.futureKey",
        "linuxVM.wslEngineEnabled",
        "proxy.transparentPorts",
        "containersProxy.ports",
    ];
    assert_eq!(policy.unknown(), unknown);
    assert!(!Settings::default().under(policy).isolation());
}

#[test]
fn a_file_that_another_could_have_written_is_not_believed() {
    let place = Place::new();
    let off = r#"{"enhancedContainerIsolation": {"value": false, "locked": true}}"#;
    fs::write(place.file(), off).unwrap();
    assert!(!lax(place.read()).isolation());
    for mode in [0o664, 0o646, 0o666] {
        fs::set_permissions(place.file(), fs::Permissions::from_mode(mode)).unwrap();
        assert_strictest(place.read());
        assert!(problem(&place.read()).contains("chmod go-w"), "{}", problem(&place.read()));
    }
    fs::set_permissions(place.file(), fs::Permissions::from_mode(0o644)).unwrap();
    let other = Policy::read(&PolicySource::new(vec![place.file()], me() + 1));
    assert!(problem(&other).contains(&format!("belongs to user {}", me())), "{}", problem(&other));
    assert_strictest(other);
    fs::set_permissions(place.directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(problem(&place.read()).starts_with("its directory is writable"), "{}", problem(&place.read()));
    fs::remove_file(place.file()).unwrap();
    assert_strictest(place.read());
}

#[test]
fn what_is_no_regular_file_is_not_waited_for() {
    let place = Place::new();
    mkfifo(&place.file(), Mode::from_bits_truncate(0o600)).unwrap();
    assert_strictest(place.read());
    fs::remove_file(place.file()).unwrap();
    fs::create_dir(place.file()).unwrap();
    assert_strictest(place.read());
    fs::remove_dir(place.file()).unwrap();
    for target in ["/dev/zero", "/nowhere"] {
        symlink(target, place.file()).unwrap();
        assert!(problem(&place.read()).contains("symbolic link"), "{}", problem(&place.read()));
        assert_strictest(place.read());
        fs::remove_file(place.file()).unwrap();
    }
    assert!(validate(Path::new("/dev/zero")).unwrap_err().contains("not a regular file"));
}

#[test]
fn the_first_file_that_is_there_counts_even_if_it_cannot_be_used() {
    let (first, second) = (Place::new(), Place::new());
    fs::write(second.file(), r#"{"enhancedContainerIsolation": {"value": false, "locked": false}}"#).unwrap();
    let source = PolicySource::new(vec![first.file(), second.file()], me());
    assert_eq!(Policy::read(&source).facts().unwrap().file, second.file());
    fs::write(first.file(), "{").unwrap();
    assert_strictest(Policy::read(&source));
}

#[test]
fn another_text_is_another_policy() {
    let facts = |text: &str| {
        let mut facts = policy(text).facts().unwrap().clone();
        facts.file = PathBuf::new();
        facts
    };
    assert_eq!(facts("{}"), facts("{}"));
    assert_ne!(facts("{}"), facts("{ }"));
}

#[test]
fn the_schema_in_docs_is_current() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/admin-settings.schema.json");
    assert!(
        fs::read_to_string(&file).unwrap_or_default() == schema(),
        "write it again: bulkhead policy schema > docs/admin-settings.schema.json"
    );
}

#[test]
fn the_schema_has_every_key_and_lets_none_be_null() {
    let schema: Value = serde_json::from_str(&schema()).unwrap();
    let keys: Vec<_> = schema["properties"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys.len(), 9);
    assert!(keys.contains(&"linuxVM") && keys.contains(&"exposeDockerAPIOnTCP2375"), "{keys:?}");
    assert!(schema.get("required").is_none() && !schema.to_string().contains("null"), "{schema:#}");
    assert_eq!(schema["$defs"]["Isolation"]["required"], json!(["locked", "value"]));
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        Just(json!({"locked": false, "value": false})),
        Just(json!({"locked": true, "value": true})),
    ];
    let key = prop::sample::select(vec![
        "enhancedContainerIsolation",
        "locked",
        "value",
        "proxy",
        "linuxVM",
        "vpnkitCIDR",
        "dockerSocketMount",
        "x",
    ]);
    leaf.prop_recursive(3, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(key.clone(), inner, 0..5)
                .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

/// Isolation is off or free only if the file is valid and says so explicitly, or does not have the key.
fn assert_safe(text: &[u8]) {
    let policy = policy(text);
    let free = policy.lock(&ISOLATION).is_none() || !lax(policy.clone()).isolation();
    if free {
        let value: Value = serde_json::from_slice(text).unwrap();
        let said = value.as_object().unwrap().get("enhancedContainerIsolation");
        assert!(policy.facts().unwrap().problem.is_none());
        assert!(
            said.is_none_or(|said| said["value"].is_boolean()
                && said["locked"].is_boolean()
                && (said["value"] == false || said["locked"] == false)),
            "{value}"
        );
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_parser_panic_or_isolation_weaker(bytes in prop::collection::vec(any::<u8>(), 0..256)) {
        assert_safe(&bytes);
    }

    #[test]
    fn no_json_makes_isolation_weaker_without_saying_so(value in json_value()) {
        assert_safe(value.to_string().as_bytes());
    }

    #[test]
    fn a_locked_file_that_is_cut_off_or_damaged_stays_locked(cut in 0_usize..200, flip in any::<u8>()) {
        let whole = br#"{"enhancedContainerIsolation": {"locked": true, "value": true}, "blockDockerLoad": {"locked": true, "value": true}}"#;
        let cut = cut.min(whole.len() - 1);
        assert_strictest(policy(&whole[..cut]));
        let mut damaged = whole.to_vec();
        damaged[cut] = flip;
        assert_safe(&damaged);
    }
}
