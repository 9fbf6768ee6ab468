//! A swarm of other machines that the engine has joined while isolation was off.
//!
//! Its managers choose drivers, networks and devices inside the engine, past the gate, which is why no request can join one
//! with isolation on. dockerd joins again by itself what it finds in its directory. So that directory is set aside
//! before dockerd starts with isolation on, and put back before it starts without. A swarm whose only manager is this
//! engine stays.

use std::{
    fs, io,
    net::{IpAddr, SocketAddr},
    path::Path,
};

use bulkhead_guest_common::bounded;
use serde_json::Value;

use crate::{error::Error, log};

/// dockerd's directories that matter here: data, the state of its swarm, and the place for one that is set aside.
const DATA: &str = "/var/lib/docker";
const STATE: &str = "swarm";
const ASIDE: &str = "swarm.before-isolation";

/// dockerd's file about this node, and that of the managers it knows.
const NODE: &str = "docker-state.json";
const MANAGERS: &str = "state.json";

/// Size limit of the files in bytes.
const MAX_FILE: u64 = 1 << 20;

/// The address that dockerd takes where it was given none, to find out its own.
const NO_REMOTE: &str = "8.8.8.8:53";

/// Sets a swarm of other machines aside with isolation on, and puts it back without.
pub(crate) fn prepare(isolation: bool) -> Result<(), Error> {
    prepare_in(Path::new(DATA), isolation)
}

fn prepare_in(data: &Path, isolation: bool) -> Result<(), Error> {
    let (state, aside) = (data.join(STATE), data.join(ASIDE));
    let (from, to, message) = match (isolation, exists(&state), exists(&aside)) {
        (true, true, _) if is_foreign(&state) => {
            // The newer one counts.
            remove(&aside)?;
            let message = "this engine is in a swarm of other machines, which is not allowed with Enhanced Container \
                           Isolation; it leaves the swarm until isolation is off again";
            (state, aside, message)
        }
        (false, false, true) => (aside, state, "this engine is in its swarm again"),
        _ => return Ok(()),
    };
    fs::rename(&from, to).map_err(Error::file("rename", from))?;
    log::info(message);
    Ok(())
}

fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.map_err(Error::file("remove", path)),
    }
}

/// Returns true if a manager elsewhere is known. What cannot be read counts as foreign, except files that are not there.
fn is_foreign(state: &Path) -> bool {
    let read = |name: &str| match bounded::read_file(state.join(name), MAX_FILE) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|_| ()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Value::Null),
        Err(_) => Err(()),
    };
    match (read(NODE), read(MANAGERS)) {
        (Ok(node), Ok(managers)) => has_joined(&node) || knows_others(&node, &managers),
        _ => true,
    }
}

fn has_joined(node: &Value) -> bool {
    let remote = node["RemoteAddr"].as_str().unwrap_or_default();
    node["JoinInProgress"] == true || !matches!(remote, "" | NO_REMOTE)
}

fn knows_others(node: &Value, managers: &Value) -> bool {
    let own: Vec<&str> = ["AdvertiseAddr", "ListenAddr", "LocalAddr"]
        .iter()
        .filter_map(|key| node[*key].as_str())
        .map(host)
        .filter(|host| !host.is_empty())
        .collect();
    let is_other = |manager: &Value| {
        let address = manager["addr"].as_str().unwrap_or_default();
        !own.contains(&host(address)) && !address.parse::<SocketAddr>().is_ok_and(|it| leads_here(it.ip()))
    };
    managers.as_array().into_iter().flatten().any(is_other)
}

fn leads_here(address: IpAddr) -> bool {
    address.is_loopback() || address.is_unspecified()
}

