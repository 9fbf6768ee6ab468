//! The settings of a profile: the values of a user, under the policy of the machine's administrator.
//!
//! | Subject                                             | File                                                     |
//! |-----------------------------------------------------|----------------------------------------------------------|
//! | each setting, its kind of value and its default     | `definition.rs`                                          |
//! | the value in effect: locked, set, policy or default | [`Settings::get`] below                                  |
//! | refusing to change a locked setting                 | `locks.rs`                                               |
//! | the administrator's policy, `admin-settings.json`   | `policy/`                                                |
//! | the forms of values                                 | `daemon.rs`, `network.rs`, `proxy.rs`, `shares.rs` …       |
//! | names of profiles, directories and files            | `profile.rs`, `paths.rs`                                 |
//!
//! Values are read when a VM is planned (`backend/plan.rs`), so a change takes effect at the next `start` or `restart`.

mod daemon;
mod definition;
mod error;
mod kinds;
mod locks;
mod maybe;
mod network;
mod paths;
pub mod policy;
mod profile;
mod proxy;
mod shares;
mod size;
mod socket_mount;
mod ssh_agent;
mod subnet;
mod vm_ports;
mod zone;

use std::{
    fs::{self, File},
    io,
    path::Path,
    str::FromStr,
    sync::Arc,
};

use bulkhead_protocol::SocketExceptions;
use nix::fcntl::{Flock, FlockArg};
use serde_json::{Map, Value};

use self::definition::{
    BLOCK_LOAD, CONTAINERS_PROXY, CPUS, DAEMON_OPTIONS, DISK_GIB, HOST_LOCKS, HOST_LOOPBACK, ISOLATION, MEMORY_MIB,
    NETWORK, PORT_BINDING, PROXY_EXCLUDE, PROXY_HTTP, PROXY_HTTPS, PROXY_MODE, SHARED_SOCKETS, SHARES, SOCKET_MOUNT,
    SSH_AGENT, SUBNET, TIME_ZONE, VM_PORTS,
};
pub use self::{
    definition::{DEFINITIONS, Definition, Kind, Origin},
    error::SettingsError,
    kinds::{OtherKind, same_kinds},
    network::{InvalidNetwork, NetworkKind},
    paths::{Base, Contents, PathError, Paths},
    policy::{Policy, PolicyFacts, PolicySource, PortBinding},
    profile::{InvalidName, ProfileName},
    proxy::{InvalidProxy, Proxy, ProxyEnvironment, ProxyUrl},
    shares::{AllowedDirectories, MAX_SHARED_DIRECTORIES, Places, SharedDirectory},
    size::{InvalidSize, Size},
    ssh_agent::{InvalidSshAgent, SshAgent},
    subnet::{InvalidSubnet, Subnet},
    vm_ports::{InvalidVmPort, VmPort},
    zone::{InvalidZone, Zone},
};

use crate::replace::replace;

/// Largest settings file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The values of a settings file under a policy. Keys that this version does not know are kept in the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    values: Map<String, Value>,
    policy: Arc<Policy>,
}

