//! The shape of `admin-settings.json`, as Docker Desktop's *Settings Management* documents it.
//!
//! A key that is there must have a value of its kind, and `null` is not one. Keys that are not listed are ignored. The
//! doc comments are the descriptions in `docs/admin-settings.schema.json`, so they are written for administrators.
//! `keys.rs` has the effect of each key.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde::{Deserialize, Serialize};

use crate::settings::{maybe::Maybe, socket_mount::SocketMount};

/// A setting under the administrator's control.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "{T}Setting")]
pub struct Setting<T> {
    /// Users cannot change it. If false, the value is the default for users who have not set their own.
    pub locked: bool,
    /// The value.
    pub value: T,
}

// A key that is absent here has to be absent when the document is written as JSON again, hence `skip_serializing_if`:
// the result is compared with the file (`parse::same_kinds`). Unknown keys are not denied, but collected for a warning;
// policies of Docker Desktop have many that mean nothing here.

/// Settings that the administrator of a machine makes for all its users.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(title = "admin-settings.json of Bulkhead")]
pub struct AdminSettings {
    /// Version of the file format: 2.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    #[schemars(range(min = 2, max = 2))]
    pub configuration_file_version: Maybe<u32>,
    /// Run each container in its own user namespace.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub enhanced_container_isolation: Maybe<Isolation>,
    /// Settings of the VM.
    #[serde(default, skip_serializing_if = "Maybe::is_none", rename = "linuxVM")]
    pub linux_vm: Maybe<LinuxVm>,
    /// The engine's HTTP proxy.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub proxy: Maybe<HttpProxy>,
    /// The HTTP proxy of containers, which the engine also uses to pull images.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub containers_proxy: Maybe<ContainersProxy>,
    /// Host directories that containers may mount.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub filesharing_allowed_directories: Maybe<Vec<AllowedDirectory>>,
    /// Refuse `docker load`.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub block_docker_load: Maybe<Setting<bool>>,
    /// Serve the Docker API on TCP port 2375 of the host, without TLS.
    #[serde(default, skip_serializing_if = "Maybe::is_none", rename = "exposeDockerAPIOnTCP2375")]
    pub expose_docker_api: Maybe<Setting<bool>>,
    /// Host addresses on which published ports listen.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub port_binding_behavior: Maybe<Setting<PortBinding>>,
}

impl AdminSettings {
    /// The document that stands for a file which cannot be used: isolation on and locked, without exceptions.
    pub(super) fn strictest() -> Self {
        // Other settings stay the user's: they restrict less than isolation does, and the administrator's values for
        // them are unknown.
        let isolation = Isolation { locked: true, value: true, docker_socket_mount: Maybe::default() };
        Self { enhanced_container_isolation: isolation.into(), ..Self::default() }
    }
}

/// Enhanced Container Isolation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Isolation {
    /// Users cannot change it, nor the exceptions for the Docker socket.
    pub locked: bool,
    /// Isolation is on.
    pub value: bool,
    /// Exceptions for containers that need the Docker socket; without them no container gets it.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub docker_socket_mount: Maybe<SocketMount>,
}

/// Settings of the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LinuxVm {
    /// Options of dockerd as in `daemon.json`: a JSON object, written as a string.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub docker_daemon_options: Maybe<Setting<String>>,
    /// IPv4 network of the VM, such as 192.168.65.0/24.
    #[serde(default, skip_serializing_if = "Maybe::is_none", rename = "vpnkitCIDR")]
    pub vpnkit_cidr: Maybe<Setting<String>>,
}

/// Source of the proxy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// The environment of the user who starts the VM.
    #[default]
    System,
    /// The URLs in this object.
    Manual,
}

impl ProxyMode {
    /// The value as it is in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Manual => "manual",
        }
    }
}

/// Makes the type of a key that holds a proxy: the fields that both proxies have, then those of one.
///
/// `serde(flatten)` would share them, too, but it buffers the object: the paths of unknown and wrong keys get lost.
macro_rules! http_proxy {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Users cannot change it.
            pub locked: bool,
            /// Source of the proxy.
            #[serde(default)]
            pub mode: ProxyMode,
            /// URL of the proxy for HTTP, used with mode manual.
            #[serde(default)]
            pub http: String,
            /// URL of the proxy for HTTPS, used with mode manual.
            #[serde(default)]
            pub https: String,
            /// Names, addresses and networks reached without the proxy, used with mode manual.
            #[serde(default)]
            pub exclude: Vec<String>,
            /// URL of a proxy auto-configuration file.
            #[serde(default)]
            pub pac: String,
            /// Contents of a proxy auto-configuration file.
            #[serde(default)]
            pub embedded_pac: String,
            $($own)*
        }
    };
}

http_proxy! {
    /// An HTTP proxy.
    HttpProxy {}
}

http_proxy! {
    /// The HTTP proxy of containers, which the engine also uses to pull images.
    ContainersProxy {
        /// Ports whose traffic is redirected to the proxy: `*`, or numbers separated by commas.
        #[serde(default)]
        pub transparent_ports: String,
    }
}

impl From<&ContainersProxy> for HttpProxy {
    fn from(key: &ContainersProxy) -> Self {
        Self {
            locked: key.locked,
            mode: key.mode,
            http: key.http.clone(),
            https: key.https.clone(),
            exclude: key.exclude.clone(),
            pac: key.pac.clone(),
            embedded_pac: key.embedded_pac.clone(),
        }
    }
}

/// A host directory that containers may mount, with everything below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllowedDirectory {
    /// Absolute path, or a path that starts with `$HOME`, `$TMP` or `$TEMP`.
    pub path: String,
    /// Share it without a user's request.
    #[serde(default)]
    pub shared_by_default: bool,
}

/// Host addresses on which published ports listen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PortBinding {
    /// All addresses, unless a container names one.
    #[default]
    #[serde(rename = "default-port-binding")]
    All,
    /// The loopback address, unless a container names another.
    #[serde(rename = "default-local-port-binding")]
    Loopback,
    /// The loopback address, whatever a container names.
    #[serde(rename = "local-only-port-binding")]
    OnlyLoopback,
}

/// The JSON Schema of the file (draft 2020-12), with a newline at its end.
pub fn schema() -> String {
    // Pretty-printed with sorted keys, so that a change of the types is a small change of the file in `docs/`.
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<AdminSettings>();
    format!("{:#}\n", schema.to_value())
}
