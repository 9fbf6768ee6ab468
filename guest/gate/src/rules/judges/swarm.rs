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

/// The port of a swarm's manager that docker asks for.
const MANAGER_PORT: u16 = 2377;

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

/// Judges the start of a swarm, and keeps it to this engine: its manager listens on the VM's loopback only.
///
/// Managers create the networks, volumes and log drivers of tasks inside the engine, where no request is judged. One that
/// a container runs could join as a second manager, and name drivers and devices of the VM.
pub(crate) fn init(body: &mut Value) -> Result<(), Refusal> {
    for field in ["ListenAddr", "AdvertiseAddr", "DataPathAddr"] {
        address(field, text(body, field)?)?;
    }
    let port = text(body, "ListenAddr")?.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
    body["ListenAddr"] = format!("127.0.0.1:{}", port.unwrap_or(MANAGER_PORT)).into();
    // Networks of a swarm stand in network namespaces of their own, so they can overlap the VM's.
    for pool in texts(body, "DefaultAddrPool")? {
        pool.parse::<Subnet>()?;
    }
    settings(&body["Spec"])
}

/// Refuses to join a swarm, whose managers would be elsewhere; see [`init`].
pub(crate) fn join(_: &mut Value) -> Result<(), Refusal> {
    Err(Refusal::SwarmJoin)
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
            json!({"ListenAddr": "0.0.0.0:2377", "AdvertiseAddr": ""}),
        ] {
            assert_eq!(init(&mut body.clone()), Ok(()), "{body}");
        }
    }

    #[test]
    fn a_manager_listens_on_the_vms_loopback_whatever_is_asked_for() {
        for (asked, listens) in [
            ("0.0.0.0:2377", "127.0.0.1:2377"),
            ("[::]:4000", "127.0.0.1:4000"),
            ("eth0:2378", "127.0.0.1:2378"),
            ("eth0", "127.0.0.1:2377"),
            ("", "127.0.0.1:2377"),
        ] {
            let mut body = json!({"ListenAddr": asked});
            assert_eq!(init(&mut body), Ok(()));
            assert_eq!(body["ListenAddr"], listens);
        }
        let mut without = json!({});
        assert_eq!(init(&mut without), Ok(()));
        assert_eq!(without["ListenAddr"], "127.0.0.1:2377");
    }

    #[test]
    fn sockets_and_paths_are_refused() {
        for body in [
            json!({"ListenAddr": "unix:///run/x"}),
            json!({"ListenAddr": "/run/x"}),
            json!({"AdvertiseAddr": "../x"}),
            json!({"DataPathAddr": "eth0/../x"}),
            json!({"DefaultAddrPool": ["/etc"]}),
            json!({"Spec": {"CAConfig": {"ExternalCAs": [{"URL": "unix:///run/x"}]}}}),
            json!({"Spec": {"TaskDefaults": {"LogDriver": {"Name": "../p"}}}}),
        ] {
            assert!(init(&mut body.clone()).is_err(), "{body}");
        }
        let join = json!({"ListenAddr": "0.0.0.0:2377", "RemoteAddrs": ["172.17.0.2:2377"], "JoinToken": "SWMTKN-1-x"});
        assert_eq!(super::join(&mut join.clone()), Err(Refusal::SwarmJoin));
        assert!(update(&mut json!({"TaskDefaults": {"LogDriver": {"Name": "../p"}}})).is_err());
    }
}