impl Settings {
    /// Reads a file; a missing one sets nothing.
    pub fn load(path: &Path) -> Result<Self, SettingsError> {
        let io_error = |source| SettingsError::Io { path: path.to_owned(), source };
        let text = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(io_error(error)),
            Ok(metadata) if metadata.len() > MAX_FILE => {
                return Err(io_error(io::Error::other("the file is larger than 1 MiB")));
            }
            Ok(_) => fs::read(path).map_err(io_error)?,
        };
        Self::parse(&text, path)
    }

    fn parse(text: &[u8], path: &Path) -> Result<Self, SettingsError> {
        let values = match serde_json::from_slice(text) {
            Ok(Value::Object(values)) => values,
            Ok(_) => return Err(SettingsError::Syntax { path: path.to_owned(), source: None }),
            Err(source) => return Err(SettingsError::Syntax { path: path.to_owned(), source: Some(source) }),
        };
        // A value of the wrong kind fails the whole file. With the default in its place, a VM would run with settings
        // that the user did not choose, and nobody would notice.
        for definition in DEFINITIONS {
            if let Some(value) = values.get(definition.key) {
                definition.check(value)?;
            }
        }
        Ok(Self { values, policy: Arc::default() })
    }

    /// The same values under `policy`.
    #[must_use]
    pub fn under(self, policy: Policy) -> Self {
        Self { policy: Arc::new(policy), ..self }
    }

    /// The value in effect: the policy's if it is locked, else the user's, else the policy's, else the default.
    pub fn get(&self, definition: &Definition) -> Value {
        let value = match self.origin(definition) {
            Origin::Locked | Origin::Policy => self.policy.rule(definition).map(|rule| &rule.value),
            Origin::User => self.values.get(definition.key),
            Origin::Default => None,
        };
        value.cloned().unwrap_or_else(|| definition.default_value())
    }

    /// The origin of the value in effect.
    pub fn origin(&self, definition: &Definition) -> Origin {
        match self.policy.rule(definition) {
            // First: the file may be edited by hand, past the check in `update`.
            Some(rule) if rule.locked => Origin::Locked,
            _ if self.is_set(definition) => Origin::User,
            Some(_) => Origin::Policy,
            None => Origin::Default,
        }
    }

    /// The administrator's policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Refuses options of `start` that contradict a locked setting.
    pub fn permit_options(
        &self,
        cpus: Option<u8>,
        memory_mib: Option<u64>,
        disk_gib: Option<u64>,
        network: Option<&NetworkKind>,
    ) -> Result<(), SettingsError> {
        let permit = |definition: &Definition, option: Option<Value>| match option {
            Some(option) => locks::refuse_option(&self.policy, definition, &self.get(definition), &option),
            None => Ok(()),
        };
        permit(&CPUS, cpus.map(Into::into))?;
        permit(&MEMORY_MIB, memory_mib.map(Into::into))?;
        permit(&DISK_GIB, disk_gib.map(Into::into))?;
        permit(&NETWORK, network.map(|kind| kind.to_string().into()))
    }

    /// Returns whether the file has a value for it, in effect or not.
    pub fn is_set(&self, definition: &Definition) -> bool {
        self.values.contains_key(definition.key)
    }

    // The getters below cannot meet a value of the wrong kind: `parse`, `update` and the policy have checked every
    // value. The fallbacks only keep them free of panics.

    fn flag(&self, definition: &Definition) -> bool {
        self.get(definition).as_bool().unwrap_or_default()
    }

    fn text<T: FromStr>(&self, definition: &Definition) -> Option<T> {
        self.get(definition).as_str()?.parse().ok()
    }

    /// Enhanced Container Isolation.
    pub fn isolation(&self) -> bool {
        self.flag(&ISOLATION)
    }

    /// The containers that may have the engine's socket while isolation is on.
    pub fn socket_exceptions(&self) -> SocketExceptions {
        let mount = socket_mount::parse(self.get(&SOCKET_MOUNT).as_str().unwrap_or_default());
        mount.as_ref().map(socket_mount::exceptions).unwrap_or_default()
    }

    /// Returns whether `docker load` is refused.
    pub fn block_load(&self) -> bool {
        self.flag(&BLOCK_LOAD)
    }

    /// vCPUs, if set.
    pub fn cpus(&self) -> Option<u8> {
        self.get(&CPUS).as_u64().and_then(|number| u8::try_from(number).ok())
    }

    /// Guest memory in MiB, if set.
    pub fn memory_mib(&self) -> Option<u64> {
        self.get(&MEMORY_MIB).as_u64()
    }

    /// Size of the data disk in GiB, if set.
    pub fn disk_gib(&self) -> Option<u64> {
        // Not the default: an existing disk keeps its size unless the user asks for another.
        self.is_set(&DISK_GIB).then(|| self.get(&DISK_GIB).as_u64()).flatten()
    }

    /// The network of the VM.
    pub fn network(&self) -> NetworkKind {
        self.text(&NETWORK).unwrap_or_default()
    }

    /// The VM's IPv4 network.
    pub fn subnet(&self) -> Subnet {
        self.text(&SUBNET).unwrap_or_default()
    }

    /// Returns whether the guest's names for the host lead to the host's loopback interface.
    pub fn host_loopback(&self) -> bool {
        self.flag(&HOST_LOOPBACK)
    }

    /// The host addresses on which published ports listen.
    pub fn port_binding(&self) -> PortBinding {
        serde_json::from_value(self.get(&PORT_BINDING)).unwrap_or_default()
    }

    /// Ports of the VM itself that the host publishes.
    pub fn vm_ports(&self) -> Vec<VmPort> {
        let ports = self.get(&VM_PORTS);
        ports.as_array().into_iter().flatten().filter_map(|port| port.as_str()?.parse().ok()).collect()
    }

    /// Returns whether locks in shared directories hold against the host's programs.
    pub fn host_locks(&self) -> bool {
        self.flag(&HOST_LOCKS)
    }

    /// Directories of the host that containers may mount.
    pub fn shared_directories(&self) -> Vec<SharedDirectory> {
        shares::parse(&self.get(&SHARES)).unwrap_or_default()
    }

    /// Sockets of the host that containers may mount, see [`Places::resolve`].
    pub fn shared_sockets(&self) -> Vec<String> {
        shares::parse_sockets(&self.get(&SHARED_SOCKETS)).unwrap_or_default()
    }

    /// The ssh-agent that containers may mount.
    pub fn ssh_agent(&self) -> SshAgent {
        self.text(&SSH_AGENT).unwrap_or_default()
    }

    /// The time zone of containers that mount the host's.
    pub fn time_zone(&self) -> Zone {
        self.text(&TIME_ZONE).unwrap_or_default()
    }

    /// The engine's proxy; `None` for that of the environment.
    pub fn proxy(&self) -> Option<Proxy> {
        // A policy's `containersProxy` governs pulls as well, and pulls are the engine's requests.
        if let Some(proxy) = self.policys_containers_proxy() {
            return Some(proxy);
        }
        if self.get(&PROXY_MODE) != "manual" {
            return None;
        }
        // Manual without URLs means no proxy, not the environment's.
        let exclude = self.get(&PROXY_EXCLUDE);
        let exclude = exclude.as_array().into_iter().flatten().filter_map(Value::as_str).map(ToOwned::to_owned);
        Some(Proxy { http: self.text(&PROXY_HTTP), https: self.text(&PROXY_HTTPS), exclude: exclude.collect() })
    }

    /// Returns whether the engine's proxy, or that it has none, is the policy's decision and not the user's. The proxy
    /// of a user's environment is not, also where the policy says that it counts.
    pub fn has_policys_proxy(&self) -> bool {
        let manual = self.policy.lock(&PROXY_MODE).is_some() && self.get(&PROXY_MODE) == "manual";
        manual || self.policys_containers_proxy().is_some()
    }

    /// Returns whether new containers get the engine's proxy in their environment.
    pub fn containers_proxy(&self) -> bool {
        self.flag(&CONTAINERS_PROXY)
    }

    /// The policy's proxy for containers, unless the user may turn it off and did.
    fn policys_containers_proxy(&self) -> Option<Proxy> {
        self.policy.containers_proxy().filter(|_| self.containers_proxy())
    }

    /// Options of dockerd, without those that would bypass another setting.
    pub fn daemon_options(&self) -> Map<String, Value> {
        let mut options = daemon::parse(self.get(&DAEMON_OPTIONS).as_str().unwrap_or_default()).unwrap_or_default();
        // The proxy plan overwrites `proxies` only if it has a proxy. Under a policy that decides for none, the user's
        // must go as well.
        if self.policy.lock(&PROXY_MODE).is_some() || self.policys_containers_proxy().is_some() {
            options.remove("proxies");
        }
        // `OnlyLoopback` is enforced by the backend; with this `docker ps` shows the loopback for it, too.
        if self.port_binding() != PortBinding::All {
            daemon::publish_on_loopback(&mut options);
        }
        options
    }

    /// Returns whether a proxy in these options takes precedence over the proxy settings and the environment.
    pub fn daemon_options_win(&self) -> bool {
        self.policy.lock(&DAEMON_OPTIONS).is_some()
    }

    /// Sets (`Some`) or unsets (`None`) one value in the profile's file unless `policy` locks it. Atomic, and safe
    /// against other writers.
    pub fn update(
        paths: &Paths,
        policy: &Policy,
        definition: &Definition,
        value: Option<Value>,
    ) -> Result<(), SettingsError> {
        Self::update_by(paths, policy, definition, |_| Ok(value))
    }

    /// Changes the directories that containers may mount: `change` returns the new list for the one in effect.
    pub fn update_shares<E: From<SettingsError>>(
        paths: &Paths,
        policy: &Policy,
        change: impl FnOnce(Vec<SharedDirectory>) -> Result<Vec<SharedDirectory>, E>,
    ) -> Result<(), E> {
        Self::update_by(paths, policy, &SHARES, |settings| {
            change(settings.shared_directories()).map(|directories| Some(serde_json::json!(directories)))
        })
    }

    /// Changes the ports of the VM that the host publishes: `change` returns the new list for the one in effect.
    pub fn update_vm_ports<E: From<SettingsError>>(
        paths: &Paths,
        policy: &Policy,
        change: impl FnOnce(Vec<VmPort>) -> Result<Vec<VmPort>, E>,
    ) -> Result<(), E> {
        Self::update_by(paths, policy, &VM_PORTS, |settings| {
            let ports = change(settings.vm_ports())?;
            Ok(Some(ports.iter().map(ToString::to_string).collect()))
        })
    }

    /// Sets or unsets one value to what `value` makes of the settings in effect. No other writer comes in between.
    fn update_by<E: From<SettingsError>>(
        paths: &Paths,
        policy: &Policy,
        definition: &Definition,
        value: impl FnOnce(&Self) -> Result<Option<Value>, E>,
    ) -> Result<(), E> {
        locks::refuse_change(policy, definition)?;
        let directory = paths.create_config().map_err(SettingsError::from)?;
        let path = paths.settings();
        let io_error = |source| SettingsError::Io { path: path.clone(), source };
        // The lock is on the directory because the file is replaced: two writers that had locked two different inodes
        // of it would each lose the other's change.
        let lock = File::open(&directory).map_err(io_error)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| io_error(errno.into()))?;
        // Read under the lock. A damaged file fails here and is not overwritten.
        let mut settings = Self::load(&path)?.under(policy.clone());
        match value(&settings)? {
            Some(value) => {
                definition.check(&value)?;
                settings.values.insert(definition.key.to_owned(), value);
            }
            None => {
                settings.values.remove(definition.key);
            }
        }
        write(&path, settings.values).map_err(io_error)?;
        drop(lock);
        Ok(())
    }
}

