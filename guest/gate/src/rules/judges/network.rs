//! `POST /networks/create` and `/networks/{id}/connect`, and a container's ends of networks.

use bulkhead_policy::{
    drivers,
    networks::{self, VmNetwork},
};
use serde_json::Value;

use super::values::{elements, pairs, text, texts};
use crate::rules::Refusal;

/// Judges the creation of a network. `Scope`, `Internal`, `Attachable`, `ConfigOnly`, `ConfigFrom`, labels and the options
/// of the address management are opaque: the built-in drivers of addresses read none, and configurations that are taken
/// over were judged when they were created.
pub(crate) fn create(body: &mut Value, vm: &VmNetwork) -> Result<(), Refusal> {
    drivers::network(text(body, "Driver")?)?;
    for (key, value) in pairs(body, "Options")? {
        networks::option(key, value, vm)?;
    }
    let addresses = &body["IPAM"];
    drivers::address_management(text(addresses, "Driver")?)?;
    for pool in elements(addresses, "Config")? {
        subnets(pool, &["Subnet", "IPRange"], vm)?;
        let gateway = text(pool, "Gateway")?;
        if !gateway.is_empty() {
            vm.address(gateway)?;
        }
        for (_, address) in pairs(pool, "AuxiliaryAddresses")? {
            vm.address(address)?;
        }
    }
    Ok(())
}

/// Judges the subnets of a pool of addresses under these keys. An empty text is a missing one.
fn subnets(pool: &Value, keys: &[&str], vm: &VmNetwork) -> Result<(), Refusal> {
    for key in keys {
        let subnet = text(pool, key)?;
        if !subnet.is_empty() {
            vm.subnet(subnet)?;
        }
    }
    Ok(())
}

/// Judges a container's end of a network. Its addresses have to be in the network's subnet, which was judged when the
/// network was created. Links and aliases are names for the containers' name server.
pub(super) fn endpoint(endpoint: &Value) -> Result<(), Refusal> {
    for (key, _) in pairs(endpoint, "DriverOpts")? {
        networks::endpoint_option(key)?;
    }
    let addresses = &endpoint["IPAMConfig"];
    let own = [text(addresses, "IPv4Address")?, text(addresses, "IPv6Address")?];
    for address in own.into_iter().chain(texts(addresses, "LinkLocalIPs")?).filter(|address| !address.is_empty()) {
        networks::address(address)?;
    }
    Ok(())
}

/// Networks that the engine makes itself, with names that no other network can have.
pub(crate) const PREDEFINED: [&str; 3] = ["bridge", "host", "none"];

/// Judges a network that a container joins, by `GET /networks/NAME`: it can be older than isolation, or than the VM's
/// addresses. The description has what the engine added, so only the parts that lead to the VM's network count.
pub(crate) fn joined(description: &Value, vm: &VmNetwork) -> Result<(), Refusal> {
    if PREDEFINED.contains(&text(description, "Name")?) {
        return Ok(());
    }
    drivers::network(text(description, "Driver")?)?;
    for (key, value) in pairs(description, "Options")?.into_iter().filter(|(key, _)| networks::names_device(key)) {
        networks::option(key, value, vm)?;
    }
    for pool in elements(&description["IPAM"], "Config")? {
        subnets(pool, &["Subnet"], vm)?;
    }
    Ok(())
}

