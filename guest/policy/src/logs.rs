//! Log drivers and their options.
//!
//! dockerd opens a log as the VM's root: it connects to addresses and reads certificates. The keys are those that each
//! driver of the engine validates itself; of their values the ones that could name a socket or a file of the VM are
//! judged.

use super::{
    addresses::{UrlPath, is_host_with_optional_port, is_url},
    drivers,
};

/// The meaning of an option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// Text that goes into the log, or that the engine reads as a number, a flag or a pattern.
    Text,
    /// A name that becomes part of a host name.
    Word,
    /// A URL of a server with one of these schemes.
    Server(&'static [&'static str]),
    /// A host with or without a port and scheme.
    Fluentd,
    /// A URL with a path.
    Service,
    /// A path at a fixed address: what the engine appends to `http://169.254.170.2`.
    CredentialsPath,
    /// A file of the VM.
    File,
}

use Kind::{CredentialsPath, File, Fluentd, Server, Service, Text, Word};

/// Keys with the meanings of their values.
type Keys = &'static [(&'static str, Kind)];

/// Options of all drivers, among them those of the cache that the engine keeps beside remote logs.
const COMMON: Keys = &[
    ("mode", Text),
    ("max-buffer-size", Text),
    ("cache-disabled", Text),
    ("cache-max-file", Text),
    ("cache-max-size", Text),
    ("cache-compress", Text),
];

/// Options that describe the container in most logs.
const DESCRIPTION: Keys =
    &[("tag", Text), ("labels", Text), ("labels-regex", Text), ("env", Text), ("env-regex", Text)];

/// Options of the two drivers that write files, in the engine's directory of the container.
const FILES: Keys = &[("max-size", Text), ("max-file", Text), ("compress", Text)];

const AWSLOGS: Keys = &[
    ("tag", Text),
    ("awslogs-region", Word),
    ("awslogs-endpoint", Service),
    ("awslogs-group", Text),
    ("awslogs-stream", Text),
    ("awslogs-create-group", Text),
    ("awslogs-datetime-format", Text),
    ("awslogs-multiline-pattern", Text),
    ("awslogs-credentials-endpoint", CredentialsPath),
    ("awslogs-force-flush-interval-seconds", Text),
    ("awslogs-max-buffered-events", Text),
    ("awslogs-format", Text),
];

const FLUENTD: Keys = &[
    ("fluentd-address", Fluentd),
    ("fluentd-async", Text),
    ("fluentd-async-connect", Text),
    ("fluentd-async-reconnect-interval", Text),
    ("fluentd-buffer-limit", Text),
    ("fluentd-max-retries", Text),
    ("fluentd-request-ack", Text),
    ("fluentd-retry-wait", Text),
    ("fluentd-sub-second-precision", Text),
];

const GCPLOGS: Keys = &[
    ("gcp-project", Text),
    ("gcp-log-cmd", Text),
    ("gcp-meta-zone", Text),
    ("gcp-meta-name", Text),
    ("gcp-meta-id", Text),
];

const GELF: Keys = &[
    ("gelf-address", Server(&["udp", "tcp"])),
    ("gelf-compression-level", Text),
    ("gelf-compression-type", Text),
    ("gelf-tcp-max-reconnect", Text),
    ("gelf-tcp-reconnect-delay", Text),
];

const SPLUNK: Keys = &[
    ("splunk-url", Server(&["http", "https"])),
    ("splunk-token", Text),
    ("splunk-source", Text),
    ("splunk-sourcetype", Text),
    ("splunk-index", Text),
    ("splunk-capath", File),
    ("splunk-caname", Text),
    ("splunk-insecureskipverify", Text),
    ("splunk-format", Text),
    ("splunk-verify-connection", Text),
    ("splunk-gzip", Text),
    ("splunk-gzip-level", Text),
    ("splunk-index-acknowledgment", Text),
];

const SYSLOG: Keys = &[
    ("syslog-address", Server(&["udp", "tcp", "tcp+tls"])),
    ("syslog-facility", Text),
    ("syslog-tls-ca-cert", File),
    ("syslog-tls-cert", File),
    ("syslog-tls-key", File),
    ("syslog-tls-skip-verify", Text),
    ("syslog-format", Text),
];