/// Writes a settings file. Only the user may read it: proxies have passwords.
fn write(path: &Path, values: Map<String, Value>) -> io::Result<()> {
    replace(path, &format!("{:#}\n", Value::Object(values)))
}

/// Entry points of the fuzz targets into this module.
#[cfg(feature = "fuzzing")]
pub mod fuzzing {
    use super::{DEFINITIONS, Path, Settings, policy};

    /// Reads `text` as a settings file, as a policy and as a value from the command line.
    pub fn settings(text: &[u8]) {
        if let Ok(parsed) = policy::parse(text) {
            // An accepted policy reads back as the same.
            let text = serde_json::to_vec(&parsed.document).unwrap_or_default();
            assert_eq!(policy::parse(&text).map(|again| again.document), Ok(parsed.document));
        }
        if let Ok(settings) = Settings::parse(text, Path::new("settings.json")) {
            for definition in DEFINITIONS {
                // An accepted value is valid when it is checked again.
                assert!(!settings.is_set(definition) || definition.check(&settings.get(definition)).is_ok());
            }
        }
        if let Ok(text) = std::str::from_utf8(text) {
            for definition in DEFINITIONS {
                if let Ok(value) = definition.parse(text) {
                    assert!(definition.check(&value).is_ok(), "{} = {text}", definition.key);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse(text.as_bytes(), Path::new("settings.json"))
    }

    #[test]
    fn isolation_is_on_unless_it_is_set_to_false() {
        assert!(Settings::default().isolation());
        assert!(!parse(r#"{"enhancedContainerIsolation": false}"#).unwrap().isolation());
    }

    #[test]
    fn a_value_of_the_wrong_kind_is_refused_and_never_read_as_the_default() {
        for text in [
            r#"{"enhancedContainerIsolation": "false"}"#,
            r#"{"enhancedContainerIsolation": null}"#,
            r#"{"cpus": 0}"#,
            r#"{"cpus": 33}"#,
            r#"{"memoryMiB": -1}"#,
            r#"{"diskGiB": 1.5}"#,
            r#"{"network": "bridge"}"#,
            r#"{"network": false}"#,
            r#"{"vpnkitCIDR": "8.8.8.0/24"}"#,
            r#"{"overrideProxyHttp": "http://a b"}"#,
            r#"{"overrideProxyExclude": ".corp"}"#,
        ] {
            assert!(matches!(parse(text), Err(SettingsError::InvalidValue { .. })), "{text}");
        }
    }

    #[test]
    fn each_getter_reads_its_own_setting() {
        let settings = parse(
            r#"{"cpus": 3, "memoryMiB": 2048, "diskGiB": 5, "network": "tap=vm0", "vpnkitCIDR": "10.9.0.0/20",
                "hostLoopback": false, "proxyHttpMode": "manual", "overrideProxyHttp": "http://p:1",
                "overrideProxyHttps": "http://q:2", "overrideProxyExclude": [".corp"], "containersProxy": true,
                "filesharingHostLocks": true}"#,
        )
        .unwrap();
        assert_eq!((settings.cpus(), settings.memory_mib(), settings.disk_gib()), (Some(3), Some(2048), Some(5)));
        assert_eq!((settings.network(), settings.isolation()), (NetworkKind::Tap("vm0".into()), true));
        assert_eq!((settings.subnet().to_string(), settings.host_loopback()), ("10.9.0.0/20".into(), false));
        let proxy = settings.proxy().unwrap();
        assert_eq!(proxy.http.unwrap().to_string(), "http://p:1");
        assert_eq!(proxy.https.unwrap().to_string(), "http://q:2");
        assert_eq!((proxy.exclude, settings.containers_proxy()), (vec![".corp".to_owned()], true));
        assert!(settings.host_locks());
    }

    #[test]
    fn nothing_set_means_the_users_network_and_the_environments_proxy() {
        let settings = Settings::default();
        assert_eq!((settings.network(), settings.subnet()), (NetworkKind::User, Subnet::default()));
        assert!(settings.host_loopback() && settings.proxy().is_none() && !settings.containers_proxy());
        assert!(!settings.host_locks());
        assert_eq!((settings.cpus(), settings.memory_mib(), settings.disk_gib()), (None, None, None));
    }

    #[test]
    fn an_unknown_key_is_kept_when_another_is_changed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("settings.json");
        fs::write(&path, r#"{"fromTheFuture": [1], "cpus": 2}"#).unwrap();
        let mut settings = Settings::load(&path).unwrap();
        settings.values.remove("cpus");
        write(&path, settings.values).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\n  \"fromTheFuture\": [\n    1\n  ]\n}\n");
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = Settings::parse(&bytes, Path::new("settings.json"));
        }

        #[test]
        fn a_number_in_range_reads_back(cpus in 1_u8..=32) {
            let value = CPUS.parse(&cpus.to_string()).unwrap();
            let text = format!("{{\"cpus\": {value}}}");
            prop_assert_eq!(parse(&text).unwrap().cpus(), Some(cpus));
        }
    }
}
