//! Checks of the bodies that create containers, volumes and services.
//!
//! Text that two readers could understand differently is refused: invalid JSON, invalid UTF-8, lone surrogates. The
//! rest is searched for the fields from which dockerd takes paths of the VM.

use serde_json::value::RawValue;

use super::{
    go_json::{Object, array, is_field, object, parse, string, write},
    paths::{is_engine_socket, reaches_engine_socket},
    refusal::Refusal,
};

/// The runtime of each container while isolation is on, as a JSON string.
const RUNTIME: &str = "\"sysbox-runc\"";

/// The part of the engine that mounts expose; the greatest counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Exposure {
    Nothing,
    /// Only the socket that an image can be allowed to have.
    EngineSocket,
    /// Directories or sockets that no image can be allowed to have.
    Forbidden,
}

type ExposureResult = Result<Exposure, Refusal>;

/// A container that would have the engine's socket, and needs a grant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketRequest {
    /// The image as the client named it.
    pub image: String,
    /// The container mounts the socket itself; otherwise it could get it from another container (`VolumesFrom`).
    pub explicit: bool,
}

/// Returns the body as text. Go would replace invalid UTF-8 instead, and so see other names and paths than the gate.
fn text(body: &[u8]) -> Result<&str, Refusal> {
    std::str::from_utf8(body).map_err(|error| Refusal::Malformed(error.to_string()))
}

/// Returns the exposure by the source of a bind mount.
fn exposure_of_path(path: &str) -> Exposure {
    if !path.starts_with('/') || !reaches_engine_socket(path) {
        // A source without a slash in front is the name of a volume.
        Exposure::Nothing
    } else if is_engine_socket(path) {
        Exposure::EngineSocket
    } else {
        Exposure::Forbidden
    }
}

/// Checks the options of the `local` driver, which mount(2) gets: `device`, and every path in the others
/// (`o=lowerdir=…:…`). Any container can use a volume, so it can have no socket at all.
fn check_volume_options(options: &RawValue) -> ExposureResult {
    for (key, value) in &object(options)?.0 {
        let Some(value) = string(value)? else { continue };
        // `device` is a path as a whole, perhaps a relative one. Elsewhere only words that begin with a slash can be
        // one: most values are flags and sizes.
        let denied = match key.as_str() {
            "device" => !value.is_empty() && reaches_engine_socket(&value),
            _ => value.split([',', '=', ':']).any(|word| word.starts_with('/') && reaches_engine_socket(word)),
        };
        if denied {
            return Ok(Exposure::Forbidden);
        }
    }
    Ok(Exposure::Nothing)
}

/// Checks one element of `Mounts`.
fn check_mount(mount: &RawValue) -> ExposureResult {
    let mount = object(mount)?;
    let mut exposure = Exposure::Nothing;
    // Regardless of `Type`, which can be there twice as well, in two spellings.
    for source in mount.all("Source") {
        exposure = exposure.max(string(source)?.map_or(Exposure::Nothing, |source| exposure_of_path(&source)));
    }
    // `docker run --mount type=volume,volume-opt=…` makes a volume on the fly.
    for volume in mount.all("VolumeOptions") {
        for driver in object(volume)?.all("DriverConfig") {
            for options in object(driver)?.all("Options") {
                exposure = exposure.max(check_volume_options(options)?);
            }
        }
    }
    Ok(exposure)
}

/// Checks `Mounts` and `Binds` of a host configuration, or of any object with members of these names.
fn check_mounts(config: &Object<'_>) -> ExposureResult {
    let mut exposure = Exposure::Nothing;
    for binds in config.all("Binds") {
        for bind in array(binds)? {
            let Some(bind) = string(bind)? else { continue };
            // `SOURCE:DESTINATION[:OPTIONS]`; a source cannot contain a colon.
            exposure = exposure.max(exposure_of_path(bind.split(':').next().unwrap_or_default()));
        }
    }
    for mounts in config.all("Mounts") {
        for mount in array(mounts)? {
            exposure = exposure.max(check_mount(mount)?);
        }
    }
    Ok(exposure)
}

