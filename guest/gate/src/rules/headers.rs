//! Headers of requests: the ones that dockerd reads.

use hyper::{HeaderMap, header, header::HeaderValue};

use super::api::{Body, Route};

/// Headers of any request. The last three name the trace that a request belongs to.
const ALWAYS: [&str; 9] = [
    "accept",
    "accept-encoding",
    "host",
    "user-agent",
    "x-registry-auth",
    "x-registry-config",
    "traceparent",
    "tracestate",
    "baggage",
];

/// Beginning of headers that dockerd passes on to registries.
const FOR_REGISTRIES: &str = "x-meta-";

/// Headers of requests after which dockerd can switch protocols, and beginnings of such names.
const HIJACK: [&str; 3] = ["connection", "upgrade", "origin"];
const HIJACK_BEGINNINGS: [&str; 2] = ["x-docker-expose-session-", "sec-websocket-"];

/// Headers that describe a body.
const FRAMING: [&str; 2] = ["content-length", "transfer-encoding"];

/// Returns true if the header may stay.
fn is_kept(name: &str, route: &Route) -> bool {
    ALWAYS.contains(&name)
        || name.starts_with(FOR_REGISTRIES)
        // After an upgrade bytes pass unchecked. On any other route an upgrade that dockerd or one of its handlers came
        // to accept would be a tunnel past the table.
        || route.hijacks
            && (HIJACK.contains(&name) || HIJACK_BEGINNINGS.iter().any(|beginning| name.starts_with(beginning)))
        || matches!(route.body, Body::Stream) && FRAMING.contains(&name)
}

/// Returns the type of a body, unless dockerd would look for parameters in such a body.
///
/// Go reads parameters from two types, `application/x-www-form-urlencoded` and `multipart/form-data`, and prefers them to
/// those of the query, which were judged. The test is wider than that on purpose. curl sends the first one by itself for
/// archives, which dockerd then takes for what they are.
fn body_type(headers: &HeaderMap) -> Option<HeaderValue> {
    let kind = headers.get(header::CONTENT_TYPE)?;
    let is_form = kind.as_bytes().to_ascii_lowercase().windows(4).any(|part| part == b"form");
    (!is_form).then(|| kind.clone())
}

/// Returns the headers of a request that are passed on to its route.
pub fn kept(headers: &HeaderMap, route: &Route) -> HeaderMap {
    let mut kept = HeaderMap::with_capacity(headers.len());
    for (name, value) in headers {
        if is_kept(name.as_str(), route) {
            kept.append(name, value.clone());
        }
    }
    // One: of several values Go takes the first.
    if !matches!(route.body, Body::None)
        && let Some(kind) = body_type(headers)
    {
        kept.insert(header::CONTENT_TYPE, kind);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::{
        super::{api, segments},
        *,
    };

    fn passed(method: &str, path: &str, headers: &[(&'static str, &'static str)]) -> Vec<String> {
        let segments = segments(path);
        let route = api::find(method, &segments).unwrap().route;
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        kept(&map, route).iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect()
    }

    #[test]
    fn an_upgrade_passes_only_where_the_engine_switches() {
        let upgrade = [("connection", "Upgrade"), ("upgrade", "tcp"), ("x-unknown", "1")];
        assert_eq!(passed("POST", "/containers/x/attach", &upgrade), ["connection: Upgrade", "upgrade: tcp"]);
        assert_eq!(passed("POST", "/exec/x/start", &upgrade).len(), 2);
        assert_eq!(passed("POST", "/containers/x/start", &upgrade), [""; 0]);
        assert_eq!(passed("GET", "/containers/x/json", &upgrade), [""; 0]);
        let session = [("x-docker-expose-session-uuid", "x"), ("upgrade", "h2c")];
        assert_eq!(passed("POST", "/session", &session).len(), 2);
        assert_eq!(passed("GET", "/info", &session), [""; 0]);
    }

    #[test]
    fn types_that_make_go_read_parameters_from_a_body_do_not_pass() {
        let long = "multipart/form-data; boundary=x";
        for kind in ["application/x-www-form-urlencoded", "Application/X-WWW-FORM-urlencoded; a=b", long] {
            assert_eq!(passed("POST", "/build", &[("content-type", kind)]), [""; 0], "{kind}");
            assert_eq!(passed("POST", "/commit", &[("content-type", kind)]), [""; 0], "{kind}");
        }
        let two = [("content-type", "application/json"), ("content-type", "application/x-www-form-urlencoded")];
        assert_eq!(passed("POST", "/commit", &two), ["content-type: application/json"]);
        assert_eq!(passed("POST", "/containers/x/start", &[("content-type", "application/json")]), [""; 0]);
    }

    #[test]
    fn what_registries_and_archives_need_passes() {
        let pull = [("x-registry-auth", "e30="), ("x-meta-a", "1"), ("user-agent", "Docker-Client")];
        assert_eq!(passed("POST", "/images/create", &pull).len(), 3);
        let archive = [("content-type", "application/x-tar"), ("transfer-encoding", "chunked")];
        assert_eq!(passed("PUT", "/containers/x/archive", &archive).len(), 2);
        assert_eq!(passed("GET", "/containers/x/archive", &[("accept-encoding", "gzip")]).len(), 1);
    }
}
