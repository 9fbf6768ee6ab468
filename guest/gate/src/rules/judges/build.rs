//! The query of `POST /build`.

use bulkhead_policy::addresses::{UrlPath, is_host, is_url};
use serde_json::Value;

use super::{limits, values::text};
use crate::rules::Refusal;

/// The kinds of results of a build. Those that write files send them to the client.
const OUTPUTS: [&str; 7] = ["", "moby", "image", "cacheonly", "local", "tar", "oci"];

/// Reads a parameter that has JSON in it. Nothing there is an empty array to the engine.
fn array(value: &str) -> Result<Vec<Value>, Refusal> {
    if value.is_empty() {
        return Ok(Vec::new());
    }
    let read: Option<Vec<Value>> =
        serde_json::from_str(value).map_err(|error| Refusal::Malformed(error.to_string()))?;
    Ok(read.unwrap_or_default())
}

/// Returns true for a place from which the engine may fetch the context: the client's session, a server, a repository.
fn is_context(remote: &str) -> bool {
    let after_host = |text: &str, separator| {
        text.split_once(separator)
            .is_some_and(|(host, rest): (&str, &str)| is_host(host) && rest.bytes().all(|byte| byte.is_ascii_graphic()))
    };
    matches!(remote, "" | "client-session")
        || is_url(remote, &["http", "https", "git"], UrlPath::Any)
        || remote.starts_with("github.com/") && after_host(remote, '/')
        || remote.strip_prefix("git@").is_some_and(|rest| after_host(rest, ':'))
}

/// Returns true for a flag that is off, as the engine reads it.
fn is_off(value: &str) -> bool {
    matches!(value.trim().to_ascii_lowercase().as_str(), "" | "0" | "no" | "false" | "none")
}

fn judge(name: &str, value: &str) -> Result<(), Refusal> {
    let refused = || Refusal::Build { name: name.to_owned(), value: value.to_owned() };
    match name {
        "cgroupparent" => limits::cgroup_parent(value),
        "ulimits" => {
            array(value)?.iter().try_for_each(|limit| limits::rlimit(field(limit, "Name").ok_or_else(refused)?))
        }
        // Experimental: the engine packs the layers itself.
        "squash" if !is_off(value) => Err(refused()),
        "remote" if !is_context(value) => Err(refused()),
        "outputs" => array(value)?.iter().try_for_each(|output| {
            let kind = field(output, "Type").ok_or_else(refused)?;
            if OUTPUTS.contains(&kind) { Ok(()) } else { Err(refused()) }
        }),
        // Opaque: names of images, of stages and of a file in the context, arguments, labels, hosts, numbers. The engine
        // refuses security options, and the builder judges the mode of the network.
        _ => Ok(()),
    }
}

/// Returns the only member with this name, which has to be in the engine's spelling. `None` if there are others that
/// differ in case: the engine would merge them.
fn field<'a>(object: &'a Value, name: &str) -> Option<&'a str> {
    let members = object.as_object()?;
    let spellings = members.keys().filter(|key| crate::rules::go_json::is_field(key, name)).count();
    match (spellings, members.contains_key(name)) {
        (0, _) => Some(""),
        (1, true) => text(object, name).ok(),
        _ => None,
    }
}

/// Judges the query of a build. Every one of several equal parameters counts.
#[expect(clippy::ptr_arg, reason = "the judges of all queries have one form")]
pub(crate) fn query(parameters: &mut Vec<(String, String)>) -> Result<(), Refusal> {
    parameters.iter().try_for_each(|(name, value)| judge(name, value))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn judged(name: &str, value: &str) -> Result<(), Refusal> {
        query(&mut vec![("t".to_owned(), "a:b".to_owned()), (name.to_owned(), value.to_owned())])
    }

    #[test]
    fn parameters_of_docker_build_are_allowed() {
        for (name, value) in [
            ("dockerfile", "sub/Dockerfile"),
            ("networkmode", "host"),
            ("ulimits", r#"[{"Name":"nofile","Hard":1024,"Soft":1024}]"#),
            ("ulimits", "null"),
            ("ulimits", "[]"),
            ("cgroupparent", ""),
            ("squash", "0"),
            ("remote", "client-session"),
            ("remote", "https://github.com/docker/rootfs.git#container:docker"),
            ("remote", "http://server/context.tar.gz"),
            ("remote", "github.com/creack/docker-firefox"),
            ("remote", "git@github.com:docker/x.git"),
            ("remote", "git://github.com/a/b.git"),
            ("outputs", r#"[{"Type":"moby","Attrs":{"name":"x"}}]"#),
            ("buildargs", r#"{"HTTP_PROXY":"http://p:1"}"#),
            ("labels", r#"{"a":"/etc"}"#),
        ] {
            assert_eq!(judged(name, value), Ok(()), "{name}={value}");
        }
    }

    #[test]
    fn parameters_that_name_something_of_the_vm_are_refused() {
        for (name, value) in [
            ("cgroupparent", "/system/x"),
            ("cgroupparent", "../../tmp/x"),
            ("ulimits", r#"[{"Name":"rtprio","Hard":99,"Soft":99}]"#),
            ("ulimits", r#"[{"name":"rtprio","Name":"nofile"}]"#),
            ("ulimits", r#"[{"name":"rtprio"}]"#),
            ("ulimits", "[1]"),
            ("ulimits", "{"),
            ("squash", "1"),
            ("squash", " TRUE "),
            ("remote", "/etc"),
            ("remote", "file:///etc"),
            ("remote", "unix:///run/x"),
            ("remote", "ext::sh -c id"),
            ("remote", "git@-oProxyCommand=x:y"),
            ("remote", "HTTP://x"),
            ("outputs", r#"[{"Type":"../x"}]"#),
            ("outputs", r#"[{"type":"x"}]"#),
        ] {
            assert!(judged(name, value).is_err(), "{name}={value}");
        }
    }

    proptest! {
        #[test]
        fn no_value_makes_it_panic(name in "(remote|ulimits|outputs|squash|cgroupparent)", value in ".{0,60}") {
            let _ = judged(&name, &value);
        }
    }
}
