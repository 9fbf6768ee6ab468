//! `POST /swarm/init`, `/swarm/join` and `/swarm/update`.

use bulkhead_policy::{
    addresses::{UrlPath, is_host_with_optional_port, is_url},
    networks::Subnet,
};
use serde_json::Value;

use super::{
    service,
    values::{elements, text, texts},
};
use crate::rules::Refusal;

/// Judges an address, which can also be the name of a network device.
fn address(field: &'static str, value: &str) -> Result<(), Refusal> {
    if value.is_empty() || is_host_with_optional_port(value) {
        Ok(())
    } else {
        Err(Refusal::Address { field, value: value.to_owned() })
    }
}

/// Judges the settings of a swarm. Certificates and keys come as text, not as paths.
pub(crate) fn update(spec: &mut Value) -> Result<(), Refusal> {
    settings(spec)
}

fn settings(spec: &Value) -> Result<(), Refusal> {
    for authority in elements(&spec["CAConfig"], "ExternalCAs")? {
        let url = text(authority, "URL")?;
        if !is_url(url, &["https", "http"], UrlPath::Any) {
            return Err(Refusal::Address { field: "ExternalCAs", value: url.to_owned() });
        }
    }
    service::log_driver(&spec["TaskDefaults"]["LogDriver"])
}

/// Judges the start of a swarm, or joining one. Its addresses are the client's to choose, as long as they are of the
/// network.
pub(crate) fn init_or_join(body: &mut Value) -> Result<(), Refusal> {
    for field in ["ListenAddr", "AdvertiseAddr", "DataPathAddr"] {
        address(field, text(body, field)?)?;
    }
    for manager in texts(body, "RemoteAddrs")? {
        address("RemoteAddrs", manager)?;
    }
    // Networks of a swarm stand in network namespaces of their own, so they can overlap the VM's.
    for pool in texts(body, "DefaultAddrPool")? {
        pool.parse::<Subnet>()?;
    }
    settings(&body["Spec"])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn addresses_of_the_network_are_allowed() {
        for body in [
            json!({"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": "192.168.1.1:2377", "DataPathAddr": "eth0",
                "DefaultAddrPool": ["10.10.0.0/8", "20.20.0.0/8"], "Spec": {"Orchestration": {}, "CAConfig": {
                    "ExternalCAs": [{"Protocol": "cfssl", "URL": "https://ca.example:8888/api/v1/cfssl/sign"}]}}}),
            json!({"ListenAddr": "[::]:2377", "RemoteAddrs": ["node1:2377", "10.0.0.5"], "JoinToken": "SWMTKN-1-x"}),
            json!({"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": ""}),
        ] {
            assert_eq!(init_or_join(&mut body.clone()), Ok(()), "{body}");
        }
    }

    #[test]
    fn sockets_and_paths_are_refused() {
        for body in [
            json!({"ListenAddr": "unix:///run/x"}),
            json!({"ListenAddr": "/run/x"}),
            json!({"AdvertiseAddr": "../x"}),
            json!({"DataPathAddr": "eth0/../x"}),
            json!({"RemoteAddrs": ["unix:///run/bulkhead/dockerd.sock"]}),
            json!({"RemoteAddrs": ["unix:1"]}),
            json!({"DefaultAddrPool": ["/etc"]}),
            json!({"Spec": {"CAConfig": {"ExternalCAs": [{"URL": "unix:///run/x"}]}}}),
            json!({"Spec": {"TaskDefaults": {"LogDriver": {"Name": "../p"}}}}),
        ] {
            assert!(init_or_join(&mut body.clone()).is_err(), "{body}");
        }
        assert!(update(&mut json!({"TaskDefaults": {"LogDriver": {"Name": "../p"}}})).is_err());
    }
}
