//! Mounts of containers that exist already, judged again before the engine uses them.
//!
//! A container or a volume may be from a time without isolation, and tasks of a swarm are not created through the gate.
//! dockerd mounts and opens their sources as the VM's root for `docker cp`, `commit`, `export` and at the start.

use bulkhead_policy::{sources, volumes};
use serde_json::Value;

use super::{
    container, mounts,
    values::{elements, pairs, text},
};
use crate::rules::Refusal;

/// Judges a volume as the engine describes it.
fn volume(name: &str, volumes: &[Value]) -> Result<(), Refusal> {
    sources::volume_name(name)?;
    // A volume that nobody looked up may be anything.
    let volume = volumes
        .iter()
        .find(|volume| volume["Name"].as_str() == Some(name))
        .ok_or_else(|| Refusal::UnknownVolume(name.to_owned()))?;
    Ok(volumes::judge(text(volume, "Driver")?, pairs(volume, "Options")?)?)
}

/// Judges the mounts of a container by `GET /containers/ID/json` and, for every mount of type `volume` in it, whether the
/// volume has a name of the user's or of the engine's, `GET /volumes/NAME`.
///
/// The engine's socket passes: the grant of the container decides about it when it starts, and a copy from it fails.
pub(crate) fn mounts(container: &Value, volumes: &[Value]) -> Result<(), Refusal> {
    let image = container["Config"]["Image"].as_str().unwrap_or_default();
    // Both: `Mounts` has what the engine made of the configuration, which it reads again at the start.
    mounts::judge(&container["HostConfig"], image)?;
    for mount in elements(container, "Mounts")? {
        match text(mount, "Type")? {
            "bind" => {
                sources::bind(text(mount, "Source")?)?;
            }
            "volume" => volume(text(mount, "Name")?, volumes)?,
            "tmpfs" => {}
            kind => return Err(Refusal::MountType(kind.to_owned())),
        }
    }
    Ok(())
}

/// Judges the other settings of a container by `GET /containers/ID/json`, for its start: its log, devices and limits.
pub(crate) fn settings(container: &Value) -> Result<(), Refusal> {
    let image = container["Config"]["Image"].as_str().unwrap_or_default();
    container::host_config(&container["HostConfig"], image).map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn container(mount: Value) -> Value {
        json!({"Id": "x", "Config": {"Image": "alpine"}, "HostConfig": {"Binds": null}, "Mounts": [mount]})
    }

    #[test]
    fn volumes_shares_the_socket_and_tmpfs_are_allowed() {
        let anonymous = "0".repeat(64);
        let volumes = [
            json!({"Name": "v", "Driver": "local", "Options": null, "Scope": "local"}),
            json!({"Name": anonymous, "Driver": "local", "Options": null}),
            json!({"Name": "t", "Driver": "local", "Options": {"type": "tmpfs", "device": "tmpfs"}}),
        ];
        for mount in [
            json!({"Type": "volume", "Name": "v", "Source": "/var/lib/docker/volumes/v/_data", "Driver": "local"}),
            json!({"Type": "volume", "Name": anonymous, "Source": "/var/lib/docker/volumes/x/_data", "Driver": "local"}),
            json!({"Type": "volume", "Name": "t", "Driver": "local"}),
            json!({"Type": "bind", "Source": "/var/run/docker.sock", "Destination": "/s"}),
            json!({"Type": "bind", "Source": "/host_mnt/home/me", "Destination": "/s"}),
            json!({"Type": "tmpfs", "Source": "", "Destination": "/t"}),
        ] {
            assert_eq!(mounts(&container(mount.clone()), &volumes), Ok(()), "{mount}");
        }
        assert_eq!(mounts(&json!({"HostConfig": {}, "Mounts": []}), &[]), Ok(()));
    }

    #[test]
    fn what_was_made_without_isolation_is_refused_when_it_is_used() {
        let volumes = [
            json!({"Name": "o", "Driver": "local", "Options": {"type": "overlay", "device": "x", "o": "lowerdir=/etc:/usr"}}),
            json!({"Name": "b", "Driver": "local", "Options": {"type": "none", "device": "/etc", "o": "bind"}}),
            json!({"Name": "p", "Driver": "../p", "Options": null}),
        ];
        for mount in [
            json!({"Type": "bind", "Source": "/etc"}),
            json!({"Type": "bind", "Source": "/proc"}),
            json!({"Type": "volume", "Name": "o"}),
            json!({"Type": "volume", "Name": "b"}),
            json!({"Type": "volume", "Name": "p"}),
            json!({"Type": "volume", "Name": "unknown"}),
            json!({"Type": "volume", "Name": ""}),
            json!({"Type": "cluster", "Name": "o"}),
            json!({"Source": "/host_mnt"}),
        ] {
            assert!(mounts(&container(mount.clone()), &volumes).is_err(), "{mount}");
        }
        let configured = json!({"HostConfig": {"Binds": ["/etc:/m"]}, "Mounts": []});
        assert!(mounts(&configured, &[]).is_err());
    }

    #[test]
    fn a_log_from_a_time_without_isolation_is_refused_at_the_start() {
        let host = |kind: &str, config: Value| {
            json!({"HostConfig": {"LogConfig": {"Type": kind, "Config": config},
            "Runtime": "runc", "CgroupParent": "", "Devices": [], "Ulimits": null, "OomScoreAdj": 0}})
        };
        assert_eq!(settings(&host("json-file", json!({}))), Ok(()));
        assert!(settings(&host("syslog", json!({"syslog-address": "unixgram:///run/bulkhead/notify"}))).is_err());
    }
}
