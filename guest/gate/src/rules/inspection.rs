//! The requests whose bodies are inspected.

use bytes::Bytes;

use super::{
    bodies::{self, SocketRequest},
    refusal::Refusal,
};

/// Enhanced Container Isolation (ECI).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// These rules are enforced.
    On,
    /// Bodies pass unchecked.
    Off,
}

impl From<bool> for Isolation {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

/// A request that passes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verified {
    /// The body to pass on.
    pub body: Bytes,
    /// The container asks, or may ask, for the engine's socket, so that its image decides.
    pub socket: Option<SocketRequest>,
}

/// A kind of request whose body is inspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inspection {
    /// `POST /containers/create`.
    Container,
    /// `POST /volumes/create`.
    Volume,
    /// `POST /services/create` and `/services/{id}/update`.
    Service,
}

/// Returns true if a request with this path creates a container.
pub fn is_container_create(segments: &[String]) -> bool {
    matches!(segments, [first, second] if first == "containers" && second == "create")
}

impl Inspection {
    /// Returns the inspection for a path, as split by [`segments`](super::segments). The method does not matter: one
    /// inspection too many is harmless.
    pub fn of(isolation: Isolation, segments: &[String]) -> Option<Self> {
        if isolation == Isolation::Off {
            return None;
        }
        // The bodies of all other requests stream through unread. The runtime checks what containers mount that those
        // start, such as the steps of a build.
        match segments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            _ if is_container_create(segments) => Some(Self::Container),
            ["volumes", "create"] => Some(Self::Volume),
            ["services", "create"] | ["services", _, "update"] => Some(Self::Service),
            _ => None,
        }
    }

    /// Checks a body, and returns the one to pass on.
    pub fn judge(self, body: Bytes) -> Result<Verified, Refusal> {
        if body.iter().all(u8::is_ascii_whitespace) {
            // An empty body creates nothing. dockerd's error about it is clearer than one about JSON.
            return Ok(Verified { body, socket: None });
        }
        match self {
            Self::Container => {
                bodies::container(&body).map(|(text, socket)| Verified { body: Bytes::from(text), socket })
            }
            Self::Volume => bodies::volume(&body).map(|()| Verified { body, socket: None }),
            Self::Service => bodies::service(&body).map(|()| Verified { body, socket: None }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::segments, *};

    #[test]
    fn create_is_recognised_in_every_spelling_that_reaches_the_same_handler() {
        for path in [
            "/containers/create",
            "/v1.45/containers/create",
            "/v1.24/containers/create",
            "/v99/containers/%63reate",
            "//containers///create/",
            "/containers/./x/../create",
            "/v1.45/%63%6fntainers/create",
        ] {
            assert_eq!(Inspection::of(Isolation::On, &segments(path)), Some(Inspection::Container), "{path}");
        }
    }

    #[test]
    fn other_requests_are_not_buffered() {
        for path in
            ["/_ping", "/v1.45/containers/json", "/build", "/containers/create/start", "/images/create", "*", ""]
        {
            assert_eq!(Inspection::of(Isolation::On, &segments(path)), None, "{path}");
        }
    }

    #[test]
    fn without_isolation_nothing_is_looked_at() {
        assert_eq!(Inspection::of(Isolation::Off, &segments("/containers/create")), None);
    }
}
