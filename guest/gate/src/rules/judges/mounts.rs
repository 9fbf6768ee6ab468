//! The mounts of a container or of a service: `Binds`, `Mounts`, and volumes that are made on the fly.

use bulkhead_policy::{
    drivers,
    sources::{self, BindSource, Source},
    volumes,
};
use serde_json::Value;

use super::values::{elements, pairs, text, texts};
use crate::rules::{Refusal, reaches_engine_socket};

/// Replaces the refusal of a path by Docker's own about the socket if the path leads to an engine's socket.
fn named(error: sources::Error, image: &str) -> Refusal {
    match &error {
        sources::Error::Restricted(path) | sources::Error::NotShared(path) if reaches_engine_socket(path) => {
            Refusal::socket(image)
        }
        _ => error.into(),
    }
}

/// Judges a volume that a mount may create.
fn volume_options(options: &Value, image: &str) -> Result<(), Refusal> {
    let config = &options["DriverConfig"];
    volumes::judge(text(config, "Name")?, pairs(config, "Options")?).map_err(|error| match error {
        volumes::Error::Source(error) => named(error, image),
        error => error.into(),
    })?;
    // The engine opens it below the volume without leaving that. Here only the clear cases are refused early.
    let subpath = text(options, "Subpath")?;
    if subpath.is_empty() || sources::is_clean(&format!("/{subpath}")) {
        Ok(())
    } else {
        Err(sources::Error::Restricted(subpath.to_owned()).into())
    }
}

/// Judges an element of `Mounts`, and returns true if it is the engine's socket.
fn mount(mount: &Value, image: &str) -> Result<bool, Refusal> {
    // Regardless of the type: the engine refuses these options of other types, but that is its matter.
    volume_options(&mount["VolumeOptions"], image)?;
    let source = text(mount, "Source")?;
    match text(mount, "Type")? {
        "bind" => match sources::bind(source) {
            Ok(BindSource::EngineSocket) => Ok(true),
            Ok(BindSource::Share | BindSource::KernelModules | BindSource::TimeZone | BindSource::HostSocket) => {
                Ok(false)
            }
            Err(error) => Err(named(error, image)),
        },
        // Without a name the engine makes up one for a volume.
        "volume" | "tmpfs" if source.is_empty() => Ok(false),
        "volume" => Ok(sources::volume_name(source).map(|()| false)?),
        "tmpfs" => Err(sources::Error::Restricted(source.to_owned()).into()),
        kind => Err(Refusal::MountType(kind.to_owned())),
    }
}

/// Judges an element of `Binds`: `SOURCE:DESTINATION[:OPTIONS]`, or just a destination. A source cannot contain a colon.
fn bind(bind: &str, image: &str) -> Result<bool, Refusal> {
    let Some((source, _)) = bind.split_once(':') else { return Ok(false) };
    match sources::source(source) {
        Ok(Source::Bind(BindSource::EngineSocket)) => Ok(true),
        Ok(_) => Ok(false),
        Err(error) => Err(named(error, image)),
    }
}

/// Judges `Binds`, `Mounts` and `VolumeDriver` of a host configuration, or of a service's container. Returns true if the
/// engine's socket is among them, for which the image has to be allowed.
pub(super) fn judge(config: &Value, image: &str) -> Result<bool, Refusal> {
    drivers::volume(text(config, "VolumeDriver")?)?;
    let mut has_socket = false;
    // No early return: every mount is judged, also those behind the socket.
    for text in texts(config, "Binds")? {
        has_socket |= bind(text, image)?;
    }
    for element in elements(config, "Mounts")? {
        has_socket |= mount(element, image)?;
    }
    Ok(has_socket)
}

#[cfg(test)]
mod tests {
    use bulkhead_policy::{
        shares::MOUNT_POINT,
        sources::{ENGINE_SOCKETS, KERNEL_MODULES, SSH_AGENT},
    };

    use super::*;

    #[test]
    fn the_policys_sockets_are_those_that_the_gate_knows() {
        assert!(ENGINE_SOCKETS.contains(&bulkhead_protocol::ENGINE_SOCKET));
        for path in ENGINE_SOCKETS {
            assert!(reaches_engine_socket(path), "{path}");
            assert_eq!(judge(&serde_json::json!({"Binds": [format!("{path}:/s")]}), "a"), Ok(true));
        }
        assert_eq!(judge(&serde_json::json!({"Binds": [format!("{MOUNT_POINT}/x:/s")]}), "a"), Ok(false));
        let modules = serde_json::json!({"Type": "bind", "Source": KERNEL_MODULES, "Target": KERNEL_MODULES});
        assert_eq!(judge(&serde_json::json!({"Mounts": [modules]}), "a"), Ok(false));
        let agent = serde_json::json!({"Type": "bind", "Source": SSH_AGENT, "Target": "/agent"});
        assert_eq!(judge(&serde_json::json!({"Mounts": [agent]}), "a"), Ok(false));
    }
}
