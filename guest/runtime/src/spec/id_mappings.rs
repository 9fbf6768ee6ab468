//! The id maps of the container's user namespace.

use serde_json::{Value, json};

use crate::id_ranges::LENGTH;

/// Maps the container's ids 0.. to the range that starts at `start`, and replaces any maps of the spec.
pub(crate) fn map(spec: &mut Value, start: u32) {
    // The user namespace that crun joins has this map already; by these keys crun knows the container's root in the VM.
    let linux = super::object(spec, "linux");
    for key in ["uidMappings", "gidMappings"] {
        linux.insert(key.into(), json!([{ "containerID": 0, "hostID": start, "size": LENGTH }]));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::spec::testing;

    proptest! {
        #[test]
        fn the_map_is_exactly_the_range_whatever_the_spec_said(mut spec in testing::any_json(), start: u32) {
            map(&mut spec, start);
            for key in ["uidMappings", "gidMappings"] {
                prop_assert_eq!(&spec["linux"][key], &json!([{ "containerID": 0, "hostID": start, "size": 65536 }]));
            }
        }
    }
}
