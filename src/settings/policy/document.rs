//! The keys of `admin-settings.json`, as Docker Desktop's *Settings Management* documents them.
//!
//! A key that is there must have a value of its kind: `null` is none. Keys that are not listed are ignored.

use schemars::{JsonSchema, generate::SchemaSettings};
use serde::{Deserialize, Serialize};

use crate::settings::{maybe::Maybe, socket_mount::SocketMount};

/// A setting that an administrator decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[schemars(rename = "{T}Setting")]
pub struct Setting<T> {
    /// Whether nobody else can change it; otherwise the value is what holds while nobody does.
    pub locked: bool,
    /// The value.
    pub value: T,
}

/// Settings that an administrator of this machine decides for everybody on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
#[schemars(title = "admin-settings.json of Bulkhead")]
pub struct AdminSettings {
    /// Version of the format: 2.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    #[schemars(range(min = 2, max = 2))]
    pub configuration_file_version: Maybe<u32>,
    /// Run every container in a user namespace of its own.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub enhanced_container_isolation: Maybe<Isolation>,
    /// The VM.
    #[serde(default, skip_serializing_if = "Maybe::is_none", rename = "linuxVM")]
    pub linux_vm: Maybe<LinuxVm>,
    /// The engine's HTTP proxy.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub proxy: Maybe<HttpProxy>,
    /// The containers' HTTP proxy, by which the engine pulls, too.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub containers_proxy: Maybe<ContainersProxy>,
    /// Folders of the host that containers may be given.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub filesharing_allowed_directories: Maybe<Vec<AllowedDirectory>>,
    /// Refuse `docker load`.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub block_docker_load: Maybe<Setting<bool>>,
    /// The engine on TCP port 2375 of the host, without TLS.
    #[serde(default, skip_serializing_if = "Maybe::is_none", rename = "exposeDockerAPIOnTCP2375")]
    pub expose_docker_api: Maybe<Setting<bool>>,
    /// On which of the host's addresses a published port listens.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub port_binding_behavior: Maybe<Setting<PortBinding>>,
}

impl AdminSettings {
    /// The document that stands for a file which cannot be used: isolation on and locked, without exceptions.
    pub(super) fn strictest() -> Self {
        let isolation = Isolation { locked: true, value: true, docker_socket_mount: Maybe::default() };
        Self { enhanced_container_isolation: isolation.into(), ..Self::default() }
    }
}

/// Enhanced Container Isolation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Isolation {
    /// Whether nobody else can change it; it locks the exceptions, too.
    pub locked: bool,
    /// Whether it is on.
    pub value: bool,
    /// Which containers may have the engine's socket; without it, none.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub docker_socket_mount: Maybe<SocketMount>,
}

/// The VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LinuxVm {
    /// Options of dockerd (`daemon.json`): a text that is a JSON object.
    #[serde(default, skip_serializing_if = "Maybe::is_none")]
    pub docker_daemon_options: Maybe<Setting<String>>,
    /// The VM's IPv4 network, such as 192.168.65.0/24.
    #[serde(default, skip_serializing_if = "Maybe::is_none", rename = "vpnkitCIDR")]
    pub vpnkit_cidr: Maybe<Setting<String>>,
}

/// Whose proxy is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ProxyMode {
    /// That of the environment.
    #[default]
    System,
    /// The one given here.
    Manual,
}

impl ProxyMode {
    /// Its word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Manual => "manual",
        }
    }
}

/// Makes the type of a key that holds a proxy, with keys of its own behind those that both have.
///
/// Not by `serde(flatten)`: behind that nobody learns which key is unknown or wrong.
macro_rules! http_proxy {
    ($(#[$about:meta])* $name:ident { $($own:tt)* }) => {
        $(#[$about])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase")]
        pub struct $name {
            /// Whether nobody else can change it.
            pub locked: bool,
            /// Whose proxy is taken.
            #[serde(default)]
            pub mode: ProxyMode,
            /// For http, with mode manual.
            #[serde(default)]
            pub http: String,
            /// For https, with mode manual.
            #[serde(default)]
            pub https: String,
            /// What is reached without it, with mode manual.
            #[serde(default)]
            pub exclude: Vec<String>,
            /// URL of a proxy auto-configuration file.
            #[serde(default)]
            pub pac: String,
            /// A proxy auto-configuration file.
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
    /// The containers' HTTP proxy, by which the engine pulls, too.
    ContainersProxy {
        /// Ports whose traffic is led to the proxy: `*`, or numbers with commas between.
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

/// A folder of the host that containers may be given, with all below it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AllowedDirectory {
    /// Absolute, or beginning with `$HOME`, `$TMP` or `$TEMP`.
    pub path: String,
    /// Whether it is shared without being asked for.
    #[serde(default)]
    pub shared_by_default: bool,
}

/// On which of the host's addresses a published port listens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PortBinding {
    /// On all, unless one is named.
    #[default]
    #[serde(rename = "default-port-binding")]
    All,
    /// On the loopback, unless one is named.
    #[serde(rename = "default-local-port-binding")]
    Loopback,
    /// On the loopback, whatever is named.
    #[serde(rename = "local-only-port-binding")]
    OnlyLoopback,
}

/// The JSON Schema of the file (draft 2020-12), with a line feed at its end.
pub fn schema() -> String {
    let schema = SchemaSettings::draft2020_12().into_generator().into_root_schema_for::<AdminSettings>();
    format!("{:#}\n", schema.to_value())
}
