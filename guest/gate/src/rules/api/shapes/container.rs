//! Containers: creation, update, commit and exec.

use super::{
    BOOL, CONSOLE_SIZE, EMPTY, FREE, FREE_LIST, FREE_MAP, INTEGER, NAME, NAME_LIST, NAMESPACE, PATH, UINT16, UINT32,
    UINT64, network,
};
use crate::rules::api::{
    kind::Text,
    shape::{Field, Shape},
};

/// `POST /containers/create`.
///
/// The engine also takes members of the host configuration at the top level, for clients from before API 1.18. They are
/// dropped: today's clients do not send them, and one place less has to be judged.
pub(in crate::rules::api) static CREATE: Shape = Shape::Object(&[
    CONFIG_FIELDS,
    &[("HostConfig", HOST_CONFIG), ("NetworkingConfig", Shape::Object(&[NETWORKING_FIELDS]))],
]);

/// `POST /commit`.
pub(in crate::rules::api) static CONFIG: Shape = Shape::Object(&[CONFIG_FIELDS]);

/// `POST /containers/{name}/update`.
pub(in crate::rules::api) static UPDATE: Shape =
    Shape::Object(&[RESOURCE_FIELDS, &[("RestartPolicy", RESTART_POLICY)]]);

/// `POST /containers/{name}/exec`.
pub(in crate::rules::api) static EXEC_CREATE: Shape = Shape::Object(&[&[
    ("User", FREE),
    ("Privileged", BOOL),
    ("Tty", BOOL),
    ("ConsoleSize", CONSOLE_SIZE),
    ("AttachStdin", BOOL),
    ("AttachStderr", BOOL),
    ("AttachStdout", BOOL),
    ("Detach", BOOL),
    ("DetachKeys", FREE),
    ("Env", FREE_LIST),
    ("WorkingDir", PATH),
    ("Cmd", FREE_LIST),
]]);

/// `POST /exec/{id}/start`.
pub(in crate::rules::api) static EXEC_START: Shape =
    Shape::Object(&[&[("Detach", BOOL), ("Tty", BOOL), ("ConsoleSize", CONSOLE_SIZE)]]);

const CONFIG_FIELDS: &[Field] = &[
    ("Hostname", FREE),
    ("Domainname", FREE),
    ("User", FREE),
    ("AttachStdin", BOOL),
    ("AttachStdout", BOOL),
    ("AttachStderr", BOOL),
    ("ExposedPorts", Shape::Map(Text::Free, &EMPTY)),
    ("Tty", BOOL),
    ("OpenStdin", BOOL),
    ("StdinOnce", BOOL),
    ("Env", FREE_LIST),
    ("Cmd", Shape::Words(Text::Free)),
    ("Healthcheck", HEALTHCHECK),
    ("ArgsEscaped", BOOL),
    ("Image", NAME),
    ("Volumes", Shape::Map(Text::Path, &EMPTY)),
    ("WorkingDir", PATH),
    ("Entrypoint", Shape::Words(Text::Free)),
    ("NetworkDisabled", BOOL),
    ("MacAddress", FREE),
    ("OnBuild", FREE_LIST),
    ("Labels", FREE_MAP),
    ("StopSignal", FREE),
    ("StopTimeout", INTEGER),
    ("Shell", Shape::Words(Text::Free)),
];

/// `container.HealthConfig`, also of services.
pub(super) const HEALTHCHECK: Shape = Shape::Object(&[&[
    ("Test", FREE_LIST),
    ("Interval", INTEGER),
    ("Timeout", INTEGER),
    ("StartPeriod", INTEGER),
    ("StartInterval", INTEGER),
    ("Retries", INTEGER),
]]);

const HOST_CONFIG: Shape = Shape::Object(&[
    &[
        ("Binds", Shape::List(&Shape::Text(Text::Bind))),
        // The client writes this file, not the engine.
        ("ContainerIDFile", FREE),
        ("LogConfig", LOG_CONFIG),
        ("NetworkMode", NAMESPACE),
        ("PortBindings", Shape::Map(Text::Free, &PORT_BINDINGS)),
        ("RestartPolicy", RESTART_POLICY),
        ("AutoRemove", BOOL),
        ("VolumeDriver", Shape::Text(Text::VolumeDriver)),
        ("VolumesFrom", Shape::List(&Shape::Text(Text::VolumesFrom))),
        ("ConsoleSize", CONSOLE_SIZE),
        ("Annotations", Shape::Map(Text::Annotation, &FREE)),
        ("CapAdd", Shape::Words(Text::Free)),
        ("CapDrop", Shape::Words(Text::Free)),
        ("CgroupnsMode", NAMESPACE),
        ("Dns", FREE_LIST),
        ("DnsOptions", FREE_LIST),
        ("DnsSearch", FREE_LIST),
        ("ExtraHosts", FREE_LIST),
        ("GroupAdd", FREE_LIST),
        ("IpcMode", NAMESPACE),
        ("Cgroup", NAMESPACE),
        ("Links", NAME_LIST),
        ("OomScoreAdj", INTEGER),
        ("PidMode", NAMESPACE),
        ("Privileged", BOOL),
        ("PublishAllPorts", BOOL),
        ("ReadonlyRootfs", BOOL),
        // Clients read the files of profiles themselves and send their contents.
        ("SecurityOpt", FREE_LIST),
        // The storage driver takes nothing but a size.
        ("StorageOpt", FREE_MAP),
        ("Tmpfs", Shape::Map(Text::Path, &FREE)),
        ("UTSMode", NAMESPACE),
        ("UsernsMode", NAMESPACE),
        ("ShmSize", INTEGER),
        ("Sysctls", FREE_MAP),
        ("Runtime", Shape::Text(Text::Runtime)),
        ("Isolation", FREE),
        ("Mounts", Shape::List(&MOUNT)),
        ("MaskedPaths", Shape::List(&PATH)),
        ("ReadonlyPaths", Shape::List(&PATH)),
        ("Init", BOOL),
    ],
    RESOURCE_FIELDS,
]);