/// Judges the connection of a container to a network.
pub(crate) fn connect(body: &mut Value) -> Result<(), Refusal> {
    endpoint(&body["EndpointConfig"])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn judged(mut body: Value) -> Result<(), Refusal> {
        let before = body.clone();
        let vm = VmNetwork::new(["192.168.65.3/24", "fd0b:ad:c0ff::3/64"].map(|text| text.parse().unwrap()));
        let judged = create(&mut body, &vm);
        assert_eq!(body, before);
        judged
    }

    #[test]
    fn networks_of_compose_files_and_documentation_pass_unchanged() {
        for body in [
            json!({"Name": "app_default", "Driver": "bridge", "IPAM": {"Driver": "default"}, "CheckDuplicate": true}),
            json!({"Name": "n", "Driver": "bridge", "EnableIPv6": true, "IPAM": {"Driver": "default", "Config": [
                {"Subnet": "172.20.0.0/16", "IPRange": "172.20.10.0/24", "Gateway": "172.20.10.11",
                    "AuxiliaryAddresses": {"my-router": "172.20.1.5"}},
                {"Subnet": "2001:db8:abcd::/64", "Gateway": "2001:db8:abcd::1011"}], "Options": {"foo": "bar"}},
                "Options": {"com.docker.network.bridge.enable_icc": "true", "com.docker.network.bridge.name": "br-app",
                    "com.docker.network.driver.mtu": "1500", "com.docker.network.bridge.host_binding_ipv4": "0.0.0.0"}}),
            json!({"Name": "m", "Driver": "macvlan", "Options": {"macvlan_mode": "bridge"},
                "IPAM": {"Config": [{"Subnet": "172.16.86.0/24", "Gateway": "172.16.86.1"}]}}),
            json!({"Name": "i", "Driver": "ipvlan", "Options": {"ipvlan_mode": "l3"}, "IPAM": {"Driver": "null"}}),
            json!({"Name": "o", "Driver": "overlay", "Attachable": true, "Options": {"encrypted": ""}}),
            json!({"Name": "c", "ConfigOnly": true, "IPAM": {"Config": [{"Subnet": "10.9.0.0/24", "Gateway": ""}]}}),
        ] {
            assert_eq!(judged(body.clone()), Ok(()), "{body}");
        }
    }

    #[test]
    fn networks_over_the_vms_device_or_addresses_and_plugins_are_refused() {
        for body in [
            json!({"Driver": "macvlan", "Options": {"parent": "eth0", "macvlan_mode": "passthru"}}),
            json!({"Driver": "ipvlan", "Options": {"parent": "eth0"}}),
            json!({"Driver": "macvlan", "Options": {"parent": "eth0.10"}}),
            json!({"ConfigOnly": true, "Options": {"parent": "eth0"}}),
            json!({"Driver": "bridge", "IPAM": {"Config": [{"Subnet": "192.168.65.0/24"}]}}),
            json!({"Driver": "bridge", "IPAM": {"Config": [{"Subnet": "192.168.0.0/16"}]}}),
            json!({"IPAM": {"Config": [{"Subnet": "172.20.0.0/16", "Gateway": "192.168.65.1"}]}}),
            json!({"IPAM": {"Config": [{"Subnet": "172.20.0.0/16", "AuxiliaryAddresses": {"DefaultGatewayIPv4": "192.168.65.1"}}]}}),
            json!({"IPAM": {"Config": [{"Subnet": "fd0b:ad:c0ff::/64"}]}}),
            json!({"IPAM": {"Config": [{"Subnet": "172.20.0.0"}]}}),
            json!({"Driver": "../../var/lib/docker/volumes/v/_data/p"}),
            json!({"IPAM": {"Driver": "../p"}}),
            json!({"Options": {"com.docker.network.bridge.name": "eth0"}}),
            json!({"Options": {"com.docker.network.bridge.name": "../x"}}),
        ] {
            assert!(judged(body.clone()).is_err(), "{body}");
        }
    }

    #[test]
    fn a_network_from_before_isolation_is_refused_if_it_leads_to_the_vms() {
        let vm = VmNetwork::new(["192.168.65.3/24".parse().unwrap()]);
        for description in [
            json!({"Name": "bridge", "Driver": "bridge", "Options": {"com.docker.network.bridge.name": "docker0"}}),
            json!({"Name": "app_default", "Driver": "bridge", "Options": null,
                "IPAM": {"Config": [{"Subnet": "172.18.0.0/16", "Gateway": "172.18.0.1/16"}]}}),
            json!({"Name": "o", "Driver": "overlay", "Options": {"com.docker.network.driver.overlay.vxlanid_list": "4097"}}),
            json!({"Name": "none", "Driver": "null"}),
        ] {
            assert_eq!(joined(&description, &vm), Ok(()), "{description}");
        }
        for description in [
            json!({"Name": "m", "Driver": "macvlan", "Options": {"parent": "eth0"}}),
            json!({"Name": "b", "Driver": "bridge", "Options": {"com.docker.network.bridge.name": "eth0"}}),
            json!({"Name": "s", "Driver": "bridge", "IPAM": {"Config": [{"Subnet": "192.168.0.0/16"}]}}),
            json!({"Name": "p", "Driver": "../p"}),
            json!({"Name": "x", "Driver": "bridge", "Options": {"parent": 1}}),
        ] {
            assert!(joined(&description, &vm).is_err(), "{description}");
        }
    }

    #[test]
    fn ends_of_networks_take_addresses_and_no_options_of_the_engine() {
        for body in [
            json!({"Container": "c"}),
            json!({"Container": "c", "EndpointConfig": {"IPAMConfig": {"IPv4Address": "172.24.56.89",
                "IPv6Address": "2001:db8::5689", "LinkLocalIPs": ["169.254.34.68", "fe80::3468"]}, "Links": ["a:b"],
                "Aliases": ["server"], "MacAddress": "02:42:ac:12:05:02", "DriverOpts": {"field1": "value1"}}}),
        ] {
            assert_eq!(connect(&mut body.clone()), Ok(()), "{body}");
        }
        for endpoint in [
            json!({"DriverOpts": {"com.docker.network.endpoint.macaddress": "x"}}),
            json!({"IPAMConfig": {"IPv4Address": "/etc"}}),
            json!({"IPAMConfig": {"LinkLocalIPs": ["fe80::1%eth0"]}}),
        ] {
            assert!(connect(&mut json!({"EndpointConfig": endpoint})).is_err());
        }
    }
}
