//! The command line that dockerd gives its `docker-proxy`.
//!
//! The parser is written by hand to accept what Go's `flag` package does, and to refuse the rest in its words: one or two
//! dashes, `-name value` or `-name=value`.

use std::{net::IpAddr, str::FromStr};

use bulkhead_protocol::{PortMapping, Transport};

/// The action that a command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// Publish a port.
    Publish(PortMapping),
    /// Print the version.
    Version,
}

/// The reason why a command line is refused; some texts are those of Go's `flag` package.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgumentError {
    #[error("cannot publish {0} ports: only TCP and UDP reach this engine")]
    Transport(String),
    #[error("flag provided but not defined: {0}")]
    Unknown(String),
    #[error("flag needs an argument: -{0}")]
    NoValue(&'static str),
    #[error("invalid value {value:?} for flag -{name}")]
    Value { name: &'static str, value: String },
    #[error("missing flag -{0}")]
    Missing(&'static str),
}

/// The flags that have a value.
const VALUES: [&str; 5] = ["proto", "host-ip", "host-port", "container-ip", "container-port"];

/// Parses the arguments after the program's name.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, ArgumentError> {
    let mut given: [Option<String>; VALUES.len()] = Default::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        // A word without a dash has no name, and is refused like an unknown flag below.
        let flag = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')).unwrap_or_default();
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        if let Some(index) = VALUES.iter().position(|known| *known == name) {
            let value = value.or_else(|| arguments.next());
            // Of a flag given twice the last value counts, as in Go.
            given[index] = Some(value.ok_or(ArgumentError::NoValue(VALUES[index]))?);
            continue;
        }
        match name {
            "v" | "version" => return Ok(Arguments::Version),
            // Newer engines bind the port in the guest as well, and pass the socket as descriptor 4. Clients connect to the
            // host's socket, so this one is left alone.
            "use-listen-fd" => {}
            _ => return Err(ArgumentError::Unknown(argument)),
        }
    }
    let [transport, host_ip, host_port, container_ip, container_port] = given;
    let transport = match transport.as_deref() {
        Some("tcp") | None => Transport::Tcp,
        Some("udp") => Transport::Udp,
        Some(other) => return Err(ArgumentError::Transport(other.to_owned())),
    };
    Ok(Arguments::Publish(PortMapping {
        transport,
        host_ip: value::<IpAddr>("host-ip", host_ip)?,
        host_port: port("host-port", host_port)?,
        container_ip: value::<IpAddr>("container-ip", container_ip)?,
        container_port: port("container-port", container_port)?,
    }))
}

fn value<T: FromStr>(name: &'static str, text: Option<String>) -> Result<T, ArgumentError> {
    let text = text.ok_or(ArgumentError::Missing(name))?;
    text.parse().map_err(|_| ArgumentError::Value { name, value: text })
}

/// Parses a port. The engine has chosen one by now: for 0 the host would choose another than the engine shows its clients.
fn port(name: &'static str, text: Option<String>) -> Result<u16, ArgumentError> {
    match value(name, text)? {
        0 => Err(ArgumentError::Value { name, value: "0".to_owned() }),
        port => Ok(port),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(line: &str) -> impl Iterator<Item = String> {
        line.split_whitespace().map(ToOwned::to_owned).collect::<Vec<_>>().into_iter()
    }

    const LINE: &str = "-proto tcp -host-ip 0.0.0.0 -host-port 8080 -container-ip 172.17.0.2 -container-port 80";

    #[test]
    fn what_the_engine_writes_is_read() {
        let expected = PortMapping {
            transport: Transport::Tcp,
            host_ip: [0, 0, 0, 0].into(),
            host_port: 8080,
            container_ip: [172, 17, 0, 2].into(),
            container_port: 80,
        };
        assert_eq!(parse(words(LINE)), Ok(Arguments::Publish(expected)));
        assert_eq!(parse(words(&format!("{LINE} -use-listen-fd"))), Ok(Arguments::Publish(expected)));
        assert_eq!(
            parse(words(&LINE.replace(" -", " --").replace("port ", "port="))),
            Ok(Arguments::Publish(expected))
        );
    }

    #[test]
    fn ipv6_listens_for_a_container_that_has_ipv4_only() {
        let Ok(Arguments::Publish(port)) = parse(words(&LINE.replace("0.0.0.0", "::").replace("tcp", "udp"))) else {
            panic!()
        };
        assert_eq!((port.transport, port.host_ip, port.container_ip.is_ipv4()), (Transport::Udp, [0; 16].into(), true));
    }

    #[test]
    fn sctp_is_refused_with_what_would_work() {
        let error = parse(words(&LINE.replace("tcp", "sctp"))).unwrap_err();
        assert_eq!(error.to_string(), "cannot publish sctp ports: only TCP and UDP reach this engine");
    }

    #[test]
    fn wrong_lines_are_refused_with_the_flag() {
        for (from, to, part) in [
            ("8080", "0", "-host-port"),
            ("8080", "65536", "-host-port"),
            ("8080", "-1", "-host-port"),
            ("0.0.0.0", "localhost", "-host-ip"),
            ("-container-port 80", "-container-port", "-container-port"),
            ("-container-ip 172.17.0.2", "", "-container-ip"),
            ("-host-ip", "-frob", "-frob"),
            ("-proto", "proto", "proto"),
        ] {
            let error = parse(words(&LINE.replace(from, to))).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn the_version_is_asked_for_as_with_the_engines_own() {
        assert_eq!(parse(words("-v")), Ok(Arguments::Version));
        assert_eq!(parse(words("--version")), Ok(Arguments::Version));
    }

    proptest! {
        #[test]
        fn every_mapping_is_read_as_it_was_written(
            udp: bool, host_ip: IpAddr, host_port in 1_u16.., container_ip: IpAddr, container_port in 1_u16..
        ) {
            let transport = if udp { Transport::Udp } else { Transport::Tcp };
            let line = format!(
                "-proto {transport} -host-ip {host_ip} -host-port {host_port} -container-ip {container_ip} \
                 -container-port {container_port}"
            );
            let expected = PortMapping { transport, host_ip, host_port, container_ip, container_port };
            prop_assert_eq!(parse(words(&line)), Ok(Arguments::Publish(expected)));
        }

        #[test]
        fn no_words_make_the_parser_panic(words in prop::collection::vec(".{0,20}", 0..12)) {
            let _ = parse(words.into_iter());
        }
    }
}
