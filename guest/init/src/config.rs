//! Configuration files of dockerd and containerd.
//!
//! The user's options for dockerd (`daemon_options`) are passed on as far as [`bulkhead_policy::daemon`] takes them.

use bulkhead_policy::daemon::{DEFAULT_LOG_DRIVER, OptionError, Taken, take};
use bulkhead_protocol::Configuration;
use serde_json::{Map, Value, json};

/// The isolating runtime's name, as `docker inspect` shows it.
pub(crate) const ISOLATING_RUNTIME: &str = "sysbox-runc";

/// The isolating runtime's program.
pub(crate) const ISOLATING_RUNTIME_PATH: &str = "/usr/bin/sysbox-runc";

/// The program that dockerd starts for each published port, in the place of its `docker-proxy`.
const PROXY_PATH: &str = "/usr/sbin/bulkhead-port-proxy";

/// Returns Bulkhead's defaults, which the user's options replace.
fn defaults() -> [(&'static str, Value); 3] {
    [
        ("log-driver", json!(DEFAULT_LOG_DRIVER)),
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

/// Returns the content of `daemon.json`, the user's options with Bulkhead's own over them, and the reasons for those of
/// the user's that were left out.
///
/// The order of the steps is the order of precedence. `options` starts with the user's choice, defaults fill its gaps
/// (`entry().or_insert`), and an `insert` is final.
pub(crate) fn daemon(configuration: &Configuration) -> (Map<String, Value>, Vec<OptionError>) {
    let Taken { mut options, refused } = take(&configuration.daemon_options, configuration.isolation);
    // Asked before the loop below inserts the default driver.
    let own_log_driver = !options.contains_key("log-driver");
    for (key, value) in defaults() {
        // These log options are json-file's; dockerd does not start when they go to a driver that does not know them.
        if !options.contains_key(key) && (key != "log-opts" || own_log_driver) {
            options.insert(key.to_owned(), value);
        }
    }
    // The graph driver, not containerd's snapshotter: it mounts a container's root once, and the isolating runtime
    // id-maps a clone of that mount, so that both have the same files.
    options.insert("storage-driver".to_owned(), json!("overlay2"));
    // There is no systemd that could be asked for cgroups.
    options.insert("exec-opts".to_owned(), json!(["native.cgroupdriver=cgroupfs"]));
    // At shutdown dockerd has to stop the containers, and not to leave them running.
    options.insert("live-restore".to_owned(), json!(false));
    // One process for each published port, which makes the host listen and tells dockerd whether it does.
    options.insert("userland-proxy".to_owned(), json!(true));
    options.insert("userland-proxy-path".to_owned(), json!(PROXY_PATH));

    // Containers with IPv6 need address translation as those with IPv4 do, for the host knows only the VM's address.
    // Engines before 27 have that behind `experimental`, which also opens routes for checkpoints: the gate refuses
    // those.
    let ipv6 = configuration.network.as_ref().is_some_and(|network| network.ipv6.is_some());
    if ipv6 {
        options.insert("experimental".to_owned(), json!(true));
        options.entry("ip6tables").or_insert(json!(true));
    } else {
        // dockerd does not start with this and without `experimental`.
        options.remove("ip6tables");
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

    // The snapshotter would take the place of the storage driver above. CDI (container device interface) files name
    // programs, which the runtime would have to run as the VM's root.
    let features = json!({"buildkit": true, "containerd-snapshotter": false, "cdi": false});
    options.insert("features".to_owned(), features);
    options.insert("cdi-spec-dirs".to_owned(), json!([]));

    // With isolation the user's runtimes are not among the options taken: each would be a way around the isolating one.
    // Without isolation ours stays listed, so that containers that were created with it still start.
    let mut runtimes = object(options.remove("runtimes"));
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
    (options, refused)
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
            shares: Vec::new(),
            host_sockets: Vec::new(),
            engine_sockets: Box::default(),
        }
    }

    fn daemon_json(configuration: &Configuration) -> Map<String, Value> {
        daemon(configuration).0
    }

    fn network(ipv6: bool) -> bulkhead_protocol::Network {
        let ipv6 = ipv6.then(|| bulkhead_protocol::Network6 {
            address: [0xfd00, 0, 0, 0, 0, 0, 0, 2].into(),
            prefix: 64,
            gateway: [0xfd00, 0, 0, 0, 0, 0, 0, 1].into(),
            host: [0xfd00, 0, 0, 0, 0, 0, 0, 9].into(),
        });
        bulkhead_protocol::Network {
            address: [10, 0, 0, 2].into(),
            prefix: 24,
            gateway: [10, 0, 0, 1].into(),
            nameserver: [10, 0, 0, 1].into(),
            host: [10, 0, 0, 9].into(),
            hosts_file: false,
            ipv6,
            mtu: 1500,
        }
    }

    #[test]
    fn the_hosts_registries_may_be_without_tls_beside_those_that_were_asked_for() {
        let mut configuration = configuration(true, json!({"insecure-registries": ["registry.lan:5000"]}));
        assert_eq!(daemon_json(&configuration)["insecure-registries"], json!(["registry.lan:5000"]));
        configuration.network = Some(network(false));
        assert_eq!(daemon_json(&configuration)["insecure-registries"], json!(["registry.lan:5000", "10.0.0.9/32"]));
    }

    #[test]
    fn ports_are_published_by_our_own_program_whatever_is_asked_for() {
        let options =
            daemon_json(&configuration(true, json!({"userland-proxy": false, "userland-proxy-path": "/evil"})));
        assert_eq!(options["userland-proxy"], json!(true));
        assert_eq!(options["userland-proxy-path"], json!("/usr/sbin/bulkhead-port-proxy"));
    }

    #[test]
    fn with_isolation_no_runtime_but_the_isolating_one_can_be_named() {
        let wanted = json!({"runtimes": {"evil": {"path": "/usr/bin/crun"}}, "default-runtime": "evil"});
        let options = daemon_json(&configuration(true, wanted));
        assert_eq!(options["runtimes"], json!({"sysbox-runc": {"path": "/usr/bin/sysbox-runc"}}));
        assert_eq!(options["default-runtime"], json!("sysbox-runc"));
    }

    #[test]
    fn without_isolation_runc_is_the_default_and_other_runtimes_stay() {
        let options = daemon_json(&configuration(false, json!({"runtimes": {"kata": {"path": "/k"}}})));
        assert_eq!(options["default-runtime"], json!("runc"));
        assert_eq!(options["runtimes"]["kata"], json!({"path": "/k"}));
        assert!(!options.contains_key("builder"));
    }

    #[test]
    fn with_isolation_builds_get_no_host_network_and_no_insecure_mode() {
        let wanted = json!({"builder": {"gc": {"enabled": true}, "entitlements": {"network-host": true}}});
        let options = daemon_json(&configuration(true, wanted));
        assert_eq!(
            options["builder"],
            json!({"gc": {"enabled": true}, "entitlements": {"network-host": false, "security-insecure": false}})
        );
    }

    #[test]
    fn a_log_driver_of_the_user_gets_no_options_of_json_file() {
        let options = daemon_json(&configuration(true, json!({"log-driver": "local"})));
        assert_eq!(options["log-driver"], json!("local"));
        assert!(!options.contains_key("log-opts"));
        assert!(daemon_json(&configuration(true, json!({}))).contains_key("log-opts"));
    }

    #[test]
    fn other_options_pass_unchanged() {
        let options = daemon_json(&configuration(true, json!({"registry-mirrors": ["http://m"], "debug": true})));
        assert_eq!(options["registry-mirrors"], json!(["http://m"]));
        assert_eq!(options["debug"], json!(true));
    }

    #[test]
    fn what_the_user_may_not_set_is_left_out_and_reported() {
        let wanted = json!({"hosts": ["tcp://0.0.0.0:2375"], "features": {"cdi": true, "x": true}, "experimental": true,
            "cdi-spec-dirs": ["/var/lib/docker/volumes/v/_data"], "ip6tables": true});
        let (options, refused) = daemon(&configuration(true, wanted));
        assert!(!options.contains_key("hosts") && !options.contains_key("experimental"));
        assert_eq!(options["features"], json!({"buildkit": true, "containerd-snapshotter": false, "cdi": false}));
        assert_eq!(options["cdi-spec-dirs"], json!([]));
        assert_eq!(refused.len(), 4);
        // Without `experimental` dockerd would not start with it.
        assert!(!options.contains_key("ip6tables"));
    }

    #[test]
    fn ipv6_takes_what_engines_before_27_call_experimental() {
        let mut configuration = configuration(true, json!({"experimental": false, "ip6tables": false}));
        configuration.network = Some(network(true));
        let options = daemon_json(&configuration);
        assert_eq!((&options["experimental"], &options["ip6tables"]), (&json!(true), &json!(false)));
        configuration.network = Some(network(false));
        assert!(!daemon_json(&configuration).contains_key("experimental"));
    }
}
