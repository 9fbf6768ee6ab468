//! `POST /services/create` and `/services/{id}/update`.

use bulkhead_policy::logs;
use serde_json::Value;

use super::{
    limits, mounts, network,
    values::{elements, is_set, pairs, text},
};
use crate::rules::Refusal;

/// Judges the container of a service. Targets of secrets and configurations are paths in the container; everything else
/// is opaque as for other containers.
fn container(spec: &Value) -> Result<(), Refusal> {
    let image = text(spec, "Image")?;
    // Swarm resolves the images of a service later, so no creation comes at which one could be allowed the socket.
    if mounts::judge(spec, image)? {
        return Err(Refusal::socket(image));
    }
    for limit in elements(spec, "Ulimits")? {
        limits::rlimit(text(limit, "Name")?)?;
    }
    // Files and registry keys with credentials of Windows.
    if ["Config", "File", "Registry"].iter().any(|key| is_set(&spec["Privileges"]["CredentialSpec"], key)) {
        return Err(Refusal::Feature("a credential spec"));
    }
    Ok(())
}

/// Judges a service that is created or changed.
pub(crate) fn create_or_update(body: &mut Value) -> Result<(), Refusal> {
    let task = &body["TaskTemplate"];
    // A plugin would run as the VM's root, and an attachment is for containers that swarm has not made.
    if is_set(task, "PluginSpec") || is_set(task, "NetworkAttachmentSpec") {
        return Err(Refusal::Feature("a service that is not made of containers"));
    }
    if !matches!(text(task, "Runtime")?, "" | "container") {
        return Err(Refusal::Feature("a service that is not made of containers"));
    }
    container(&task["ContainerSpec"])?;
    log_driver(&task["LogDriver"])?;
    for networks in [elements(task, "Networks")?, elements(body, "Networks")?] {
        for attachment in networks {
            network::endpoint(attachment)?;
        }
    }
    Ok(())
}

/// Judges the log of a service, or the default one of a swarm.
pub(super) fn log_driver(driver: &Value) -> Result<(), Refusal> {
    Ok(logs::judge(text(driver, "Name")?, pairs(driver, "Options")?)?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn ordinary_services_pass_unchanged() {
        for body in [
            json!({"Name": "web", "TaskTemplate": {"ContainerSpec": {"Image": "nginx:alpine", "Mounts": [
                {"Type": "volume", "Source": "web-data", "Target": "/usr/share/nginx/html",
                    "VolumeOptions": {"Labels": {"a": "b"}, "DriverConfig": {}}}], "User": "33",
                "Secrets": [{"File": {"Name": "www.key", "UID": "33", "GID": "33", "Mode": 256}, "SecretID": "x"}],
                "DNSConfig": {"Nameservers": ["8.8.8.8"]}, "Hosts": ["10.10.10.10 host1"]},
                "LogDriver": {"Name": "json-file", "Options": {"max-file": "3", "max-size": "10M"}},
                "Networks": [{"Target": "overlay1", "Aliases": ["web"]}], "Runtime": "container",
                "Placement": {"Constraints": ["node.role==worker"]}}, "Mode": {"Replicated": {"Replicas": 4}}}),
            json!({"TaskTemplate": {"ContainerSpec": {"Image": "a", "Privileges": {"CredentialSpec": null}}}}),
        ] {
            let mut judged = body.clone();
            assert_eq!(create_or_update(&mut judged), Ok(()), "{body}");
            assert_eq!(judged, body);
        }
    }

    #[test]
    fn services_are_held_to_the_rules_of_containers_and_never_have_the_socket() {
        let mount = |mount: Value| json!({"TaskTemplate": {"ContainerSpec": {"Image": "alpine", "Mounts": [mount]}}});
        let socket = json!({"Type": "bind", "Source": "/var/run/docker.sock", "Target": "/s"});
        assert_eq!(create_or_update(&mut mount(socket)), Err(Refusal::socket("alpine")));
        for body in [
            mount(json!({"Type": "bind", "Source": "/etc", "Target": "/m"})),
            mount(json!({"Type": "cluster", "Source": "g", "Target": "/m"})),
            mount(json!({"Type": "volume", "VolumeOptions": {"DriverConfig": {"Name": "../p"}}})),
            json!({"TaskTemplate": {"Runtime": "plugin", "PluginSpec": {"Remote": "vieux/sshfs"}}}),
            json!({"TaskTemplate": {"Runtime": "attachment"}}),
            json!({"TaskTemplate": {"NetworkAttachmentSpec": {"ContainerID": "x"}}}),
            json!({"TaskTemplate": {"LogDriver": {"Name": "syslog", "Options": {"syslog-address": "unix:///x"}}}}),
            json!({"TaskTemplate": {"ContainerSpec": {"Ulimits": [{"Name": "rtprio", "Hard": 99}]}}}),
            json!({"TaskTemplate": {"ContainerSpec": {"Privileges": {"CredentialSpec": {"File": "../../x"}}}}}),
            json!({"TaskTemplate": {"Networks": [{"Target": "n", "DriverOpts": {"com.docker.network.portmap": ""}}]}}),
        ] {
            assert!(create_or_update(&mut body.clone()).is_err(), "{body}");
        }
    }
}
