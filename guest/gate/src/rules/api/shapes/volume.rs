//! Volumes.

use super::{EMPTY, FREE, FREE_LIST, FREE_MAP, INTEGER};
use crate::rules::api::{kind::Text, shape::Shape};

/// `POST /volumes/create`.
pub(in crate::rules::api) static CREATE: Shape = Shape::Object(&[&[
    ("Name", Shape::Text(Text::VolumeName)),
    ("Driver", Shape::Text(Text::VolumeDriver)),
    ("DriverOpts", Shape::Map(Text::VolumeOption, &FREE)),
    ("Labels", FREE_MAP),
]]);

/// `PUT /volumes/{name}`, which changes volumes of swarm's cluster.
pub(in crate::rules::api) static UPDATE: Shape = Shape::Object(&[&[("Spec", CLUSTER_VOLUME)]]);

const CLUSTER_VOLUME: Shape = Shape::Object(&[&[
    ("Group", FREE),
    (
        "AccessMode",
        Shape::Object(&[&[
            ("Scope", FREE),
            ("Sharing", FREE),
            ("MountVolume", Shape::Object(&[&[("FsType", FREE), ("MountFlags", FREE_LIST)]])),
            ("BlockVolume", EMPTY),
        ]]),
    ),
    (
        "AccessibilityRequirements",
        Shape::Object(&[&[("Requisite", Shape::List(&TOPOLOGY)), ("Preferred", Shape::List(&TOPOLOGY))]]),
    ),
    ("CapacityRange", Shape::Object(&[&[("RequiredBytes", INTEGER), ("LimitBytes", INTEGER)]])),
    ("Secrets", Shape::List(&Shape::Object(&[&[("Key", FREE), ("Secret", FREE)]]))),
    ("Availability", FREE),
]]);
const TOPOLOGY: Shape = Shape::Object(&[&[("Segments", FREE_MAP)]]);
