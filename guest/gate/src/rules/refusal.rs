//! Reasons for which the gate refuses a request.

use bulkhead_policy::{drivers, logs, networks, sources, volumes};

use super::image_name::normalise;

/// The reason for which a request does not pass. The text is the one that docker shows; scripts look for Docker's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An engine socket would get into a container; Docker's own text.
    #[error(
        "enhanced container isolation: docker socket mount denied for container with image \"{image}\"; image is not \
         in the allowed list; if you wish to allow it, configure the docker socket image list in the Docker Desktop \
         settings."
    )]
    SocketMount {
        /// The container's image, normalised and without tag.
        image: String,
    },
    /// A volume would lead to an engine socket.
    #[error(
        "enhanced container isolation: docker socket mount denied for volume \"{name}\"; a volume can't lead to an \
         engine socket"
    )]
    SocketVolume {
        /// The volume's name; empty if dockerd would choose it.
        name: String,
    },
    /// The source of a mount is not for containers.
    #[error("{}", as_at_start(.0))]
    Source(sources::Error),
    /// A path is in a share, and the shares are not mounted.
    #[error(
        "cannot mount {0}: the VM has no connection to the host's directories; `bulkhead logs` shows the reason, and \
         `bulkhead restart` tries it again"
    )]
    SharesMissing(String),
    /// The host offers no ssh-agent.
    #[error(
        "cannot mount /run/host-services/ssh-auth.sock: the VM has no ssh-agent; set SSH_AUTH_SOCK for `bulkhead start`, or \
         the setting sshAgent, and start the engine again"
    )]
    NoSshAgent,
    /// The host offers no such socket any more.
    #[error(
        "cannot mount the host's socket: it is not in the setting filesharingSockets any more; add it and start the engine \
         again, or remove the container and create it once more"
    )]
    NoHostSocket,
    /// A volume shows something of the VM.
    #[error(transparent)]
    Volume(#[from] volumes::Error),
    /// A driver is not part of the engine.
    #[error(transparent)]
    Driver(#[from] drivers::Error),
    /// A log goes to something of the VM.
    #[error(transparent)]
    Log(#[from] logs::Error),
    /// A network uses a device or an address of the VM.
    #[error(transparent)]
    Network(#[from] networks::Error),
    /// A volume of a container is not known, so nobody can say what it shows.
    #[error("volume {0:?} can't be used: the engine does not know its options; create it again")]
    UnknownVolume(String),
    /// A mount has a type that needs a plugin, Windows or a later engine.
    #[error("mount type {0:?} is not allowed with Enhanced Container Isolation: use bind, volume or tmpfs")]
    MountType(String),
    /// A cgroup of the VM.
    #[error(
        "cgroup parent {0:?} is not allowed with Enhanced Container Isolation: use /docker or a path below it, such as \
         /docker/NAME"
    )]
    CgroupParent(String),
    /// A limit that ranks processes.
    #[error(
        "ulimit {0:?} is not allowed with Enhanced Container Isolation: it would give the container's processes priority \
         over the VM's own; leave it out"
    )]
    Limit(String),
    /// An annotation that containerd obeys.
    #[error("annotation {0:?} is not allowed with Enhanced Container Isolation: choose a name without io.containerd.")]
    Annotation(String),
    /// The path of a device.
    #[error("device {0:?} is not allowed with Enhanced Container Isolation: use a plain path below /dev")]
    Device(String),
    /// A driver for devices.
    #[error("device driver {0:?} is not allowed with Enhanced Container Isolation: name devices by --device=/dev/NAME")]
    DeviceDriver(String),
    /// A part of the engine that isolation does without.
    #[error("{0} is not allowed with Enhanced Container Isolation")]
    Feature(&'static str),
    /// A swarm whose managers are elsewhere.
    #[error(
        "docker swarm join is not allowed with Enhanced Container Isolation: the managers of that swarm could name \
         drivers and devices of the VM; use docker swarm init"
    )]
    SwarmJoin,
    /// An address that is not one of the network.
    #[error("{field} {value:?} is not allowed with Enhanced Container Isolation: use HOST:PORT")]
    Address {
        /// The field of the request.
        field: &'static str,
        /// Its value.
        value: String,
    },
    /// A parameter of a build.
    #[error("build parameter {name}={value:?} is not allowed with Enhanced Container Isolation")]
    Build {
        /// The parameter.
        name: String,
        /// Its value.
        value: String,
    },
    /// The list of commands does not allow this path and query from a container's socket; Docker's own text.
    #[error(
        "enhanced container isolation: docker command \"{0}\" is blocked; if you wish to allow it, configure the docker \
         socket command list in the Docker Desktop settings."
    )]
    Command(String),
    /// `docker load` is blocked.
    #[error("docker load is blocked by the administrator (blockDockerLoad)")]
    Load,
    /// The table of routes has no such request.
    #[error(
        "the gate does not know {method} {path}; Enhanced Container Isolation passes only requests of Docker Engine 26.1 \
         that it knows"
    )]
    Route {
        /// The method.
        method: String,
        /// The path, in its one spelling.
        path: String,
    },
    /// A checkpoint, by its routes.
    #[error("docker checkpoint is not supported: its requests name directories of the VM")]
    Checkpoint,
    /// The query is not one that can be read in exactly one way.
    #[error("invalid parameter in the request: {0:?}")]
    Query(String),
    /// The container has more volumes than are looked at.
    #[error(
        "the container mounts more than {0} volumes, which Enhanced Container Isolation cannot check; use fewer volumes"
    )]
    TooManyVolumes(usize),
    /// The body is not JSON that can be read in exactly one way.
    #[error("invalid JSON in the request: {0}")]
    Malformed(String),
}

/// Returns the text of a refused source. Docker documents the one for paths as it is if the runtime refuses at the start
/// of the container, with the engine's words around it.
fn as_at_start(error: &sources::Error) -> String {
    match error {
        sources::Error::Restricted(_) => format!(
            "failed to create task for container: failed to create shim task: OCI runtime create failed: {error}: unknown"
        ),
        sources::Error::NotShared(_) | sources::Error::VolumeName(_) => error.to_string(),
    }
}

impl From<sources::Error> for Refusal {
    fn from(error: sources::Error) -> Self {
        Self::Source(error)
    }
}

impl Refusal {
    /// Refuses the socket to a container of this image, named as the client named it.
    pub fn socket(image: &str) -> Self {
        let image = if image.is_empty() { String::new() } else { normalise(image) };
        Self::SocketMount { image }
    }
}
