//! Configuration files of dockerd and containerd.
//!
//! The user's options for dockerd (`daemon_options`) are passed on, except where they would weaken the VM's or the
//! containers' isolation. Go's JSON decoder matches keys without regard to case, so the list of dropped options does,
//! too.

use bulkhead_protocol::Configuration;
use serde_json::{Map, Value, json};

/// The isolating runtime's name, as `docker inspect` shows it.
pub(crate) const ISOLATING_RUNTIME: &str = "sysbox-runc";

/// The isolating runtime's program.
pub(crate) const ISOLATING_RUNTIME_PATH: &str = "/usr/bin/sysbox-runc";

/// The program that dockerd starts for each published port, in the place of its `docker-proxy`.
const PROXY_PATH: &str = "/usr/sbin/bulkhead-port-proxy";

/// Options of the user that are dropped: they would open another way to dockerd, move its state off the data disk, or
/// contradict its command line. dockerd refuses to start when an option is in the file and on the command line.
const RESERVED_OPTIONS: [&str; 20] = [
    "hosts",
    "containerd",
    "containerd-namespace",
    "containerd-plugin-namespace",
    "data-root",
    "graph",
    "exec-root",
    "pidfile",
    "group",
    "tls",
    "tlscacert",
    "tlscert",
    "tlskey",
    "tlsverify",
    "userns-remap",
    "userland-proxy",
    "userland-proxy-path",
    "live-restore",
    "storage-driver",
    "exec-opts",
];

