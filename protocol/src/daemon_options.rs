//! Options of dockerd that a user may set.
//!
//! One table for two programs: init takes from the user's options what the table allows ([`Rule`]), and the backend
//! asks it whether an option may change which registry the engine believes ([`DaemonOption::concerns_registries`]). An
//! option that init leaves out has no effect, so it concerns nothing.
//!
//! An option is known by the lower-case spelling that dockerd documents. Go's decoder would take others as well, but
//! dockerd refuses to start with them, so nothing is lost, and no second spelling can get past the table.

/// The rule for an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// Taken with any value; dockerd itself checks the type.
    Any,
    /// Taken as far as its value is allowed.
    Checked(Check),
    /// Taken without isolation only.
    WithoutIsolation,
    /// Left out.
    Never(Reason),
}

/// The values that an option may have. The guest's policy decides by them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// The engine's proxies.
    Proxies,
    /// The name of a log driver that is part of the engine.
    LogDriver,
    /// Options of the log driver.
    LogOptions,
    /// Options of new networks, by driver.
    NetworkOptions,
    /// The name of a seccomp profile, not its file.
    SeccompProfile,
    /// The builder's garbage collection and history.
    Builder,
}

/// The reason why an option is left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Bulkhead's own value is the only one that works in the VM.
    Ours,
    /// It would lead dockerd to a file, program, socket, device or address of the VM.
    NamesVm,
    /// It would let clients past the gate, or show the engine to containers.
    OpensEngine,
    /// It would take the VM's network away from containers, or isolation from both.
    BreaksVm,
}

use Check::{Builder, LogDriver, LogOptions, NetworkOptions, Proxies, SeccompProfile};
use Reason::{BreaksVm, NamesVm, OpensEngine, Ours};
use Rule::{Any, Checked, Never, WithoutIsolation};

/// An option of dockerd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DaemonOption {
    /// Name in `daemon.json`.
    pub name: &'static str,
    /// Its treatment by init.
    pub rule: Rule,
    /// It may change which registry the engine asks, or by what it believes one.
    pub concerns_registries: bool,
}

const fn registries(name: &'static str, rule: Rule) -> DaemonOption {
    DaemonOption { name, rule, concerns_registries: true }
}

const fn other(name: &'static str, rule: Rule) -> DaemonOption {
    DaemonOption { name, rule, concerns_registries: false }
}

