//! Every judged string of the API, tried with something that its judge must not let through.

use serde_json::{Value, json};

use super::*;
use crate::rules::judges;

/// Texts that dockerd must not get in a place of this kind; none for kinds without a judge.
fn hostile(kind: Text) -> &'static [&'static str] {
    match kind {
        Text::Free | Text::Name | Text::Path | Text::Remote | Text::Namespace => &[],
        Text::Bind => &["/etc:/m", "/:/m", "/run/bulkhead:/m", "../etc:/m", "/proc:/m:ro"],
        Text::MountSource => &["/etc", "/run/bulkhead/dockerd.sock", "../x"],
        Text::MountType => &["npipe", "cluster", "Bind"],
        Text::VolumesFrom => &["other"],
        Text::VolumeName => &["../x", "/etc"],
        Text::VolumeDriver | Text::NetworkDriver | Text::AddressDriver | Text::LogDriver => {
            &["../../../var/lib/docker/volumes/v/_data/p", "evil", "/run/x"]
        }
        Text::VolumeOption | Text::NetworkOption | Text::LogOption => &["bulkhead-unknown", "parent"],
        Text::EndpointOption => &["com.docker.network.portmap"],
        Text::Subnet => &["10.0.0.0/24", "10.0.0.9", "x"],
        Text::CgroupParent => &["/system", "../x", "/"],
        Text::Device => &["/etc/passwd", "/dev/../etc/x", "dev/x"],
        Text::DeviceDriver => &["cdi", "../x"],
        Text::Runtime => &["runc", "io.containerd.runc.v2"],
        Text::Limit => &["rtprio", "nice"],
        Text::Annotation => &["io.containerd.x"],
        Text::Credentials => &["x"],
        Text::SwarmAddress => &["/etc/x", "unix:///run/x"],
        Text::Url => &["file:///etc", "/etc", "unix:///run/x"],
        Text::TaskRuntime => &["plugin", "attachment"],
        Text::BuildRemote => &["file:///etc", "/etc", "ext::sh -c id"],
        Text::BuildSquash => &["1"],
        Text::BuildLimits => &[r#"[{"Name":"rtprio","Hard":99,"Soft":99}]"#],
        Text::BuildOutputs => &[r#"[{"Type":"../x"}]"#],
        Text::CommitPause => &["0", "false"],
    }
}

/// A body with nothing but a text at the end of these steps.
fn body_with(steps: &[Step], text: &str) -> Value {
    let Some((step, rest)) = steps.split_first() else { return Value::from(text) };
    match step {
        // The source of a mount means a path only beside this type.
        Step::Field("Source") => json!({"Source": text, "Type": "bind"}),
        Step::Field(name) => json!({*name: body_with(rest, text)}),
        Step::Element => json!([body_with(rest, text)]),
        Step::Value => json!({"some": body_with(rest, text)}),
        Step::Key => json!({text: "x"}),
    }
}

/// Returns true if the text is a key or a string in a value.
fn contains(value: &Value, text: &str) -> bool {
    match value {
        Value::Object(object) => object.iter().any(|(key, value)| key == text || contains(value, text)),
        Value::Array(elements) => elements.iter().any(|element| contains(element, text)),
        Value::String(string) => string == text,
        _ => false,
    }
}

/// Returns true if a text passes in this place.
fn passes(location: &Location, text: &str) -> bool {
    let vm = VmNetwork::new(bulkhead_policy::networks::Subnet::new([10, 0, 0, 2].into(), 24));
    match (&location.place, location.route.body) {
        (Place::Parameter(name), _) => {
            let Judge::Query(judge) = location.route.judge else { return true };
            let mut parameters = vec![((*name).to_owned(), text.to_owned())];
            judge(&mut parameters).is_ok() && parameters.contains(&((*name).to_owned(), text.to_owned()))
        }
        (Place::Body(steps), Body::Json(shape)) => {
            let mut body = read(shape, body_with(steps, text).to_string().as_bytes()).unwrap();
            assert!(contains(&body, text), "the place does not hold the text: {body}");
            let judged = match location.route.judge {
                // A request for the socket is decided by the image.
                Judge::Container => judges::container::create(&mut body).map(|socket| socket.is_none()),
                Judge::Body(judge) => judge(&mut body).map(|()| true),
                Judge::Network(judge) => judge(&mut body, &vm).map(|()| true),
                Judge::None | Judge::Query(_) => Ok(true),
            };
            judged == Ok(true) && contains(&body, text)
        }
        (Place::Body(_), _) => unreachable!("a place in a body that there is not"),
    }
}

#[test]
fn no_judged_string_of_any_route_lets_a_thing_of_the_vm_pass() {
    let mut open = Vec::new();
    let mut tried = 0;
    for location in locations() {
        let texts = hostile(location.kind);
        assert_eq!(texts.is_empty(), !location.kind.is_judged(), "{:?}", location.kind);
        tried += texts.len();
        open.extend(texts.iter().filter(|text| passes(&location, text)).map(|text| format!("{location:?}: {text}")));
    }
    assert!(open.is_empty(), "{}", open.join("\n"));
    assert!(tried > 100, "{tried}");
}