/// The address or name without its port.
fn host(address: &str) -> &str {
    match address.parse::<IpAddr>() {
        // An IPv6 address alone has colons, too.
        Ok(_) => address,
        Err(_) => address.rsplit_once(':').map_or(address, |(host, _)| host).trim_matches(['[', ']']),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn node() -> Value {
        json!({ "LocalAddr": "192.168.65.3", "RemoteAddr": "", "ListenAddr": "0.0.0.0:2377",
            "AdvertiseAddr": "192.168.65.3:2377", "JoinInProgress": false })
    }

    fn directory(node: &Value, managers: &Value) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join(STATE);
        fs::create_dir(&state).unwrap();
        fs::write(state.join(NODE), node.to_string()).unwrap();
        fs::write(state.join(MANAGERS), managers.to_string()).unwrap();
        directory
    }

    fn has(directory: &tempfile::TempDir, name: &str) -> bool {
        directory.path().join(name).join(NODE).exists()
    }

    #[test]
    fn a_swarm_of_this_engine_alone_stays() {
        for managers in [
            json!([]),
            json!([{ "node_id": "a", "addr": "192.168.65.3:2377" }]),
            json!([{ "node_id": "a", "addr": "127.0.0.1:2377" }, { "addr": "[::1]:2377" }]),
        ] {
            let directory = directory(&node(), &managers);
            prepare_in(directory.path(), true).unwrap();
            assert!(has(&directory, STATE) && !has(&directory, ASIDE), "{managers}");
        }
    }

    #[test]
    fn a_swarm_of_other_machines_is_set_aside_and_comes_back_without_isolation() {
        let foreign = json!([{ "node_id": "b", "addr": "10.0.0.7:2377" }]);
        let with = |key: &str, value: Value| {
            let mut node = node();
            node[key] = value;
            node
        };
        for (node, managers) in [
            (node(), foreign.clone()),
            (with("RemoteAddr", "10.0.0.7:2377".into()), json!([])),
            (with("JoinInProgress", true.into()), json!([])),
            (with("AdvertiseAddr", json!(null)), json!([{ "addr": "name:2377" }])),
        ] {
            let directory = directory(&node, &managers);
            prepare_in(directory.path(), true).unwrap();
            assert!(!has(&directory, STATE) && has(&directory, ASIDE), "{node} {managers}");
            prepare_in(directory.path(), true).unwrap();
            prepare_in(directory.path(), false).unwrap();
            assert!(has(&directory, STATE) && !has(&directory, ASIDE), "{node} {managers}");
        }
    }

    #[test]
    fn a_swarm_made_meanwhile_is_kept_and_an_older_one_makes_room() {
        let foreign = json!([{ "addr": "10.0.0.7:2377" }]);
        let directory = directory(&node(), &foreign);
        prepare_in(directory.path(), true).unwrap();
        fs::create_dir(directory.path().join(STATE)).unwrap();
        prepare_in(directory.path(), false).unwrap();
        assert!(has(&directory, ASIDE) && !has(&directory, STATE));
        fs::write(directory.path().join(STATE).join(MANAGERS), foreign.to_string()).unwrap();
        prepare_in(directory.path(), true).unwrap();
        assert!(!exists(&directory.path().join(STATE)) && !has(&directory, ASIDE));
    }

    #[test]
    fn files_that_cannot_be_read_count_as_foreign_and_missing_ones_do_not() {
        let directory = directory(&node(), &json!([]));
        let state = directory.path().join(STATE);
        fs::write(state.join(MANAGERS), "[").unwrap();
        assert!(is_foreign(&state));
        for name in [MANAGERS, NODE] {
            fs::remove_file(state.join(name)).unwrap();
        }
        assert!(!is_foreign(&state));
        prepare_in(Path::new("/nowhere"), true).unwrap();
    }

    proptest! {
        #[test]
        fn no_address_makes_it_panic(own in ".{0,20}", other in ".{0,20}") {
            let node = json!({ "AdvertiseAddr": own });
            knows_others(&node, &json!([{ "addr": other }, 1, { "addr": 2 }]));
        }
    }
}
