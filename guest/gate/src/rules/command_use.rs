//! The commands that a request of a route belongs to; `commands` says what owners and helpers are.

use super::target;

/// An effect of a request, as commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CommandUse {
    pub(super) owners: &'static [&'static str],
    pub(super) groups: &'static [&'static str],
    pub(super) helpers: &'static [&'static str],
}

impl CommandUse {
    /// A request of no known command, which only an allow list refuses.
    pub(super) const UNKNOWN: Self = Self::of(&[], &[], &[]);

    /// Makes a use of owners, the groups that they belong to (`image*`), and helpers.
    pub(super) const fn of(
        owners: &'static [&'static str],
        groups: &'static [&'static str],
        helpers: &'static [&'static str],
    ) -> Self {
        Self { owners, groups, helpers }
    }
}

/// The uses of a route's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RequestCommands {
    /// None: every client sends the request before any command.
    None,
    /// The same for all requests.
    One(CommandUse),
    /// One of two by the parameters, as `POST /images/create` has them.
    PullOrImport {
        /// With `fromImage`.
        pull: CommandUse,
        /// With `fromSrc`.
        import: CommandUse,
    },
}

impl RequestCommands {
    /// Returns all uses of a request with this query.
    pub(super) fn uses(self, query: &str) -> Vec<CommandUse> {
        match self {
            Self::None => Vec::new(),
            Self::One(one) => vec![one],
            Self::PullOrImport { pull, import } => {
                let has = |name| values(query, name).next().is_some();
                // Both in doubt. Only parameters of the query count: a body with parameters loses its type on the way.
                match (has("fromImage"), has("fromSrc")) {
                    (true, false) => vec![pull],
                    (false, true) => vec![import],
                    _ => vec![pull, import],
                }
            }
        }
    }
}

/// Returns the values of a parameter that are not empty.
pub(super) fn values(query: &str, name: &str) -> impl Iterator<Item = String> {
    let plain = |text: &str| target::decode(&text.replace('+', " "));
    // As Go's `url.ParseQuery`: a plus sign is a space, and keys can be escaped as well (`%66romImage`).
    query.split('&').filter_map(move |pair| {
        let (key, value) = pair.split_once('=')?;
        let there = !value.is_empty() && plain(key) == name.as_bytes();
        there.then(|| String::from_utf8_lossy(&plain(value)).into_owned())
    })
}