/// The options of each driver, without the common ones.
const DRIVERS: &[(&str, &[Keys])] = &[
    ("awslogs", &[AWSLOGS]),
    ("fluentd", &[FLUENTD, DESCRIPTION]),
    ("gcplogs", &[GCPLOGS, DESCRIPTION]),
    ("gelf", &[GELF, DESCRIPTION]),
    ("journald", &[DESCRIPTION]),
    ("json-file", &[FILES, DESCRIPTION]),
    ("local", &[FILES]),
    ("splunk", &[SPLUNK, DESCRIPTION]),
    ("syslog", &[SYSLOG, DESCRIPTION]),
];

/// A log that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A driver that is not part of the engine.
    #[error(transparent)]
    Driver(#[from] drivers::Error),
    /// A key that the driver does not have.
    #[error("unknown log opt '{key}' for log driver '{driver}'")]
    Key {
        /// The driver.
        driver: String,
        /// The key.
        key: String,
    },
    /// An address that is not one of the network.
    #[error(
        "log opt {key}={value:?} is not allowed with Enhanced Container Isolation: it must be an address on the network, \
         not a socket or a path"
    )]
    Address {
        /// The key.
        key: String,
        /// The value.
        value: String,
    },
    /// A file of the VM.
    #[error(
        "log opt {0} is not allowed with Enhanced Container Isolation: it names a file of the VM; use a server with a \
         certificate that the engine trusts"
    )]
    File(String),
}

/// Returns the meaning of a key. Without a driver the engine takes its default, which can be any of them, so all keys
/// are known then; `none` has no options, and the engine accepts any.
fn kind_of(driver: &str, key: &str) -> Option<Kind> {
    let any = matches!(driver, "" | "none");
    let own = DRIVERS.iter().filter(|(name, _)| any || *name == driver).flat_map(|(_, groups)| groups.iter().copied());
    std::iter::once(COMMON).chain(own).flatten().find(|(name, _)| *name == key).map(|(_, kind)| *kind)
}

/// Returns true for a path without anything that could end the host name before it.
fn is_credentials_path(value: &str) -> bool {
    value.starts_with('/')
        && value.len() <= 1024
        && value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-?=&".contains(&byte))
}

