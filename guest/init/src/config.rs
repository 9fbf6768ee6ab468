//! Configuration files of dockerd and containerd.

use bulkhead_protocol::Configuration;
use serde_json::{Map, Value, json};

/// The isolating runtime's name, as `docker inspect` shows it.
pub(crate) const ISOLATING: &str = "sysbox-runc";

/// The isolating runtime's program.
pub(crate) const ISOLATING_PATH: &str = "/usr/bin/sysbox-runc";

/// What dockerd starts for each published port.
const PROXY_PATH: &str = "/usr/sbin/bulkhead-port-proxy";

/// Options that would open another way to the daemon, move its state off the data disk, or contradict the command
/// line that init gives it; dockerd refuses to start when one is in both places.
const RESERVED: [&str; 20] = [
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

/// Options in which the person's choice wins.
fn defaults() -> [(&'static str, Value); 3] {
    [
        ("log-driver", json!("json-file")),
        ("log-opts", json!({"max-size": "10m", "max-file": "3"})),
        ("shutdown-timeout", json!(60)),
    ]
}

fn object(value: Option<Value>) -> Map<String, Value> {
    match value {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

/// `daemon.json`: the person's options, then ours over them.
pub(crate) fn daemon(configuration: &Configuration) -> Map<String, Value> {
    let mut options: Map<String, Value> = configuration
        .daemon_options
        .iter()
        .filter(|(key, _)| !RESERVED.contains(&key.to_ascii_lowercase().as_str()))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    let own_log_driver = !options.contains_key("log-driver");
    for (key, value) in defaults() {
        // The log options belong to json-file; another driver would refuse them.
        if !options.contains_key(key) && (key != "log-opts" || own_log_driver) {
            options.insert(key.to_owned(), value);
        }
    }
    options.insert("storage-driver".to_owned(), json!("overlay2"));
    options.insert("exec-opts".to_owned(), json!(["native.cgroupdriver=cgroupfs"]));
    options.insert("live-restore".to_owned(), json!(false));
    // One of these for each published port: it makes the host listen.
    options.insert("userland-proxy".to_owned(), json!(true));
    options.insert("userland-proxy-path".to_owned(), json!(PROXY_PATH));

    // Containers with IPv6 need address translation as those with IPv4 do; engines before 27 call it experimental.
    if configuration.network.as_ref().is_some_and(|network| network.ipv6.is_some()) {
        for key in ["experimental", "ip6tables"] {
            options.entry(key).or_insert(json!(true));
        }
    }

    // dockerd takes registries on its own loopback without TLS; this address is the host's loopback.
    if let Some(network) = &configuration.network {
        let mut registries = match options.remove("insecure-registries") {
            Some(Value::Array(registries)) => registries,
            _ => Vec::new(),
        };
        registries.push(json!(format!("{}/32", network.host)));
        options.insert("insecure-registries".to_owned(), Value::Array(registries));
        // `--add-host NAME:host-gateway` shall mean the host and not docker0, where nothing listens.
        options.entry("host-gateway-ip").or_insert(json!(network.host));
    }

    let mut features = object(options.remove("features"));
    features.insert("buildkit".to_owned(), json!(true));
    // The graph driver's layers are what the isolating runtime maps.
    features.insert("containerd-snapshotter".to_owned(), json!(false));
    options.insert("features".to_owned(), Value::Object(features));

    // A second runtime would be a way around the isolating one.
    let mut runtimes = object(options.remove("runtimes"));
    if configuration.isolation {
        runtimes.clear();
    }
    runtimes.insert(ISOLATING.to_owned(), json!({"path": ISOLATING_PATH}));
    options.insert("runtimes".to_owned(), Value::Object(runtimes));
    if configuration.isolation {
        options.insert("default-runtime".to_owned(), json!(ISOLATING));
        let mut builder = object(options.remove("builder"));
        builder.insert("entitlements".to_owned(), json!({"network-host": false, "security-insecure": false}));
        options.insert("builder".to_owned(), Value::Object(builder));
    } else {
        options.entry("default-runtime").or_insert(json!("runc"));
    }
    options
}

/// containerd's configuration: what dockerd's graph driver does not use stays off, which shortens the start.
pub(crate) const CONTAINERD: &str = r#"version = 2
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
    fn the_persons_log_driver_is_not_given_json_files_options() {
        let options = daemon(&configuration(true, json!({"log-driver": "local"})));
        assert_eq!(options["log-driver"], json!("local"));
        assert!(!options.contains_key("log-opts"));
        assert!(daemon(&configuration(true, json!({}))).contains_key("log-opts"));
    }

    #[test]
    fn what_is_no_concern_of_ours_passes() {
        let options = daemon(&configuration(true, json!({"registry-mirrors": ["http://m"], "debug": true})));
        assert_eq!(options["registry-mirrors"], json!(["http://m"]));
        assert_eq!(options["debug"], json!(true));
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_reserved_option_gets_through(index in 0..RESERVED.len(), upper in any::<u32>()) {
            let key: String = RESERVED[index]
                .chars()
                .enumerate()
                .map(|(at, c)| if upper >> (at % 32) & 1 == 1 { c.to_ascii_uppercase() } else { c })
                .collect();
            let options = daemon(&configuration(true, json!({ key.clone(): ["tcp://0.0.0.0:2375"] })));
            prop_assert!(options.get(&key).is_none_or(|value| *value != json!(["tcp://0.0.0.0:2375"])));
        }
    }
}