/// Returns true if the container takes the mounts of others.
fn inherits_mounts(config: &Object<'_>) -> Result<bool, Refusal> {
    for from in config.all("VolumesFrom") {
        if !array(from)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns the image as dockerd would read it: the last of several equal keys.
fn image_of(config: &Object<'_>) -> Result<String, Refusal> {
    let mut name = String::new();
    for value in config.all("Image") {
        // A `null` changes nothing, as in Go. Any other type is refused there.
        name = string(value)?.unwrap_or(name);
    }
    Ok(name)
}

/// Returns the refusal for the container's image, or the one for JSON that is invalid.
fn refuse_for(config: &Object<'_>) -> Result<Refusal, Refusal> {
    Ok(Refusal::socket(&image_of(config)?))
}

/// Returns a host configuration whose only runtime is the isolating one.
fn with_runtime(host: &Object<'_>) -> String {
    // All spellings of the key are dropped, so that Go finds exactly one.
    let kept = host.0.iter().filter(|(key, _)| !is_field(key, "Runtime"));
    write(kept.map(|(key, value)| (key.as_str(), value.get())).chain([("Runtime", RUNTIME)]))
}

/// Checks a `POST /containers/create`: refuses mounts that no image is allowed to have, and returns the body with the
/// isolating runtime, and the request for the engine's socket if it makes one. The rest stays byte for byte.
pub(super) fn container(body: &[u8]) -> Result<(String, Option<SocketRequest>), Refusal> {
    let config: Object<'_> = parse(text(body)?)?;
    // Old engines read the members of the host configuration from the top level, too.
    let mut exposure = check_mounts(&config)?;
    let mut inherits = inherits_mounts(&config)?;
    let mut members: Vec<(&str, String)> = Vec::with_capacity(config.0.len());
    for (key, value) in &config.0 {
        if is_field(key, "Runtime") {
            continue;
        }
        // Every host configuration, not just the last: Go merges several into one structure. A `null` stays, because
        // the engine's default is the isolating runtime as well.
        let mut kept = value.get().to_owned();
        if is_field(key, "HostConfig") && kept.starts_with('{') {
            let host = object(value)?;
            exposure = exposure.max(check_mounts(&host)?);
            inherits |= inherits_mounts(&host)?;
            kept = with_runtime(&host);
        }
        members.push((key, kept));
    }
    // Not for any image: with a directory above the socket a container could reach dockerd's own.
    if exposure == Exposure::Forbidden {
        return Err(refuse_for(&config)?);
    }
    let explicit = exposure == Exposure::EngineSocket;
    let requested =
        if explicit || inherits { Some(SocketRequest { image: image_of(&config)?, explicit }) } else { None };
    Ok((write(members.iter().map(|(key, value)| (*key, value.as_str()))), requested))
}

/// Checks a `POST /volumes/create`: refuses a volume that leads to an engine socket.
pub(super) fn volume(body: &[u8]) -> Result<(), Refusal> {
    let config: Object<'_> = parse(text(body)?)?;
    for options in config.all("DriverOpts") {
        if check_volume_options(options)? != Exposure::Nothing {
            let name = config.all("Name").last().map(string).transpose()?.flatten().unwrap_or_default();
            return Err(Refusal::SocketVolume { name });
        }
    }
    Ok(())
}

/// Checks a `POST /services/create` or `update`: refuses engine sockets to the containers of a service. Their images
/// are resolved later, by swarm, so there is no creation at which the gate could check them.
pub(super) fn service(body: &[u8]) -> Result<(), Refusal> {
    let service: Object<'_> = parse(text(body)?)?;
    for task in service.all("TaskTemplate") {
        for container in object(task)?.all("ContainerSpec") {
            let container = object(container)?;
            if check_mounts(&container)? != Exposure::Nothing {
                return Err(refuse_for(&container)?);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const DENIED: &str = "enhanced container isolation: docker socket mount denied for container with image \
                          \"docker.io/library/alpine\"; image is not in the allowed list; if you wish to allow it, \
                          configure the docker socket image list in the Docker Desktop settings.";

    fn create(body: &str) -> Result<Value, String> {
        match container(body.as_bytes()) {
            Ok((_, Some(SocketRequest { image, explicit: true }))) => Err(Refusal::socket(&image).to_string()),
            Ok((text, _)) => Ok(serde_json::from_str(&text).unwrap()),
            Err(refusal) => Err(refusal.to_string()),
        }
    }

    fn requested(host: Value) -> Result<Option<SocketRequest>, Refusal> {
        container(json!({"Image": "docker:cli", "HostConfig": host}).to_string().as_bytes())
            .map(|(_, requested)| requested)
    }

    #[test]
    fn the_socket_itself_can_be_allowed_and_what_shows_more_can_not() {
        let asked = |explicit| Ok(Some(SocketRequest { image: "docker:cli".to_owned(), explicit }));
        for host in [
            json!({"Binds": ["/var/run/docker.sock:/var/run/docker.sock"]}),
            json!({"Binds": ["/run//docker.sock:/x:ro", "v:/y"]}),
            json!({"Mounts": [{"Type": "bind", "Source": "/run/docker.sock", "Target": "/x"}]}),
        ] {
            assert_eq!(requested(host.clone()), asked(true), "{host}");
        }
        assert_eq!(requested(json!({"VolumesFrom": ["other:ro"]})), asked(false));
        assert_eq!(requested(json!({"VolumesFrom": [], "Binds": ["v:/y"]})), Ok(None));
        for host in [
            json!({"Binds": ["/var/run/docker.sock:/s", "/var/run:/x"]}),
            json!({"Binds": ["/run/bulkhead/dockerd.sock:/s"]}),
            json!({"Binds": ["/run/bulkhead/containers/x:/s"]}),
            json!({"Binds": ["/tmp/../run/docker.sock:/s"]}),
            json!({"Binds": ["/run/docker.sock/..:/s"]}),
            json!({"Mounts": [{"Source": "/run/docker.sock"}, {"VolumeOptions": {"DriverConfig": {"Options":
                {"o": "bind", "device": "/run/docker.sock"}}}}]}),
        ] {
            assert!(requested(host.clone()).is_err(), "{host}");
        }
    }

    #[test]
    fn the_runtime_is_replaced_whatever_it_was_and_however_it_was_spelt() {
        for host in [
            r#"{"Runtime":"runc"}"#,
            r#"{"runtime":"io.containerd.runc.v2","RUNTIME":"runc"}"#,
            r#"{"Runtime":""}"#,
            r"{}",
        ] {
            let body = create(&format!(r#"{{"Image":"alpine","HostConfig":{host}}}"#)).unwrap();
            assert_eq!(body, json!({"Image": "alpine", "HostConfig": {"Runtime": "sysbox-runc"}}), "{host}");
        }
    }

    #[test]
    fn every_one_of_several_host_configurations_is_rewritten_and_checked() {
        let (text, _) =
            container(br#"{"HostConfig":{"Runtime":"runc"},"ho\u017ftconfig":{"Runtime":"runc"}}"#).unwrap();
        assert!(!text.contains("\"runc\""), "{text}");
        let refused =
            create(r#"{"Image":"alpine","HostConfig":{"Binds":["/run/docker.sock:/x"]},"hostconfig":{"Binds":[]}}"#);
        assert_eq!(refused.unwrap_err(), DENIED);
    }

    #[test]
    fn socket_mounts_are_refused_with_the_documented_text() {
        for host in [
            json!({"Binds": ["/var/run/docker.sock:/var/run/docker.sock"]}),
            json!({"binds": ["/tmp:/tmp", "/var/run/:/x:ro"]}),
            json!({"Binds": ["/:/host"]}),
            json!({"Mounts": [{"Type": "bind", "Source": "/run/bulkhead", "Target": "/x"}]}),
            json!({"mounts": [{"type": "bind", "source": "/tmp/../run/docker.sock", "target": "/x"}]}),
            json!({"Mounts": [{"Type": "volume", "Target": "/x", "VolumeOptions": {"DriverConfig":
                {"Name": "local", "Options": {"type": "none", "o": "bind", "device": "/var/run"}}}}]}),
            json!({"Mounts": [{"Type": "volume", "VolumeOptions": {"DriverConfig":
                {"Options": {"type": "overlay", "device": "overlay", "o": "lowerdir=/tmp:/run"}}}}]}),
        ] {
            let body = json!({"Image": "alpine:3.20", "HostConfig": host}).to_string();
            assert_eq!(create(&body).unwrap_err(), DENIED, "{body}");
        }
    }

    #[test]
    fn escaped_strings_hide_nothing() {
        let body = r#"{"Image":"alpine","HostConfig":{"\u0042inds":["\u002frun\/docker.sock:/x"]}}"#;
        assert_eq!(create(body).unwrap_err(), DENIED);
    }

    #[test]
    fn volumes_over_engine_paths_are_refused() {
        for options in [
            json!({"o": "bind", "type": "none", "device": "/run/docker.sock"}),
            json!({"o": "rbind,ro", "device": "run"}),
        ] {
            let body = json!({"Name": "v", "Driver": "local", "DriverOpts": options}).to_string();
            assert_eq!(volume(body.as_bytes()), Err(Refusal::SocketVolume { name: "v".to_owned() }), "{body}");
        }
        assert_eq!(volume(br#"{"Name":"v","DriverOpts":{"type":"tmpfs","device":"tmpfs","o":"size=1m"}}"#), Ok(()));
        assert_eq!(volume(br#"{"Name":"v","DriverOpts":null}"#), Ok(()));
    }

    #[test]
    fn services_are_held_to_the_same() {
        let body = json!({"TaskTemplate": {"ContainerSpec": {"Image": "alpine", "Mounts": [
            {"Type": "bind", "Source": "/var/run/docker.sock", "Target": "/s"}]}}});
        assert_eq!(service(body.to_string().as_bytes()).unwrap_err().to_string(), DENIED);
        assert_eq!(service(br#"{"TaskTemplate":{"ContainerSpec":{"Image":"alpine"}}}"#), Ok(()));
    }

    #[test]
    fn values_that_are_not_inspected_stay_byte_for_byte() {
        let body = r#"{"Cmd":["a", "b"],"Unknown":{"x":1.50,"x":12345678901234567890123},"HostConfig":{"Memory":9223372036854775807,"Odd":[ ]}}"#;
        let (text, _) = container(body.as_bytes()).unwrap();
        assert_eq!(text, body.replace("[ ]}", r#"[ ],"Runtime":"sysbox-runc"}"#));
    }

    #[test]
    fn json_that_can_not_be_read_is_refused_and_not_passed() {
        for body in ["[", "[]", "{} {}", "{\"HostConfig\":{}", "\u{feff}{}", "{\"\\ud800\":1}"] {
            assert!(matches!(container(body.as_bytes()), Err(Refusal::Malformed(_))), "{body}");
        }
        assert!(matches!(container(b"{\"a\":\"\xff\"}"), Err(Refusal::Malformed(_))));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let names = prop_oneof![
            Just("HostConfig".to_owned()),
            Just("Binds".to_owned()),
            Just("Mounts".to_owned()),
            Just("Source".to_owned()),
            Just("Runtime".to_owned()),
            ".{0,6}"
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            ".{0,8}".prop_map(Value::from),
            Just(json!("runc")),
            Just(json!("/run/docker.sock:/x"))
        ];
        leaf.prop_recursive(5, 64, 6, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
                proptest::collection::vec((names.clone(), inner), 0..6)
                    .prop_map(|members| Value::Object(members.into_iter().collect()))
            ]
        })
    }

    proptest! {
        #[test]
        fn no_body_makes_it_panic(body in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = (container(&body), volume(&body), service(&body));
        }

        #[test]
        fn whatever_passes_has_one_runtime_and_no_socket_that_nobody_asks_about(value in any_json()) {
            if let Ok((text, requested)) = container(value.to_string().as_bytes()) {
                let known = requested.is_some_and(|requested| requested.explicit);
                let passed: Value = serde_json::from_str(&text).unwrap();
                if let Some(Value::Object(host)) = passed.get("HostConfig") {
                    prop_assert_eq!(&host["Runtime"], "sysbox-runc");
                    for bind in host.get("Binds").and_then(Value::as_array).into_iter().flatten() {
                        prop_assert!(known || bind != "/run/docker.sock:/x");
                    }
                }
            }
        }

        #[test]
        fn a_socket_is_found_among_any_other_binds(
            before in proptest::collection::vec("[a-z]{1,8}:/[a-z]{1,8}", 0..8),
            after in proptest::collection::vec("[a-z]{1,8}:/[a-z]{1,8}", 0..8),
        ) {
            let binds: Vec<_> = before.into_iter().chain(["/var/run/docker.sock:/s".to_owned()]).chain(after).collect();
            let body = json!({"Image": "alpine", "HostConfig": {"Binds": binds}}).to_string();
            prop_assert_eq!(create(&body).unwrap_err(), DENIED);
        }
    }
}