const RESOURCE_FIELDS: &[Field] = &[
    ("CpuShares", INTEGER),
    ("Memory", INTEGER),
    ("NanoCpus", INTEGER),
    ("CgroupParent", Shape::Text(Text::CgroupParent)),
    ("BlkioWeight", UINT16),
    ("BlkioWeightDevice", Shape::List(&WEIGHT_DEVICE)),
    ("BlkioDeviceReadBps", Shape::List(&THROTTLE_DEVICE)),
    ("BlkioDeviceWriteBps", Shape::List(&THROTTLE_DEVICE)),
    ("BlkioDeviceReadIOps", Shape::List(&THROTTLE_DEVICE)),
    ("BlkioDeviceWriteIOps", Shape::List(&THROTTLE_DEVICE)),
    ("CpuPeriod", INTEGER),
    ("CpuQuota", INTEGER),
    ("CpuRealtimePeriod", INTEGER),
    ("CpuRealtimeRuntime", INTEGER),
    ("CpusetCpus", FREE),
    ("CpusetMems", FREE),
    ("Devices", Shape::List(&DEVICE)),
    // Numbers of devices; the runtime adds none to those that every container has.
    ("DeviceCgroupRules", FREE_LIST),
    ("DeviceRequests", Shape::List(&DEVICE_REQUEST)),
    ("KernelMemory", INTEGER),
    ("KernelMemoryTCP", INTEGER),
    ("MemoryReservation", INTEGER),
    ("MemorySwap", INTEGER),
    ("MemorySwappiness", INTEGER),
    ("OomKillDisable", BOOL),
    ("PidsLimit", INTEGER),
    ("Ulimits", Shape::List(&ULIMIT)),
    ("CpuCount", INTEGER),
    ("CpuPercent", INTEGER),
    ("IOMaximumIOps", UINT64),
    ("IOMaximumBandwidth", UINT64),
];

const WEIGHT_DEVICE: Shape = Shape::Object(&[&[("Path", Shape::Text(Text::Device)), ("Weight", UINT16)]]);
const THROTTLE_DEVICE: Shape = Shape::Object(&[&[("Path", Shape::Text(Text::Device)), ("Rate", UINT64)]]);
const DEVICE: Shape = Shape::Object(&[&[
    ("PathOnHost", Shape::Text(Text::Device)),
    ("PathInContainer", PATH),
    ("CgroupPermissions", FREE),
]]);
const DEVICE_REQUEST: Shape = Shape::Object(&[&[
    ("Driver", Shape::Text(Text::DeviceDriver)),
    ("Count", INTEGER),
    ("DeviceIDs", FREE_LIST),
    ("Capabilities", Shape::List(&FREE_LIST)),
    ("Options", FREE_MAP),
]]);

/// `units.Ulimit`, also of services.
pub(super) const ULIMIT: Shape =
    Shape::Object(&[&[("Name", Shape::Text(Text::Limit)), ("Hard", INTEGER), ("Soft", INTEGER)]]);

const LOG_CONFIG: Shape =
    Shape::Object(&[&[("Type", Shape::Text(Text::LogDriver)), ("Config", Shape::Map(Text::LogOption, &FREE))]]);
const RESTART_POLICY: Shape = Shape::Object(&[&[("Name", FREE), ("MaximumRetryCount", INTEGER)]]);
const PORT_BINDINGS: Shape = Shape::List(&Shape::Object(&[&[("HostIp", FREE), ("HostPort", FREE)]]));
const NETWORKING_FIELDS: &[Field] = &[("EndpointsConfig", Shape::Map(Text::Name, &network::ENDPOINT))];

/// `mount.Mount`, also of services.
pub(super) const MOUNT: Shape = Shape::Object(&[&[
    ("Type", Shape::Text(Text::MountType)),
    ("Source", Shape::Text(Text::MountSource)),
    ("Target", PATH),
    ("ReadOnly", BOOL),
    ("Consistency", FREE),
    ("BindOptions", BIND_OPTIONS),
    ("VolumeOptions", VOLUME_OPTIONS),
    ("TmpfsOptions", Shape::Object(&[&[("SizeBytes", INTEGER), ("Mode", UINT32)]])),
    ("ClusterOptions", EMPTY),
]]);
const BIND_OPTIONS: Shape = Shape::Object(&[&[
    ("Propagation", FREE),
    ("NonRecursive", BOOL),
    ("CreateMountpoint", BOOL),
    ("ReadOnlyNonRecursive", BOOL),
    ("ReadOnlyForceRecursive", BOOL),
]]);
const VOLUME_OPTIONS: Shape = Shape::Object(&[&[
    ("NoCopy", BOOL),
    ("Labels", FREE_MAP),
    // The engine resolves it below the volume.
    ("Subpath", PATH),
    (
        "DriverConfig",
        Shape::Object(&[&[
            ("Name", Shape::Text(Text::VolumeDriver)),
            ("Options", Shape::Map(Text::VolumeOption, &FREE)),
        ]]),
    ),
]]);