/// Judges a log by its driver and options.
pub fn judge<'a>(driver: &str, options: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<(), Error> {
    drivers::log(driver)?;
    for (key, value) in options {
        let kind = kind_of(driver, key).ok_or_else(|| Error::Key { driver: driver.to_owned(), key: key.to_owned() })?;
        // An empty value means the default in the engine, which is an address on the network or an error.
        let allowed = value.is_empty()
            || match kind {
                Text => true,
                Word => value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-'),
                Server(schemes) => is_url(value, schemes, UrlPath::None),
                Service => is_url(value, &["http", "https"], UrlPath::Any),
                Fluentd => is_host_with_optional_port(value) || is_url(value, &["tcp", "tls"], UrlPath::None),
                CredentialsPath => is_credentials_path(value),
                File => return Err(Error::File(key.to_owned())),
            };
        if !allowed {
            return Err(Error::Address { key: key.to_owned(), value: value.to_owned() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn options_of_dockers_documentation_are_allowed() {
        for (driver, options) in [
            ("", &[][..]),
            (
                "json-file",
                &[("max-size", "10m"), ("max-file", "3"), ("labels", "production_status"), ("env", "os,customer")],
            ),
            ("json-file", &[("mode", "non-blocking"), ("max-buffer-size", "4m"), ("compress", "true")]),
            ("", &[("max-size", "10m"), ("max-file", "3")]),
            ("local", &[("max-size", "10m")]),
            ("none", &[]),
            (
                "syslog",
                &[
                    ("syslog-address", "udp://1.2.3.4:1111"),
                    ("tag", "{{.ImageName}}/{{.Name}}"),
                    ("syslog-format", "rfc5424micro"),
                ],
            ),
            (
                "syslog",
                &[
                    ("syslog-address", "tcp+tls://192.168.1.3:514"),
                    ("syslog-facility", "daemon"),
                    ("syslog-tls-skip-verify", "true"),
                ],
            ),
            (
                "fluentd",
                &[("fluentd-address", "fluentdhost:24224"), ("fluentd-async", "true"), ("tag", "docker.{{.ID}}")],
            ),
            ("fluentd", &[("fluentd-address", "tcp://fluentdhost:24224")]),
            ("fluentd", &[("fluentd-address", "tls://[::1]")]),
            ("gelf", &[("gelf-address", "udp://1.2.3.4:12201"), ("gelf-compression-type", "gzip")]),
            (
                "awslogs",
                &[("awslogs-region", "us-east-1"), ("awslogs-group", "myLogGroup"), ("awslogs-create-group", "true")],
            ),
            (
                "awslogs",
                &[("awslogs-credentials-endpoint", "/v2/credentials/x"), ("awslogs-endpoint", "https://logs.example/")],
            ),
            ("gcplogs", &[("gcp-project", "my-project"), ("gcp-log-cmd", "true"), ("env", "ENV")]),
            (
                "splunk",
                &[
                    ("splunk-token", "176F"),
                    ("splunk-url", "https://splunkhost:8088"),
                    ("splunk-caname", "SplunkServerDefaultCert"),
                    ("cache-disabled", "true"),
                ],
            ),
            ("journald", &[("tag", "x")]),
        ] {
            assert_eq!(judge(driver, options.iter().copied()), Ok(()), "{driver} {options:?}");
        }
    }

    #[test]
    fn sockets_and_files_of_the_vm_are_refused_whichever_driver_is_the_default() {
        for (driver, key, value) in [
            ("syslog", "syslog-address", "unixgram:///run/bulkhead/notify"),
            ("syslog", "syslog-address", "unix:///run/bulkhead/dockerd.sock"),
            ("syslog", "syslog-address", "UNIX:///dev/log"),
            ("syslog", "syslog-address", "unix:/dev/log"),
            ("syslog", "syslog-address", "/dev/log"),
            ("syslog", "syslog-address", "udp:///run/x"),
            ("fluentd", "fluentd-address", "unix:///run/x.sock"),
            ("fluentd", "fluentd-address", "unix://x"),
            ("fluentd", "fluentd-address", "/run/x.sock"),
            ("gelf", "gelf-address", "unix:///run/x"),
            ("splunk", "splunk-url", "file:///etc/shadow"),
            ("splunk", "splunk-url", "https://a/services"),
            ("awslogs", "awslogs-endpoint", "unix:///run/x"),
            ("awslogs", "awslogs-region", "a/../b"),
            ("awslogs", "awslogs-credentials-endpoint", "@127.0.0.1/x"),
            ("awslogs", "awslogs-credentials-endpoint", ".example.com/x"),
        ] {
            for driver in [driver, "", "none"] {
                let expected = Err(Error::Address { key: key.to_owned(), value: value.to_owned() });
                assert_eq!(judge(driver, [(key, value)]), expected, "{driver} {key}={value}");
            }
        }
        for key in ["syslog-tls-ca-cert", "syslog-tls-cert", "syslog-tls-key", "splunk-capath"] {
            assert_eq!(judge("", [(key, "/etc/shadow")]), Err(Error::File(key.to_owned())));
        }
    }

    #[test]
    fn keys_of_another_driver_and_plugins_are_refused() {
        assert!(matches!(judge("json-file", [("syslog-address", "udp://a:1")]), Err(Error::Key { .. })));
        assert!(matches!(judge("json-file", [("Max-Size", "1")]), Err(Error::Key { .. })));
        assert!(matches!(judge("../p", []), Err(Error::Driver(_))));
    }

    proptest! {
        #[test]
        fn no_value_of_an_address_that_passes_is_a_path(value in "(unix|udp|tcp|unixgram|)(:|://|:///|/)?[a-z/.]{0,12}") {
            for (driver, key) in [("syslog", "syslog-address"), ("fluentd", "fluentd-address"), ("gelf", "gelf-address")] {
                if !value.is_empty() && judge(driver, [(key, value.as_str())]).is_ok() {
                    prop_assert!(!value.starts_with('/') && !value.starts_with("unix:") && !value.starts_with("unixgram:"));
                    prop_assert!(!value.contains(":///"));
                }
            }
        }
    }
}
