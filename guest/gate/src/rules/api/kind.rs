//! Kinds of text in requests: the part that says which judge a string of a client has to pass.

/// The meaning that a string has for dockerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Text {
    /// Text of the user that dockerd stores, compares or hands to a container: labels, commands, variables, flags.
    Free,
    /// Name or ID by which dockerd looks up something of its own: a container, a volume, an image, a network.
    Name,
    /// Path inside of a container or of a build's context. dockerd resolves it below that root.
    Path,
    /// Address that dockerd contacts over HTTP or as a registry, as it contacts any registry.
    Remote,
    /// Namespace that a container or a build step shares. The runtime and the builder refuse the VM's, with the
    /// documented texts.
    Namespace,
    /// `SOURCE:DESTINATION[:OPTIONS]`, whose source is a path of the VM or a volume.
    Bind,
    /// Source of a mount: a path of the VM or a volume.
    MountSource,
    /// Type of a mount (`bind`, `volume`, …).
    MountType,
    /// Container whose mounts another one takes.
    VolumesFrom,
    /// Name that a volume gets.
    VolumeName,
    /// Driver of a volume.
    VolumeDriver,
    /// Name of a driver's option for a volume.
    VolumeOption,
    /// Driver of a network.
    NetworkDriver,
    /// Name of a driver's option for a network.
    NetworkOption,
    /// Name of a driver's option for a container's end of a network.
    EndpointOption,
    /// Driver that assigns a network's addresses.
    AddressDriver,
    /// Subnet, range or address that a network takes from the VM's.
    Subnet,
    /// Log driver.
    LogDriver,
    /// Name of a log driver's option.
    LogOption,
    /// Parent of a container's cgroup.
    CgroupParent,
    /// Device of the VM.
    Device,
    /// Driver that adds devices to a container.
    DeviceDriver,
    /// Name of the runtime.
    Runtime,
    /// Name of a resource limit (setrlimit(2)).
    Limit,
    /// Key of an annotation, which the runtime reads as a setting.
    Annotation,
    /// File or registry key with credentials, on the engine's machine.
    Credentials,
    /// Address or device of the VM on which swarm listens, or address of another node.
    SwarmAddress,
    /// URL of a service that swarm asks for certificates.
    Url,
    /// Runtime of a service's tasks (`container`, `plugin`, …).
    TaskRuntime,
    /// Origin of a build's context, which dockerd fetches.
    BuildRemote,
    /// Flag that makes dockerd pack a build's layers itself.
    BuildSquash,
    /// JSON with the limits of a build's steps.
    BuildLimits,
    /// JSON with the destinations of a build's result.
    BuildOutputs,
    /// Flag that makes a commit read a container's files while it runs.
    CommitPause,
}

impl Text {
    /// Returns true if a judge has to look at each string of this kind.
    pub const fn is_judged(self) -> bool {
        // A list of those that need none, so that a new kind needs one.
        !matches!(self, Self::Free | Self::Name | Self::Path | Self::Remote | Self::Namespace)
    }
}