/// Returns Bulkhead's defaults, which the user's options replace.
fn defaults() -> [(&'static str, Value); 3] {
    [
        ("log-driver", json!("json-file")),
        ("log-opts", json!({"max-size": "10m", "max-file": "3"})),
        ("shutdown-timeout", json!(60)),
    ]
}

/// Returns the object, or an empty one for anything else.
fn object(value: Option<Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// Returns the content of `daemon.json`: the user's options with Bulkhead's own over them.
///
/// The order of the steps is the order of precedence. `options` starts with the user's choice, defaults fill its gaps
/// (`entry().or_insert`), and an `insert` is final.
pub(crate) fn daemon(configuration: &Configuration) -> Map<String, Value> {
    let mut options: Map<String, Value> = configuration
        .daemon_options
        .iter()
        .filter(|(key, _)| !RESERVED_OPTIONS.contains(&key.to_ascii_lowercase().as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    // Asked before the loop below inserts the default driver.
    let own_log_driver = !options.contains_key("log-driver");
    for (key, value) in defaults() {
        // These log options are json-file's; dockerd does not start when they go to a driver that does not know them.
        if !options.contains_key(key) && (key != "log-opts" || own_log_driver) {
            options.insert(key.to_owned(), value);
        }
    }
    // The graph driver, not containerd's snapshotter: the isolating runtime takes the overlay apart and maps its
    // layers.
    options.insert("storage-driver".to_owned(), json!("overlay2"));
    // There is no systemd that could be asked for cgroups.
    options.insert("exec-opts".to_owned(), json!(["native.cgroupdriver=cgroupfs"]));
    // At shutdown dockerd has to stop the containers, and not to leave them running.
    options.insert("live-restore".to_owned(), json!(false));
    // One process for each published port, which makes the host listen and tells dockerd whether it does.
    options.insert("userland-proxy".to_owned(), json!(true));
    options.insert("userland-proxy-path".to_owned(), json!(PROXY_PATH));

    // Containers with IPv6 need address translation as those with IPv4 do, for the host knows only the VM's address.
    // Engines before 27 have that behind `experimental`.
    if configuration.network.as_ref().is_some_and(|network| network.ipv6.is_some()) {
        for key in ["experimental", "ip6tables"] {
            options.entry(key).or_insert(json!(true));
        }
    }

    // dockerd uses registries on 127.0.0.0/8 without TLS. For a user of the host that is the host's loopback, which the
    // guest reaches at this address, so the same holds for it; the connection does not leave the machine.
    if let Some(network) = &configuration.network {
        let mut registries = match options.remove("insecure-registries") {
            Some(Value::Array(registries)) => registries,
            _ => Vec::new(),
        };
        registries.push(json!(format!("{}/32", network.host)));
        options.insert("insecure-registries".to_owned(), Value::Array(registries));
        // `--add-host NAME:host-gateway` means the host, and not the VM's docker0, where nothing listens.
        options.entry("host-gateway-ip").or_insert(json!(network.host));
    }

    let mut features = object(options.remove("features"));
    features.insert("buildkit".to_owned(), json!(true));
    // See the storage driver above; this feature would take its place.
    features.insert("containerd-snapshotter".to_owned(), json!(false));
    options.insert("features".to_owned(), Value::Object(features));

    // With isolation the user cannot add runtimes: each would be a way around the isolating one. Without isolation ours
    // stays listed, so that containers that were created with it still start.
    let mut runtimes = object(options.remove("runtimes"));
    if configuration.isolation {
        runtimes.clear();
    }
    runtimes.insert(ISOLATING_RUNTIME.to_owned(), json!({"path": ISOLATING_RUNTIME_PATH}));
    options.insert("runtimes".to_owned(), Value::Object(runtimes));
    if configuration.isolation {
        options.insert("default-runtime".to_owned(), json!(ISOLATING_RUNTIME));
        // BuildKit runs build steps with these entitlements outside of the isolation: in the VM's network namespace, or
        // with all capabilities. Other options of the builder, such as its garbage collection, are the user's.
        let mut builder = object(options.remove("builder"));
        builder.insert("entitlements".to_owned(), json!({"network-host": false, "security-insecure": false}));
        options.insert("builder".to_owned(), Value::Object(builder));
    } else {
        options.entry("default-runtime").or_insert(json!("runc"));
    }
    options
}

/// containerd's configuration. Plugins that dockerd with a graph driver does not use are off, which shortens the start.
pub(crate) const CONTAINERD_TOML: &str = r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.grpc.v1.cri",
  "io.containerd.internal.v1.opt",
  "io.containerd.internal.v1.tracing",
  "io.containerd.nri.v1.nri",
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.native",
  "io.containerd.snapshotter.v1.zfs",
  "io.containerd.tracing.processor.v1.otlp",
]

[grpc]
address = "/run/containerd/containerd.sock"

[debug]
level = "warn"
"#;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn configuration(isolation: bool, options: Value) -> Configuration {
        Configuration {
            hostname: "bulkhead".to_owned(),
            time_unix_ns: 0,
            isolation,
            data_disk_serial: "data".to_owned(),
            network: None,
            daemon_options: object(Some(options)),
            container_environment: Vec::new(),
            socket_exceptions: Box::default(),
            block_load: false,
        }
    }

    #[test]
    fn the_hosts_registries_may_be_without_tls_beside_those_that_were_asked_for() {
        let mut configuration = configuration(true, json!({"insecure-registries": ["registry.lan:5000"]}));
        assert_eq!(daemon(&configuration)["insecure-registries"], json!(["registry.lan:5000"]));
        configuration.network = Some(bulkhead_protocol::Network {
            address: [10, 0, 0, 2].into(),
            prefix: 24,
            gateway: [10, 0, 0, 1].into(),
            nameserver: [10, 0, 0, 1].into(),
            host: [10, 0, 0, 9].into(),
            hosts_file: false,
            ipv6: None,
            mtu: 1500,
        });
        assert_eq!(daemon(&configuration)["insecure-registries"], json!(["registry.lan:5000", "10.0.0.9/32"]));
    }

    #[test]
    fn ports_are_published_by_our_own_program_whatever_is_asked_for() {
        let options = daemon(&configuration(true, json!({"userland-proxy": false, "userland-proxy-path": "/evil"})));
        assert_eq!(options["userland-proxy"], json!(true));
        assert_eq!(options["userland-proxy-path"], json!("/usr/sbin/bulkhead-port-proxy"));
    }

    #[test]
    fn with_isolation_no_runtime_but_the_isolating_one_can_be_named() {
        let wanted = json!({"runtimes": {"evil": {"path": "/usr/bin/crun"}}, "default-runtime": "evil"});
        let options = daemon(&configuration(true, wanted));
        assert_eq!(options["runtimes"], json!({"sysbox-runc": {"path": "/usr/bin/sysbox-runc"}}));
        assert_eq!(options["default-runtime"], json!("sysbox-runc"));
    }

    #[test]
    fn without_isolation_runc_is_the_default_and_other_runtimes_stay() {
        let options = daemon(&configuration(false, json!({"runtimes": {"kata": {"path": "/k"}}})));
        assert_eq!(options["default-runtime"], json!("runc"));
        assert_eq!(options["runtimes"]["kata"], json!({"path": "/k"}));
        assert!(!options.contains_key("builder"));
    }

    #[test]
    fn with_isolation_builds_get_no_host_network_and_no_insecure_mode() {
        let wanted = json!({"builder": {"gc": {"enabled": true}, "entitlements": {"network-host": true}}});
        let options = daemon(&configuration(true, wanted));
        assert_eq!(
            options["builder"],
            json!({"gc": {"enabled": true}, "entitlements": {"network-host": false, "security-insecure": false}})
        );
    }

    #[test]
    fn a_log_driver_of_the_user_gets_no_options_of_json_file() {
        let options = daemon(&configuration(true, json!({"log-driver": "local"})));
        assert_eq!(options["log-driver"], json!("local"));
        assert!(!options.contains_key("log-opts"));
        assert!(daemon(&configuration(true, json!({}))).contains_key("log-opts"));
    }

    #[test]
    fn other_options_pass_unchanged() {
        let options = daemon(&configuration(true, json!({"registry-mirrors": ["http://m"], "debug": true})));
        assert_eq!(options["registry-mirrors"], json!(["http://m"]));
        assert_eq!(options["debug"], json!(true));
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_reserved_option_gets_through(index in 0..RESERVED_OPTIONS.len(), upper in any::<u32>()) {
            let key: String = RESERVED_OPTIONS[index]
                .chars()
                .enumerate()
                .map(|(at, c)| if upper >> (at % 32) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            let options = daemon(&configuration(true, json!({ key.clone(): ["tcp://0.0.0.0:2375"] })));
            prop_assert!(options.get(&key).is_none_or(|value| *value != json!(["tcp://0.0.0.0:2375"])));
        }
    }
}
