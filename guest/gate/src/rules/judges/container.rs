//! `POST /containers/create` and `/containers/{id}/update`.

use bulkhead_policy::{logs, sources};
use serde_json::Value;

use super::{
    limits, mounts, network,
    values::{elements, is_set, members, pairs, text},
};
use crate::rules::{Refusal, SocketRequest};

/// The runtime of each container while isolation is on.
const RUNTIME: &str = "sysbox-runc";

/// Lists of block devices with limits. dockerd looks at the paths as the VM's root.
const THROTTLED: [&str; 5] =
    ["BlkioWeightDevice", "BlkioDeviceReadBps", "BlkioDeviceWriteBps", "BlkioDeviceReadIOps", "BlkioDeviceWriteIOps"];

/// Judges the path of a device. The runtime judges the device that it turns out to be.
fn device(path: &str) -> Result<(), Refusal> {
    let is_below_dev = path.strip_prefix("/dev/").is_some_and(|name| !name.is_empty());
    if is_below_dev && sources::is_clean(path) { Ok(()) } else { Err(Refusal::Device(path.to_owned())) }
}

/// Judges the members that creation and update have in common. Numbers and CPU sets are the kernel's to check.
fn resources(config: &Value) -> Result<(), Refusal> {
    limits::cgroup_parent(text(config, "CgroupParent")?)?;
    for limit in elements(config, "Ulimits")? {
        limits::rlimit(text(limit, "Name")?)?;
    }
    for mapping in elements(config, "Devices")? {
        device(text(mapping, "PathOnHost")?)?;
    }
    for list in THROTTLED {
        for throttled in elements(config, list)? {
            device(text(throttled, "Path")?)?;
        }
    }
    for request in elements(config, "DeviceRequests")? {
        // A driver `cdi` adds hooks to the container, which run as the VM's root. To requests for GPUs the engine answers
        // itself that there is no driver.
        let driver = text(request, "Driver")?;
        if !matches!(driver, "" | "nvidia") {
            return Err(Refusal::DeviceDriver(driver.to_owned()));
        }
    }
    Ok(())
}

/// Judges a host configuration, and returns true if the engine's socket is among its mounts.
///
/// Opaque are: names of other containers (`VolumesFrom`, `Links`, and modes of namespaces, of which the runtime refuses
/// the VM's own with Docker's texts), addresses and names for the container's own resolver and hosts file, options of
/// its own tmpfs mounts, sysctls and masks (set by the runtime inside of its namespaces), security options (a seccomp
/// profile comes as JSON, not as a path), storage options (the engine's driver knows only a size), and `Isolation` and
/// `ConsoleSize`, which are for Windows.
pub(super) fn host_config(host: &Value, image: &str) -> Result<bool, Refusal> {
    let has_socket = mounts::judge(host, image)?;
    let log = &host["LogConfig"];
    logs::judge(text(log, "Type")?, pairs(log, "Config")?)?;
    for (key, _) in pairs(host, "Annotations")? {
        limits::annotation(key)?;
    }
    resources(host)?;
    Ok(has_socket)
}

/// Judges the creation of a container: gives it the isolating runtime, and returns the request for the engine's socket
/// if it makes one.
pub(crate) fn create(body: &mut Value) -> Result<Option<SocketRequest>, Refusal> {
    let image = text(body, "Image")?.to_owned();
    let host = &body["HostConfig"];
    let explicit = host_config(host, &image)?;
    // Another container may have the socket, and this one would inherit it.
    let inherits = is_set(host, "VolumesFrom");
    for endpoint in members(&body["NetworkingConfig"], "EndpointsConfig")? {
        network::endpoint(endpoint)?;
    }
    // Without a host configuration the engine takes its defaults, and its default runtime is the isolating one.
    if let Some(host) = body.get_mut("HostConfig").and_then(Value::as_object_mut) {
        host.insert("Runtime".to_owned(), RUNTIME.into());
        // Any other number is one that the engine refuses.
        if let Some(score) = host.get("OomScoreAdj").and_then(Value::as_i64) {
            host.insert("OomScoreAdj".to_owned(), limits::oom_score(score).into());
        }
    }
    Ok((explicit || inherits).then_some(SocketRequest { image, explicit }))
}

