//! Names of drivers: volumes, networks, address management, logs.
//!
//! The engine takes any other name for a plugin and connects to `/run/docker/plugins/NAME.sock`, where NAME may lead
//! anywhere, or follows a `.spec` or `.json` file of that name. A container that listens there would answer as the VM's
//! root is asked. So only the drivers that are part of dockerd 26.1 itself can be named.

/// Volumes: the only built-in driver.
const VOLUME: &[&str] = &["local"];

/// Networks: those that libnetwork registers on Linux. `host` and `null` are for the predefined networks.
const NETWORK: &[&str] = &["bridge", "host", "ipvlan", "macvlan", "null", "overlay"];

/// Address management.
const ADDRESSES: &[&str] = &["default", "null"];

/// Logs: those that dockerd registers on Linux. journald is among them although the VM has none: the engine says that it
/// does not know it.
/// Drivers of other systems and older engines (`etwlogs`, `logentries`) are not.
const LOG: &[&str] =
    &["awslogs", "fluentd", "gcplogs", "gelf", "journald", "json-file", "local", "none", "splunk", "syslog"];

/// A driver that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} driver {name:?} is not allowed with Enhanced Container Isolation: use one of {}", allowed.join(", "))]
pub struct Error {
    kind: &'static str,
    name: String,
    allowed: &'static [&'static str],
}

/// Accepts the listed names, and no name, which means the engine's default. The engine compares exactly as well.
fn judge(kind: &'static str, name: &str, allowed: &'static [&'static str]) -> Result<(), Error> {
    if name.is_empty() || allowed.contains(&name) {
        Ok(())
    } else {
        Err(Error { kind, name: name.to_owned(), allowed })
    }
}

/// Judges the driver of a volume.
pub fn volume(name: &str) -> Result<(), Error> {
    judge("volume", name, VOLUME)
}

/// Judges the driver of a network.
pub fn network(name: &str) -> Result<(), Error> {
    judge("network", name, NETWORK)
}

/// Judges the driver that hands out a network's addresses.
pub fn address_management(name: &str) -> Result<(), Error> {
    judge("IPAM", name, ADDRESSES)
}

/// Judges the driver of a container's log.
pub fn log(name: &str) -> Result<(), Error> {
    judge("logging", name, LOG)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn built_in_drivers_and_the_default_are_allowed() {
        assert!(["", "local"].iter().all(|name| volume(name).is_ok()));
        assert!(["", "bridge", "macvlan", "ipvlan", "overlay"].iter().all(|name| network(name).is_ok()));
        assert!(["", "default", "null"].iter().all(|name| address_management(name).is_ok()));
        assert!(["", "none", "json-file", "syslog", "awslogs"].iter().all(|name| log(name).is_ok()));
    }

    #[test]
    fn plugins_are_refused_by_every_kind_of_name() {
        for name in [
            "../../../var/lib/docker/volumes/t10/_data/p",
            "/run/x",
            "local/",
            "./local",
            "Local",
            "local ",
            "local\0",
            "vieux/sshfs:latest",
            "rexray",
            "..",
            "_DATA\\p",
        ] {
            for judge in [volume, network, address_management, log] {
                assert!(judge(name).is_err(), "{name:?}");
            }
        }
        assert_eq!(
            volume("rexray").unwrap_err().to_string(),
            "volume driver \"rexray\" is not allowed with Enhanced Container Isolation: use one of local"
        );
    }

    proptest! {
        #[test]
        fn no_allowed_name_is_a_path(name in "[a-z./-]{0,12}") {
            let any = [volume, network, address_management, log].iter().any(|judge| judge(&name).is_ok());
            prop_assert!(!(any && name.contains(['/', '.'])));
        }
    }
}
