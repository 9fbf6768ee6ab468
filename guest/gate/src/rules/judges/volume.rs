//! `POST /volumes/create`.

use bulkhead_policy::{sources, volumes};
use serde_json::Value;

use super::values::{is_set, pairs, text};
use crate::rules::{Refusal, reaches_engine_socket};

/// Judges the creation of a volume. Labels are opaque: the engine stores them.
pub(crate) fn create(body: &mut Value) -> Result<(), Refusal> {
    if is_set(body, "ClusterVolumeSpec") {
        // Cluster volumes are mounted by plugins, which there are not.
        return Err(Refusal::Feature("a cluster volume"));
    }
    let name = text(body, "Name")?;
    if !name.is_empty() {
        sources::volume_name(name)?;
    }
    volumes::judge(text(body, "Driver")?, pairs(body, "DriverOpts")?).map_err(|error| match error {
        volumes::Error::Source(sources::Error::Restricted(path)) if reaches_engine_socket(&path) => {
            Refusal::SocketVolume { name: name.to_owned() }
        }
        error => error.into(),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(mut body: Value) -> Result<(), Refusal> {
        let before = body.clone();
        let judged = create(&mut body);
        assert_eq!(body, before);
        judged
    }

    #[test]
    fn ordinary_volumes_pass_unchanged() {
        for body in [
            json!({}),
            json!({"Name": "tardis", "Labels": {"com.example": "/etc"}, "Driver": "local"}),
            json!({"Name": "foo", "DriverOpts": {"type": "tmpfs", "device": "tmpfs", "o": "size=100m,uid=1000"}}),
            json!({"DriverOpts": {"type": "nfs", "o": "addr=192.168.1.1,rw", "device": ":/path/to/dir"}}),
            json!({"DriverOpts": {"size": "20g"}}),
        ] {
            assert_eq!(judged(body.clone()), Ok(()), "{body}");
        }
    }

    #[test]
    fn volumes_of_the_vm_plugins_and_names_that_are_paths_are_refused() {
        for body in [
            json!({"Driver": "../../../var/lib/docker/volumes/t10/_data/p"}),
            json!({"DriverOpts": {"type": "overlay", "device": "overlay", "o": "lowerdir=/etc:/usr"}}),
            json!({"DriverOpts": {"type": "proc", "device": "proc"}}),
            json!({"DriverOpts": {"type": "none", "device": "/etc", "o": "bind"}}),
            json!({"Name": "../x"}),
            json!({"ClusterVolumeSpec": {"Group": "x"}}),
            json!({"DriverOpts": {"type": 1}}),
        ] {
            assert!(judged(body.clone()).is_err(), "{body}");
        }
        let socket = json!({"Name": "v", "DriverOpts": {"type": "none", "o": "bind", "device": "/run/docker.sock"}});
        assert_eq!(judged(socket), Err(Refusal::SocketVolume { name: "v".to_owned() }));
    }
}