/// Judges a change of a container's resources. The engine ignores a restart policy's name that it does not know.
pub(crate) fn update(body: &mut Value) -> Result<(), Refusal> {
    resources(body)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn judged(host: Value) -> Result<Option<SocketRequest>, Refusal> {
        create(&mut json!({"Image": "alpine:3.20", "HostConfig": host}))
    }

    #[test]
    fn options_of_docker_run_and_compose_pass_unchanged() {
        for host in [
            json!({}),
            json!({"Binds": ["data:/var/lib/mysql", "/anonymous", "cache:/c:ro,z", "/host_mnt/home/me/src:/app:rw"]}),
            json!({"Mounts": [
                {"Type": "volume", "Source": "db", "Target": "/db", "VolumeOptions": {"NoCopy": true, "Subpath": "a/b",
                    "Labels": {"a": "/etc"}, "DriverConfig": {"Name": "local", "Options": {}}}},
                {"Type": "volume", "Target": "/anonymous"},
                {"Type": "bind", "Source": "/host_mnt/home/me", "Target": "/x", "ReadOnly": true,
                    "BindOptions": {"Propagation": "rprivate", "CreateMountpoint": true}},
                {"Type": "tmpfs", "Target": "/t", "TmpfsOptions": {"SizeBytes": 1024, "Mode": 511}}]}),
            json!({"LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}}),
            json!({"LogConfig": {"Type": "", "Config": {}}, "RestartPolicy": {"Name": "always", "MaximumRetryCount": 0}}),
            json!({"Ulimits": [{"Name": "nofile", "Soft": 65536, "Hard": 65536}, {"Name": "memlock", "Soft": -1, "Hard": -1}]}),
            json!({"Devices": [{"PathOnHost": "/dev/fuse", "PathInContainer": "/dev/fuse", "CgroupPermissions": "rwm"}]}),
            json!({"DeviceRequests": [{"Driver": "", "Count": -1, "Capabilities": [["gpu"]]}]}),
            json!({"BlkioDeviceReadBps": [{"Path": "/dev/sda", "Rate": 1000}]}),
            json!({"NetworkMode": "host", "PidMode": "host", "IpcMode": "host", "UTSMode": "host", "UsernsMode": "host"}),
            json!({"NetworkMode": "container:web", "Links": ["db:db"], "ExtraHosts": ["host.docker.internal:host-gateway"]}),
            json!({"Privileged": true, "CapAdd": ["ALL"], "SecurityOpt": ["seccomp={}", "label=disable", "apparmor=unconfined"]}),
            json!({"Tmpfs": {"/run": "rw,noexec,size=64k"}, "Sysctls": {"net.core.somaxconn": "1024"}, "ShmSize": 1}),
            json!({"CgroupParent": "", "CgroupnsMode": "host", "OomScoreAdj": 500, "StorageOpt": {"size": "10G"}}),
            // As buildx does for its builder.
            json!({"CgroupParent": "/docker/buildx", "Annotations": {"org.example": "/etc"}, "Init": true, "MaskedPaths": []}),
        ] {
            let mut body = json!({"Image": "alpine", "HostConfig": host.clone()});
            assert_eq!(create(&mut body), Ok(None), "{host}");
            let mut expected = host;
            expected["Runtime"] = "sysbox-runc".into();
            assert_eq!(body["HostConfig"], expected);
        }
        let mut body = json!({"Image": "alpine", "Cmd": ["cat", "/etc/passwd"], "Env": ["A=/run/docker.sock"]});
        let before = body.clone();
        assert_eq!(create(&mut body), Ok(None));
        assert_eq!(body, before);
    }

    #[test]
    fn paths_drivers_and_limits_of_the_vm_are_refused() {
        for host in [
            json!({"Binds": ["/etc:/m"]}),
            json!({"Binds": ["/proc:/m"]}),
            json!({"Binds": ["/host_mnt/../etc:/m"]}),
            json!({"Binds": ["../etc:/m"]}),
            json!({"Binds": ["\\etc:/m"]}),
            json!({"Binds": ["/etc/:/m"]}),
            json!({"Binds": ["/etc\0:/m"]}),
            json!({"Binds": ["v:/y", "/var/lib/docker/volumes/v/_data:/m"]}),
            json!({"Mounts": [{"Type": "bind", "Source": "/etc", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "bind", "Source": "etc", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "volume", "Source": "/etc", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "volume", "Source": "a/../b", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "tmpfs", "Source": "/etc", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "Bind", "Source": "/host_mnt", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "cluster", "Source": "c", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "npipe", "Source": "\\\\.\\pipe\\x", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "image", "Source": "alpine", "Target": "/m"}]}),
            json!({"Mounts": [{"Source": "v", "Target": "/m"}]}),
            json!({"Mounts": [{"Type": "bind", "Source": "/host_mnt", "VolumeOptions": {"DriverConfig": {"Name": "x"}}}]}),
            json!({"Mounts": [{"Type": "volume", "VolumeOptions": {"Subpath": "../x"}}]}),
            json!({"Mounts": [{"Type": "volume", "VolumeOptions": {"DriverConfig": {"Options":
                {"type": "overlay", "device": "overlay", "o": "lowerdir=/usr/share:run/bulkhead"}}}}]}),
            json!({"VolumeDriver": "../../../var/lib/docker/volumes/t10/_data/p"}),
            json!({"LogConfig": {"Type": "syslog", "Config": {"syslog-address": "unixgram:///run/bulkhead/notify"}}}),
            json!({"LogConfig": {"Type": "", "Config": {"fluentd-address": "unix:///run/x"}}}),
            json!({"LogConfig": {"Type": "../p"}}),
            json!({"CgroupParent": "/system/t14"}),
            json!({"CgroupParent": "../../../tmp/t14"}),
            json!({"Ulimits": [{"Name": "rtprio", "Soft": 99, "Hard": 99}]}),
            json!({"Annotations": {"io.containerd.runc.v2.group": "x"}}),
            json!({"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["evil.example/dev=x"]}]}),
            json!({"Devices": [{"PathOnHost": "/etc"}]}),
            json!({"Devices": [{"PathOnHost": "/dev/../etc"}]}),
            json!({"Devices": [{"PathOnHost": "evil.example/dev=x"}]}),
            json!({"BlkioWeightDevice": [{"Path": "/var/lib/docker", "Weight": 1}]}),
        ] {
            assert!(judged(host.clone()).is_err(), "{host}");
        }
    }

    #[test]
    fn the_text_is_the_documented_one() {
        let text = judged(json!({"Binds": ["/etc/docker/daemon.json:/mnt/daemon.json"]})).unwrap_err().to_string();
        assert_eq!(
            text,
            "failed to create task for container: failed to create shim task: OCI runtime create failed: error in the \
             container spec: can't mount /etc/docker/daemon.json because it's configured as a restricted host mount: \
             unknown"
        );
        for source in ["/run", "/", "/var/run", "/run//docker.sock", "/run/docker.sock/", "/run/bulkhead/dockerd.sock"]
        {
            let refused = judged(json!({"Binds": [format!("{source}:/x")]}));
            assert_eq!(refused, Err(Refusal::socket("alpine")), "{source}");
        }
    }

    #[test]
    fn the_socket_needs_the_images_permission() {
        let asked = |explicit| Ok(Some(SocketRequest { image: "alpine:3.20".to_owned(), explicit }));
        assert_eq!(judged(json!({"Binds": ["/var/run/docker.sock:/var/run/docker.sock"]})), asked(true));
        assert_eq!(
            judged(json!({"Mounts": [{"Type": "bind", "Source": "/run/docker.sock", "Target": "/x"}]})),
            asked(true)
        );
        assert_eq!(judged(json!({"VolumesFrom": ["other:ro"]})), asked(false));
        assert!(judged(json!({"Binds": ["/run/docker.sock:/x", "/etc:/y"]})).is_err());
    }

    #[test]
    fn runtime_and_score_are_corrected() {
        let mut body = json!({"HostConfig": {"Runtime": "runc", "OomScoreAdj": -999}});
        assert_eq!(create(&mut body), Ok(None));
        assert_eq!(body, json!({"HostConfig": {"Runtime": "sysbox-runc", "OomScoreAdj": -499}}));
    }

    #[test]
    fn an_update_is_held_to_the_same() {
        let mut body = json!({"Memory": 1, "CpusetCpus": "0-1", "RestartPolicy": {"Name": "no"}, "PidsLimit": 5});
        assert_eq!(update(&mut body), Ok(()));
        assert!(update(&mut json!({"CgroupParent": "/system"})).is_err());
        assert!(update(&mut json!({"Ulimits": [{"Name": "nice"}]})).is_err());
    }

    #[test]
    fn ends_of_networks_are_judged() {
        let config = |endpoint: Value| json!({"NetworkingConfig": {"EndpointsConfig": {"n": endpoint}}});
        assert_eq!(create(&mut config(json!({"IPAMConfig": {"IPv4Address": "172.20.0.5"}}))), Ok(None));
        assert!(create(&mut config(json!({"DriverOpts": {"com.docker.network.portmap": "x"}}))).is_err());
    }

    proptest! {
        #[test]
        fn a_bind_that_passes_is_a_volume_a_share_or_asked_about(source in "(/?[a-z_.\\\\]{0,8}){0,4}") {
            match judged(json!({"Binds": [format!("{source}:/x")]})) {
                Ok(None) => prop_assert!(!source.contains('/') || source.starts_with("/host_mnt"), "{}", source),
                Ok(Some(_)) => prop_assert!(source.ends_with("/run/docker.sock"), "{}", source),
                Err(_) => {}
            }
        }
    }
}