/// Everything in dockerd 26.1's `daemon/config`, in its order of subjects.
pub const DAEMON_OPTIONS: &[DaemonOption] = &[
    // Registries: names and URLs that a client could pull from anyway.
    registries("registry-mirrors", Any),
    registries("insecure-registries", Any),
    registries("allow-nondistributable-artifacts", Any),
    other("max-concurrent-downloads", Any),
    other("max-concurrent-uploads", Any),
    other("max-download-attempts", Any),
    registries("proxies", Checked(Proxies)),
    // Output of dockerd and of containers.
    other("debug", Any),
    other("log-level", Any),
    other("log-format", Any),
    other("raw-logs", Any),
    other("log-driver", Checked(LogDriver)),
    other("log-opts", Checked(LogOptions)),
    // Networks of containers: numbers and addresses inside of the VM.
    other("bip", Any),
    other("fixed-cidr", Any),
    other("fixed-cidr-v6", Any),
    other("ipv6", Any),
    other("ip6tables", Any),
    other("mtu", Any),
    other("icc", Any),
    other("ip", Any),
    other("default-gateway", Any),
    other("default-gateway-v6", Any),
    other("default-address-pools", Any),
    other("default-network-opts", Checked(NetworkOptions)),
    other("network-control-plane-mtu", Any),
    other("dns", Any),
    other("dns-opts", Any),
    other("dns-search", Any),
    other("host-gateway-ip", Any),
    // Defaults of new containers. The runtime judges the result as if the client had asked for it.
    other("default-ulimits", Any),
    other("default-shm-size", Any),
    other("default-ipc-mode", Any),
    other("default-cgroupns-mode", Any),
    other("no-new-privileges", Any),
    other("init", Any),
    other("seccomp-profile", Checked(SeccompProfile)),
    other("shutdown-timeout", Any),
    // The builder's garbage collection and history; what build steps may do is not the user's to say.
    other("builder", Checked(Builder)),
    // Descriptions.
    other("labels", Any),
    other("node-generic-resources", Any),
    other("swarm-default-advertise-addr", Any),
    // A runtime is a program that runs as the VM's root, outside of any container.
    other("runtimes", WithoutIsolation),
    other("default-runtime", WithoutIsolation),
    // Other ways to dockerd than through the gate, and its state shown to containers.
    other("hosts", Never(OpensEngine)),
    other("group", Never(OpensEngine)),
    other("tls", Never(OpensEngine)),
    other("tlscacert", Never(OpensEngine)),
    other("tlscert", Never(OpensEngine)),
    other("tlskey", Never(OpensEngine)),
    other("tlsverify", Never(OpensEngine)),
    other("api-cors-header", Never(OpensEngine)),
    other("metrics-addr", Never(OpensEngine)),
    other("network-diagnostic-port", Never(OpensEngine)),
    other("authorization-plugins", Never(OpensEngine)),
    other("cri-containerd", Never(OpensEngine)),
    // Paths of the VM, which dockerd would read, write or execute as its root.
    other("cdi-spec-dirs", Never(NamesVm)),
    other("init-path", Never(NamesVm)),
    other("default-init", Never(NamesVm)),
    other("resolv-conf", Never(NamesVm)),
    other("cgroup-parent", Never(NamesVm)),
    other("bridge", Never(NamesVm)),
    other("userland-proxy-path", Never(NamesVm)),
    // State and drivers: on the data disk, and those that the runtime and init know.
    other("data-root", Never(Ours)),
    other("graph", Never(Ours)),
    other("exec-root", Never(Ours)),
    other("pidfile", Never(Ours)),
    other("containerd", Never(Ours)),
    other("containerd-namespace", Never(Ours)),
    other("containerd-plugin-namespace", Never(Ours)),
    other("containerd-plugins-namespace", Never(Ours)),
    other("storage-driver", Never(Ours)),
    other("storage-opts", Never(Ours)),
    other("exec-opts", Never(Ours)),
    other("live-restore", Never(Ours)),
    other("userland-proxy", Never(Ours)),
    other("features", Never(Ours)),
    other("experimental", Never(Ours)),
    // The host knows the VM's address only, so containers without address translation have no network; the rest needs
    // what the VM does not have.
    other("iptables", Never(BreaksVm)),
    other("ip-forward", Never(BreaksVm)),
    other("ip-masq", Never(BreaksVm)),
    other("userns-remap", Never(BreaksVm)),
    other("rootless", Never(BreaksVm)),
    other("selinux-enabled", Never(BreaksVm)),
    other("cpu-rt-period", Never(BreaksVm)),
    other("cpu-rt-runtime", Never(BreaksVm)),
];

/// Returns the option of this name; `None` for a new, removed or misspelled one.
#[must_use]
pub fn daemon_option(name: &str) -> Option<&'static DaemonOption> {
    DAEMON_OPTIONS.iter().find(|option| option.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_option_is_in_the_table_twice() {
        let mut names: Vec<_> = DAEMON_OPTIONS.iter().map(|option| option.name).collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn an_option_that_is_left_out_concerns_no_registry() {
        let left_out = DAEMON_OPTIONS.iter().filter(|option| matches!(option.rule, Never(_) | WithoutIsolation));
        assert!(left_out.clone().count() > 0);
        assert_eq!(left_out.filter(|option| option.concerns_registries).count(), 0);
    }

    #[test]
    fn names_are_found_in_their_own_spelling_only() {
        assert!(daemon_option("registry-mirrors").is_some_and(|option| option.concerns_registries));
        assert_eq!(daemon_option("Registry-Mirrors"), None);
        assert_eq!(daemon_option("never-heard-of"), None);
    }
}
