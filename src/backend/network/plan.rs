//! The network of a VM, from settings and host; every check that needs no VM is made here.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

use bulkhead_protocol::{Network, Network6};

use super::{
    passt::{Passt, PasstError},
    tap::{Tap, TapError},
};
use crate::settings::{NetworkKind, Settings, Subnet};
use bulkhead_net::{
    addresses::{Addresses, MTU, PREFIX6},
    api::Setup,
    nameservers,
};

/// Error of planning a VM's network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// The tap device.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The IPv4 network has too few addresses.
    #[error("the guest network {0} is too small for the guest, its router and the host; set another vpnkitCIDR")]
    Room(Subnet),
}

/// The process that serves the network device.
#[derive(Clone, Debug)]
pub(in crate::backend) enum Backend {
    /// Our own process with its TCP/IP stack.
    BuiltIn(Setup),
    /// passt(1).
    Passt(Passt),
    /// Our own process, which copies frames between the device and a tap device.
    Tap(Tap),
}

/// The network of a VM that has one.
#[derive(Clone, Debug)]
pub struct NetworkPlan {
    pub(in crate::backend) backend: Backend,
    addresses: Addresses,
    nameserver: Ipv4Addr,
}

impl NetworkPlan {
    /// Plans a network of this kind and checks what must exist on the host; `None` for a VM without a network.
    pub(in crate::backend) fn new(kind: &NetworkKind, settings: &Settings) -> Result<Option<Self>, NetworkError> {
        let subnet = settings.subnet();
        let setup = Setup { subnet: (subnet.first(), subnet.prefix()), host_loopback: settings.host_loopback() };
        let addresses = Addresses::new(&setup).ok_or(NetworkError::Room(subnet))?;
        let (backend, nameserver) = match kind {
            NetworkKind::None => return Ok(None),
            // The router is the name server, too: `bulkhead net` and passt forward questions to the host's servers as
            // they are at that moment.
            NetworkKind::User => (Backend::BuiltIn(setup), addresses.gateway),
            NetworkKind::Passt => (Backend::Passt(Passt::find()?), addresses.gateway),
            // Nothing of ours answers names behind a tap device, so the guest asks a server of the host itself. Without
            // a reachable one the user's router may run its own.
            NetworkKind::Tap(name) => (Backend::Tap(Tap::find(name)?), nameserver().unwrap_or(addresses.gateway)),
        };
        Ok(Some(Self { backend, addresses, nameserver }))
    }

    /// The program of the network, if it is not this one.
    pub(in crate::backend) fn program(&self) -> Option<&Path> {
        match &self.backend {
            Backend::Passt(passt) => Some(passt.program()),
            Backend::BuiltIn(_) | Backend::Tap(_) => None,
        }
    }

    /// The addresses of guest, router and host.
    pub(super) fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The host's address for a guest that does not ask our name server. With a tap device the router is this machine.
    fn host(&self) -> Ipv4Addr {
        match self.backend {
            Backend::BuiltIn(_) | Backend::Passt(_) => self.addresses.host,
            Backend::Tap(_) => self.addresses.gateway,
        }
    }

    /// Returns whether our own name server, which knows the host's names, answers the guest.
    fn has_names(&self) -> bool {
        matches!(self.backend, Backend::BuiltIn(_))
    }

    /// The guest's name or address for this machine's loopback; `None` if the guest cannot reach the loopback.
    pub(in crate::backend) fn host_for_guest(&self) -> Option<String> {
        if !self.addresses.host_loopback {
            return None;
        }
        match self.backend {
            Backend::BuiltIn(_) => Some("host.docker.internal".to_owned()),
            // dockerd could resolve the name from its hosts file, but containers could not.
            Backend::Passt(_) => Some(self.addresses.host.to_string()),
            // The router is this machine, but services on its loopback do not listen on the router's address.
            Backend::Tap(_) => None,
        }
    }

    /// Networks that the guest reaches without a proxy.
    pub(in crate::backend) fn own_networks(&self) -> Vec<String> {
        let mut networks = vec![format!("{}/{}", self.addresses.network, self.addresses.prefix)];
        // passt and a tap device have no IPv6.
        if self.has_names() {
            let first = self.addresses.host6.to_bits() >> (128 - PREFIX6) << (128 - PREFIX6);
            networks.push(format!("{}/{PREFIX6}", Ipv6Addr::from_bits(first)));
        }
        networks
    }

    /// The reason if this network cannot publish ports.
    pub(in crate::backend) fn no_ports(&self) -> Option<String> {
        let guest = self.addresses.guest;
        match &self.backend {
            Backend::BuiltIn(_) => None,
            // A passt that runs cannot be given a listening socket.
            Backend::Passt(_) => Some(
                "with the network `passt` no port can be published; `bulkhead settings set network user` allows it"
                    .to_owned(),
            ),
            Backend::Tap(tap) => Some(format!(
                "with a tap device no port can be published on the host; route the container's network through {guest} \
                 on {}, or `bulkhead settings set network user`",
                tap.name()
            )),
        }
    }

    /// The guest's part of the plan, as the agent configures its interface.
    pub(in crate::backend) fn guest(&self) -> Network {
        let addresses = &self.addresses;
        Network {
            address: addresses.guest,
            prefix: addresses.prefix,
            gateway: addresses.gateway,
            nameserver: self.nameserver,
            host: self.host(),
            // Without our name server the engine learns the host's names from its hosts file. With passt and without
            // the loopback there is nothing behind them; behind a tap device the router is the host in any case.
            hosts_file: match self.backend {
                Backend::BuiltIn(_) => false,
                Backend::Passt(_) => addresses.host_loopback,
                Backend::Tap(_) => true,
            },
            ipv6: self.has_names().then_some(Network6 {
                address: addresses.guest6,
                prefix: PREFIX6,
                gateway: addresses.gateway6,
                host: addresses.host6,
            }),
            // Frames go to a tap device as they are, so its MTU is the limit there.
            mtu: match &self.backend {
                Backend::BuiltIn(_) | Backend::Passt(_) => MTU,
                Backend::Tap(tap) => tap.mtu(),
            },
        }
    }
}

/// Returns the first name server of this machine that the guest can reach, too.
fn nameserver() -> Option<Ipv4Addr> {
    // A resolver on the loopback (systemd-resolved's 127.0.0.53) does not answer to other machines.
    nameservers().into_iter().find_map(|server| match server.ip() {
        IpAddr::V4(address) if !address.is_loopback() && !address.is_unspecified() => Some(address),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_addresses_follow_the_setting() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("settings.json");
        std::fs::write(&path, r#"{"vpnkitCIDR": "10.9.0.0/20", "hostLoopback": false}"#).unwrap();
        let settings = Settings::load(&path).unwrap();
        let plan = NetworkPlan::new(&NetworkKind::User, &settings).unwrap().unwrap();
        let guest = plan.guest();
        assert_eq!((guest.address.to_string(), guest.prefix), ("10.9.0.3".into(), 20));
        assert_eq!((guest.gateway.to_string(), guest.host.to_string()), ("10.9.0.1".into(), "10.9.15.254".into()));
        assert_eq!((guest.nameserver, guest.hosts_file), (guest.gateway, false));
        assert_eq!(plan.host_for_guest(), None);
        assert!(plan.no_ports().is_none());
        let Backend::BuiltIn(setup) = plan.backend else { panic!() };
        assert_eq!((setup.subnet, setup.host_loopback), (([10, 9, 0, 0].into(), 20), false));
        assert!(NetworkPlan::new(&NetworkKind::None, &settings).unwrap().is_none());
    }
}
