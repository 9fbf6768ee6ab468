//! The mounts of a container at the moment that dockerd opens its files.
//!
//! A container and its volumes were judged when they were created. That can have been before isolation was switched on,
//! and a link that was harmless then can lead elsewhere now. `docker cp`, `export`, `commit` and `start` make dockerd
//! open the mounts as the VM's root, so they are judged again; and so are the networks that a container joins.

use std::collections::BTreeSet;

use hyper::StatusCode;
use serde_json::Value;
use tokio::task::JoinSet;

use crate::{
    dockerd::{Dockerd, DockerdError, encode_segment},
    error::ProxyError,
    gate::Gate,
    rules::{Refusal, api::OpensFiles, judges},
};

/// Maximum number of a container's volumes, each of which is a question to dockerd.
const MAX_VOLUMES: usize = 64;

/// Judges the mounts of a container, and returns its full ID.
///
/// The name of a container can change its meaning between this answer and the request. So the request has to go on with
/// the ID, and one for a name that means no container yet ends here, with dockerd's own words.
pub(crate) async fn judge(gate: &Gate, container: &str, opens_files: OpensFiles) -> Result<String, ProxyError> {
    let dockerd = Dockerd::new(&gate.upstream);
    let path = format!("/containers/{}/json", encode_segment(container));
    let description: Value = dockerd.get(&path).await.map_err(|error| match error {
        DockerdError::Status(StatusCode::NOT_FOUND) => ProxyError::NoContainer(container.to_owned()),
        DockerdError::Status(StatusCode::BAD_REQUEST) => ProxyError::AmbiguousContainer(container.to_owned()),
        error => failed(error),
    })?;
    let names = volumes(&description);
    if names.len() > MAX_VOLUMES {
        return Err(Refusal::TooManyVolumes(MAX_VOLUMES).into());
    }
    // All at once, since dockerd answers from memory. Without volumes the description is the only question.
    let mut questions = JoinSet::new();
    for name in names {
        let (dockerd, path) = (dockerd.clone(), format!("/volumes/{}", encode_segment(name)));
        questions.spawn(async move { volume(&dockerd, &path).await });
    }
    let mut volumes = Vec::with_capacity(questions.len());
    while let Some(answer) = questions.join_next().await {
        volumes.extend(answer.map_err(ProxyError::InspectionAborted)??);
    }
    judges::in_use::mounts(&description, &volumes)?;
    let sources: Vec<_> = shared_sources(&description, &volumes).collect();
    if !sources.is_empty() {
        let shares = gate.shares();
        sources.into_iter().try_for_each(|source| shares.judge(source))?;
    }
    if opens_files == OpensFiles::AtStart {
        judges::in_use::settings(&description)?;
        for name in networks(&description) {
            network(gate, name).await?;
        }
    }
    let id = description["Id"].as_str().filter(|id| bulkhead_protocol::is_container_id(id));
    id.map(ToOwned::to_owned).ok_or(ProxyError::InvalidResponse)
}

/// Judges a network that a container joins.
pub(crate) async fn network(gate: &Gate, name: &str) -> Result<(), ProxyError> {
    let path = format!("/networks/{}", encode_segment(name));
    match Dockerd::new(&gate.upstream).get(&path).await {
        Ok(description) => Ok(judges::network::joined(&description, &gate.vm_network)?),
        // The engine refuses it itself, in its own words. One that is made meanwhile is judged when it is made.
        Err(DockerdError::Status(StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST)) => Ok(()),
        Err(DockerdError::Connect(error)) => Err(ProxyError::Unreachable(error)),
        Err(error) => Err(ProxyError::NetworkCheck(error)),
    }
}

/// Returns the names of the networks that a container joins at its start, without the engine's own.
fn networks(container: &Value) -> impl Iterator<Item = &str> {
    let networks = container["NetworkSettings"]["Networks"].as_object().into_iter().flatten();
    networks.map(|(name, _)| name.as_str()).filter(|name| !judges::network::PREDEFINED.contains(name))
}

/// Returns the names of the volumes that a container mounts, each once.
fn volumes(container: &Value) -> BTreeSet<&str> {
    let mounts = container["Mounts"].as_array().map(Vec::as_slice).unwrap_or_default();
    mounts.iter().filter_map(|mount| mount["Name"].as_str()).filter(|name| !name.is_empty()).collect()
}

/// Returns the paths that a container mounts, itself or by its volumes.
fn shared_sources<'a>(container: &'a Value, volumes: &'a [Value]) -> impl Iterator<Item = &'a str> {
    let mounts = container["Mounts"].as_array().map(Vec::as_slice).unwrap_or_default();
    let binds = mounts.iter().filter(|mount| mount["Type"] == "bind").filter_map(|mount| mount["Source"].as_str());
    binds.chain(volumes.iter().filter_map(|volume| volume["Options"]["device"].as_str()))
}

/// Asks for a volume; `None` if the engine has none of this name.
async fn volume(dockerd: &Dockerd, path: &str) -> Result<Option<Value>, ProxyError> {
    match dockerd.get(path).await {
        Ok(description) => Ok(Some(description)),
        // The judge refuses a mount of it.
        Err(DockerdError::Status(StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST)) => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn failed(error: DockerdError) -> ProxyError {
    match error {
        DockerdError::Connect(error) => ProxyError::Unreachable(error),
        error => ProxyError::MountCheck(error),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_was_shared_once_and_is_no_more_is_refused() {
        let container = json!({"Mounts": [{"Type": "volume", "Source": "/host_mnt/x", "Name": "v"},
            {"Type": "bind", "Source": "/host_mnt/home/me"}, {"Type": "bind", "Source": "/lib/modules"}]});
        let volumes = [json!({"Options": {"device": "/host_mnt/srv", "o": "bind"}}), json!({"Options": null})];
        let sources: Vec<_> = shared_sources(&container, &volumes).collect();
        assert_eq!(sources, ["/host_mnt/home/me", "/lib/modules", "/host_mnt/srv"]);
    }

    #[test]
    fn each_volume_is_asked_about_once_and_binds_are_not() {
        let container = json!({"Mounts": [
            {"Type": "bind", "Source": "/x", "Destination": "/a"},
            {"Type": "volume", "Name": "v", "Destination": "/b"},
            {"Type": "volume", "Name": "v", "Destination": "/c"},
            {"Type": "tmpfs", "Name": "", "Destination": "/d"},
        ]});
        assert_eq!(volumes(&container).into_iter().collect::<Vec<_>>(), ["v"]);
        assert!(volumes(&json!({"Mounts": null})).is_empty());
    }
}
