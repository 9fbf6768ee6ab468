//! The places of a body in which a client names sources of mounts, and their translation.
//!
//! Clients name paths of the host. Wherever one can stand, [`translate`] asks for the VM's path; everything else of the
//! body stays.

use bulkhead_policy::shares::Shares;
use serde_json::Value;

use super::{Refusal, go_json::is_field};

/// The kind of body that names sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SourcePlaces {
    /// None.
    None,
    /// The creation of a container: `Binds` and `Mounts` of its host configuration.
    Container,
    /// The creation or change of a service: `Mounts` of its container.
    Service,
    /// The creation of a volume, whose options can bind a directory.
    Volume,
    /// A list of containers, of which a filter in the query takes those with a mount.
    Filter,
}

/// The parameter of the query with the filters, as JSON.
pub(crate) const FILTERS: &str = "filters";

/// Returns the VM's path for a source that a client names, or `None` if it stays as it is.
type Place<'a> = dyn FnMut(&str) -> Result<Option<String>, Refusal> + 'a;

/// Translates the sources in a body, and returns true if one has changed.
///
/// Keys match as dockerd matches them, so that a body does not have to be canonical.
pub(crate) fn translate(places: SourcePlaces, body: &mut Value, place: &mut Place<'_>) -> Result<bool, Refusal> {
    let mut changed = false;
    match places {
        SourcePlaces::None | SourcePlaces::Filter => {}
        SourcePlaces::Container => {
            for host in fields(body, "HostConfig") {
                for bind in fields(host, "Binds").flat_map(elements) {
                    changed |= translate_bind(bind, place)?;
                }
                changed |= translate_mounts(host, place)?;
            }
        }
        SourcePlaces::Service => {
            for task in fields(body, "TaskTemplate") {
                for container in fields(task, "ContainerSpec") {
                    changed |= translate_mounts(container, place)?;
                }
            }
        }
        SourcePlaces::Volume => changed = translate_options(body, "DriverOpts", place)?,
    }
    Ok(changed)
}

/// Adds to the sources in a filter their paths in the VM. The old ones stay: they can be destinations. `None` if none is
/// a source in a share.
pub(crate) fn extend_filters(filters: &str, shares: &Shares) -> Option<String> {
    let mut filters: Value = serde_json::from_str(filters).ok()?;
    let volumes = filters.get_mut("volume")?;
    // A set of values; a list from old clients.
    let named: Vec<&str> = match &*volumes {
        Value::Object(values) => values.keys().map(String::as_str).collect(),
        Value::Array(values) => values.iter().filter_map(Value::as_str).collect(),
        _ => return None,
    };
    let places: Vec<String> = named.into_iter().filter_map(|path| shares.in_vm(path)).collect();
    if places.is_empty() {
        return None;
    }
    match volumes {
        Value::Object(values) => values.extend(places.into_iter().map(|place| (place, Value::from(true)))),
        Value::Array(values) => values.extend(places.into_iter().map(Value::from)),
        _ => {}
    }
    Some(filters.to_string())
}

/// Returns the members of an object that Go stores in a field.
fn fields<'a>(object: &'a mut Value, name: &'static str) -> impl Iterator<Item = &'a mut Value> {
    let members = object.as_object_mut().into_iter().flatten();
    members.filter(move |(key, _)| is_field(key, name)).map(|(_, value)| value)
}

fn elements(array: &mut Value) -> impl Iterator<Item = &mut Value> {
    array.as_array_mut().into_iter().flatten()
}

/// Returns true if a member of an object is this text.
fn is(object: &Value, name: &str, text: &str) -> bool {
    let mut members = object.as_object().into_iter().flatten();
    members.any(|(key, value)| is_field(key, name) && value == text)
}

fn translate_mounts(config: &mut Value, place: &mut Place<'_>) -> Result<bool, Refusal> {
    let mut changed = false;
    for mount in fields(config, "Mounts").flat_map(elements) {
        for options in fields(mount, "VolumeOptions") {
            for driver in fields(options, "DriverConfig") {
                changed |= translate_options(driver, "Options", place)?;
            }
        }
        if is(mount, "Type", "bind") {
            for source in fields(mount, "Source") {
                changed |= translate_text(source, place)?;
            }
        }
    }
    Ok(changed)
}

/// Translates `SOURCE:DESTINATION[:OPTIONS]`. Without a colon it is a destination.
fn translate_bind(bind: &mut Value, place: &mut Place<'_>) -> Result<bool, Refusal> {
    let Some((source, rest)) = bind.as_str().and_then(|text| text.split_once(':')) else { return Ok(false) };
    let Some(found) = place(source)? else { return Ok(false) };
    let translated = Value::from(format!("{found}:{rest}"));
    Ok(std::mem::replace(bind, translated) != *bind)
}

fn translate_text(text: &mut Value, place: &mut Place<'_>) -> Result<bool, Refusal> {
    let Some(found) = text.as_str().map(place).transpose()?.flatten() else { return Ok(false) };
    let translated = Value::from(found);
    Ok(std::mem::replace(text, translated) != *text)
}

