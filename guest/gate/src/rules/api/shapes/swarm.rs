//! Swarm itself: the cluster, its nodes, secrets and configs.

use super::{BOOL, EMPTY, FREE, FREE_LIST, FREE_MAP, INTEGER, UINT32, UINT64};
use crate::rules::api::{
    kind::Text,
    shape::{Field, Shape},
};

const ADDRESS: Shape = Shape::Text(Text::SwarmAddress);

/// `POST /swarm/init`.
pub(in crate::rules::api) static INIT: Shape = Shape::Object(&[&[
    ("ListenAddr", ADDRESS),
    ("AdvertiseAddr", ADDRESS),
    ("DataPathAddr", ADDRESS),
    ("DataPathPort", UINT32),
    ("ForceNewCluster", BOOL),
    ("Spec", Shape::Object(&[ANNOTATION_FIELDS, SPEC_FIELDS])),
    ("AutoLockManagers", BOOL),
    ("Availability", FREE),
    // Networks of a swarm stand in network namespaces of their own, so they may overlap the VM's.
    ("DefaultAddrPool", FREE_LIST),
    ("SubnetSize", UINT32),
]]);

/// `POST /swarm/join`.
pub(in crate::rules::api) static JOIN: Shape = Shape::Object(&[&[
    ("ListenAddr", ADDRESS),
    ("AdvertiseAddr", ADDRESS),
    ("DataPathAddr", ADDRESS),
    ("RemoteAddrs", Shape::List(&ADDRESS)),
    ("JoinToken", FREE),
    ("Availability", FREE),
]]);

/// `POST /swarm/update`.
pub(in crate::rules::api) static UPDATE: Shape = Shape::Object(&[ANNOTATION_FIELDS, SPEC_FIELDS]);

/// `POST /swarm/unlock`.
pub(in crate::rules::api) static UNLOCK: Shape = Shape::Object(&[&[("UnlockKey", FREE)]]);

/// `POST /nodes/{id}/update`.
pub(in crate::rules::api) static NODE: Shape =
    Shape::Object(&[ANNOTATION_FIELDS, &[("Role", FREE), ("Availability", FREE)]]);

/// `POST /secrets/create` and `update`, `POST /configs/create` and `update`.
pub(in crate::rules::api) static SECRET: Shape = Shape::Object(&[
    ANNOTATION_FIELDS,
    // The only templating driver is the engine's own, `golang`.
    &[("Data", FREE), ("Templating", Shape::Object(&[&[("Name", FREE), ("Options", FREE_MAP)]]))],
]);

/// `swarm.Annotations`.
pub(super) const ANNOTATION_FIELDS: &[Field] = &[("Name", FREE), ("Labels", FREE_MAP)];

const SPEC_FIELDS: &[Field] = &[
    ("Orchestration", Shape::Object(&[&[("TaskHistoryRetentionLimit", INTEGER)]])),
    (
        "Raft",
        Shape::Object(&[&[
            ("SnapshotInterval", UINT64),
            ("KeepOldSnapshots", UINT64),
            ("LogEntriesForSlowFollowers", UINT64),
            ("ElectionTick", INTEGER),
            ("HeartbeatTick", INTEGER),
        ]]),
    ),
    ("Dispatcher", Shape::Object(&[&[("HeartbeatPeriod", INTEGER)]])),
    (
        "CAConfig",
        Shape::Object(&[&[
            ("NodeCertExpiry", INTEGER),
            ("ExternalCAs", Shape::List(&EXTERNAL_AUTHORITY)),
            ("SigningCACert", FREE),
            ("SigningCAKey", FREE),
            ("ForceRotate", UINT64),
        ]]),
    ),
    // Its only field is a log driver, see the module above.
    ("TaskDefaults", EMPTY),
    ("EncryptionConfig", Shape::Object(&[&[("AutoLockManagers", BOOL)]])),
];
const EXTERNAL_AUTHORITY: Shape =
    Shape::Object(&[&[("Protocol", FREE), ("URL", Shape::Text(Text::Url)), ("Options", FREE_MAP), ("CACert", FREE)]]);
