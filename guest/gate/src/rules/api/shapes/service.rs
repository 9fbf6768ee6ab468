//! Services of swarm.

use super::{
    BOOL, EMPTY, FREE, FREE_LIST, FREE_MAP, INTEGER, NAME, PATH, UINT32, UINT64,
    container::{HEALTHCHECK, MOUNT, ULIMIT},
};
use crate::rules::api::{
    kind::Text,
    shape::{Field, Shape},
};

/// `POST /services/create` and `POST /services/{id}/update`.
pub(in crate::rules::api) static SERVICE: Shape = Shape::Object(&[
    super::swarm::ANNOTATION_FIELDS,
    &[
        ("TaskTemplate", TASK),
        ("Mode", MODE),
        ("UpdateConfig", UPDATE_CONFIG),
        ("RollbackConfig", UPDATE_CONFIG),
        ("Networks", NETWORKS),
        ("EndpointSpec", Shape::Object(&[&[("Mode", FREE), ("Ports", Shape::List(&PORT))]])),
    ],
]);

const TASK: Shape = Shape::Object(&[&[
    ("ContainerSpec", Shape::Object(&[CONTAINER_FIELDS])),
    ("NetworkAttachmentSpec", Shape::Object(&[&[("ContainerID", NAME)]])),
    ("Resources", Shape::Object(&[&[("Limits", LIMITS), ("Reservations", RESERVATIONS)]])),
    ("RestartPolicy", RESTART_POLICY),
    ("Placement", PLACEMENT),
    ("Networks", NETWORKS),
    (
        "LogDriver",
        Shape::Object(&[&[("Name", Shape::Text(Text::LogDriver)), ("Options", Shape::Map(Text::LogOption, &FREE))]]),
    ),
    ("ForceUpdate", UINT64),
    ("Runtime", Shape::Text(Text::TaskRuntime)),
]]);

const CONTAINER_FIELDS: &[Field] = &[
    ("Image", NAME),
    ("Labels", FREE_MAP),
    ("Command", FREE_LIST),
    ("Args", FREE_LIST),
    ("Hostname", FREE),
    ("Env", FREE_LIST),
    ("Dir", PATH),
    ("User", FREE),
    ("Groups", FREE_LIST),
    ("Privileges", PRIVILEGES),
    ("Init", BOOL),
    ("StopSignal", FREE),
    ("TTY", BOOL),
    ("OpenStdin", BOOL),
    ("ReadOnly", BOOL),
    ("Mounts", Shape::List(&MOUNT)),
    ("StopGracePeriod", INTEGER),
    ("Healthcheck", HEALTHCHECK),
    ("Hosts", FREE_LIST),
    ("DNSConfig", Shape::Object(&[&[("Nameservers", FREE_LIST), ("Search", FREE_LIST), ("Options", FREE_LIST)]])),
    ("Secrets", Shape::List(&SECRET)),
    ("Configs", Shape::List(&CONFIG)),
    ("Isolation", FREE),
    ("Sysctls", FREE_MAP),
    ("CapabilityAdd", FREE_LIST),
    ("CapabilityDrop", FREE_LIST),
    ("Ulimits", Shape::List(&ULIMIT)),
];

const PRIVILEGES: Shape = Shape::Object(&[&[
    (
        "CredentialSpec",
        Shape::Object(&[&[
            ("Config", NAME),
            ("File", Shape::Text(Text::Credentials)),
            ("Registry", Shape::Text(Text::Credentials)),
        ]]),
    ),
    (
        "SELinuxContext",
        Shape::Object(&[&[("Disable", BOOL), ("User", FREE), ("Role", FREE), ("Type", FREE), ("Level", FREE)]]),
    ),
    ("Seccomp", Shape::Object(&[&[("Mode", FREE), ("Profile", FREE)]])),
    ("AppArmor", Shape::Object(&[&[("Mode", FREE)]])),
    ("NoNewPrivileges", BOOL),
]]);

/// The file that a secret or config becomes in the container.
const TARGET: Shape = Shape::Object(&[&[("Name", PATH), ("UID", FREE), ("GID", FREE), ("Mode", UINT32)]]);
const SECRET: Shape = Shape::Object(&[&[("File", TARGET), ("SecretID", NAME), ("SecretName", NAME)]]);
const CONFIG: Shape =
    Shape::Object(&[&[("File", TARGET), ("Runtime", EMPTY), ("ConfigID", NAME), ("ConfigName", NAME)]]);

const LIMITS: Shape = Shape::Object(&[&[("NanoCPUs", INTEGER), ("MemoryBytes", INTEGER), ("Pids", INTEGER)]]);
const RESERVATIONS: Shape = Shape::Object(&[&[
    ("NanoCPUs", INTEGER),
    ("MemoryBytes", INTEGER),
    ("GenericResources", Shape::List(&GENERIC_RESOURCE)),
]]);
const GENERIC_RESOURCE: Shape = Shape::Object(&[&[
    ("NamedResourceSpec", Shape::Object(&[&[("Kind", FREE), ("Value", FREE)]])),
    ("DiscreteResourceSpec", Shape::Object(&[&[("Kind", FREE), ("Value", INTEGER)]])),
]]);
const RESTART_POLICY: Shape =
    Shape::Object(&[&[("Condition", FREE), ("Delay", INTEGER), ("MaxAttempts", UINT64), ("Window", INTEGER)]]);
const PLACEMENT: Shape = Shape::Object(&[&[
    ("Constraints", FREE_LIST),
    ("Preferences", Shape::List(&Shape::Object(&[&[("Spread", Shape::Object(&[&[("SpreadDescriptor", FREE)]]))]]))),
    ("MaxReplicas", UINT64),
    ("Platforms", Shape::List(&Shape::Object(&[&[("Architecture", FREE), ("OS", FREE)]]))),
]]);
const NETWORKS: Shape = Shape::List(&Shape::Object(&[&[
    ("Target", NAME),
    ("Aliases", FREE_LIST),
    ("DriverOpts", Shape::Map(Text::EndpointOption, &FREE)),
]]));

const MODE: Shape = Shape::Object(&[&[
    ("Replicated", Shape::Object(&[&[("Replicas", UINT64)]])),
    ("Global", EMPTY),
    ("ReplicatedJob", Shape::Object(&[&[("MaxConcurrent", UINT64), ("TotalCompletions", UINT64)]])),
    ("GlobalJob", EMPTY),
]]);
const UPDATE_CONFIG: Shape = Shape::Object(&[&[
    ("Parallelism", UINT64),
    ("Delay", INTEGER),
    ("FailureAction", FREE),
    ("Monitor", INTEGER),
    ("MaxFailureRatio", Shape::Float),
    ("Order", FREE),
]]);
const PORT: Shape = Shape::Object(&[&[
    ("Name", FREE),
    ("Protocol", FREE),
    ("TargetPort", UINT32),
    ("PublishedPort", UINT32),
    ("PublishMode", FREE),
]]);