/// Translates the device of a volume that is a bind. Keys of a map are exact.
fn translate_options(config: &mut Value, name: &'static str, place: &mut Place<'_>) -> Result<bool, Refusal> {
    let mut changed = false;
    for options in fields(config, name) {
        let words = options["o"].as_str().unwrap_or_default().split(',');
        let is_bind = words.into_iter().any(|word| matches!(word, "bind" | "rbind"));
        if is_bind && let Some(device) = options.get_mut("device") {
            changed |= translate_text(device, place)?;
        }
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn place(path: &str) -> Result<Option<String>, Refusal> {
        match path {
            "/host_mnt/secret" => Err(Refusal::SharesMissing(path.to_owned())),
            path => Ok(path.starts_with("/home/").then(|| format!("/host_mnt{path}"))),
        }
    }

    fn translated(places: SourcePlaces, mut body: Value) -> Value {
        let before = body.clone();
        let changed = translate(places, &mut body, &mut place).unwrap();
        assert_eq!(changed, body != before, "{body}");
        body
    }

    #[test]
    fn binds_and_mounts_of_a_container_are_translated() {
        let body = json!({"Image": "/home/x", "Labels": {"Source": "/home/x"}, "HostConfig": {
            "Binds": ["/home/me:/a", "/home/me/x:/b:ro,z", "/etc:/home/c", "v:/home/d", "/home/e"],
            "Mounts": [
                {"Type": "bind", "Source": "/home/me", "Target": "/home/t", "BindOptions": {"CreateMountpoint": true}},
                {"Type": "volume", "Source": "/home/v", "Target": "/v"},
                {"Type": "volume", "Source": "v", "VolumeOptions": {"DriverConfig": {"Options":
                    {"type": "none", "o": "ro,bind", "device": "/home/me/data"}}}}]}});
        let mut expected = body.clone();
        expected["HostConfig"]["Binds"][0] = "/host_mnt/home/me:/a".into();
        expected["HostConfig"]["Binds"][1] = "/host_mnt/home/me/x:/b:ro,z".into();
        expected["HostConfig"]["Mounts"][0]["Source"] = "/host_mnt/home/me".into();
        expected["HostConfig"]["Mounts"][2]["VolumeOptions"]["DriverConfig"]["Options"]["device"] =
            "/host_mnt/home/me/data".into();
        assert_eq!(translated(SourcePlaces::Container, body.clone()), expected);
        assert_eq!(translated(SourcePlaces::None, body.clone()), body);
    }

    #[test]
    fn keys_match_as_in_go() {
        let body = json!({"hostconfig": {"BINDS": ["/home/me:/a"], "mounts": [{"type": "bind", "SOURCE": "/home/x"}]}});
        let expected = json!({"hostconfig": {"BINDS": ["/host_mnt/home/me:/a"],
            "mounts": [{"type": "bind", "SOURCE": "/host_mnt/home/x"}]}});
        assert_eq!(translated(SourcePlaces::Container, body), expected);
    }

    #[test]
    fn mounts_of_a_service_and_devices_of_a_volume_are_translated() {
        let body = json!({"TaskTemplate": {"ContainerSpec": {"Mounts": [{"Type": "bind", "Source": "/home/a"}]}}});
        let expected =
            json!({"TaskTemplate": {"ContainerSpec": {"Mounts": [{"Type": "bind", "Source": "/host_mnt/home/a"}]}}});
        assert_eq!(translated(SourcePlaces::Service, body), expected);
        let volume =
            |device: &str, o: &str| json!({"Name": "v", "DriverOpts": {"type": "none", "o": o, "device": device}});
        let translated = |device, o| translated(SourcePlaces::Volume, volume(device, o));
        assert_eq!(translated("/home/a", "bind"), volume("/host_mnt/home/a", "bind"));
        assert_eq!(translated("/home/a", "rbind,ro"), volume("/host_mnt/home/a", "rbind,ro"));
        assert_eq!(translated("/home/a", "ro"), volume("/home/a", "ro"));
        assert_eq!(translated("/etc", "bind"), volume("/etc", "bind"));
    }

    #[test]
    fn a_filter_finds_a_source_by_its_path_on_the_host() {
        let shares = Shares::new(["/home/me".to_owned()]);
        let extended = |filters: Value| {
            let text = extend_filters(&filters.to_string(), &shares)?;
            serde_json::from_str::<Value>(&text).ok()
        };
        let both = json!({"volume": {"/home/me/x": true, "/host_mnt/home/me/x": true}, "label": {"/home/me": true}});
        assert_eq!(extended(json!({"volume": {"/home/me/x": true}, "label": {"/home/me": true}})), Some(both));
        let list = json!({"volume": ["/home/me", "v", "/host_mnt/home/me"]});
        assert_eq!(extended(json!({"volume": ["/home/me", "v"]})), Some(list));
        for filters in [json!({}), json!({"volume": {"v": true}}), json!({"volume": "/home/me"}), json!([])] {
            assert_eq!(extended(filters.clone()), None, "{filters}");
        }
    }

    #[test]
    fn a_refusal_is_passed_on() {
        for body in [
            json!({"HostConfig": {"Binds": ["/home/x:/x", "/host_mnt/secret:/s"]}}),
            json!({"HostConfig": {"Mounts": [{"Type": "bind", "Source": "/host_mnt/secret"}]}}),
        ] {
            assert!(translate(SourcePlaces::Container, &mut body.clone(), &mut place).is_err(), "{body}");
        }
    }

    proptest! {
        #[test]
        fn no_body_makes_it_panic(text in "[{}\\[\\]\",:HostConfigBindsMounts/ ]{0,60}") {
            if let Ok(mut body) = serde_json::from_str(&text) {
                for places in [SourcePlaces::Container, SourcePlaces::Service, SourcePlaces::Volume] {
                    let _ = translate(places, &mut body, &mut place);
                }
            }
        }
    }
}
