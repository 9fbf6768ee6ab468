//! The Engine API as the gate lets it through: a table with a row for each route of Docker Engine 26.1.
//!
//! A row has all that the gate knows about a route: method and path, the commands of the docker command line that it
//! belongs to, its parameters, the shape of its body, and the judge for both. So no route can be added to one list and
//! forgotten in another, and what no row describes does not reach dockerd: a route, a parameter, or a key of a body.
//!
//! Routes that can only harm the VM have no row: checkpoints (their parameters are paths that dockerd lists, makes and
//! removes), everything that installs or changes plugins (programs that run beside dockerd), and `/debug`.

mod kind;
mod locations;
mod pattern;
mod query;
mod routes;
mod shape;
mod shapes;

use bulkhead_policy::networks::VmNetwork;
use serde_json::Value;

pub use kind::Text;
pub use locations::{Location, Place, Step, locations};
pub use pattern::Pattern;
pub use query::{Parameter, Query, QueryJudge};
pub use shape::{Field, Shape, read};

use super::{
    command_use::{CommandUse, RequestCommands},
    refusal::Refusal,
    source_places::SourcePlaces,
};
use crate::answer::Places;

/// The body of a request.
#[derive(Clone, Copy, Debug)]
pub enum Body {
    /// None. One that a client sends is not passed on.
    None,
    /// Bytes that only dockerd reads, such as an archive. They stream.
    Stream,
    /// JSON of a shape.
    Json(&'static Shape),
}

/// The check of a request's contents.
#[derive(Clone, Copy)]
pub(crate) enum Judge {
    /// Nothing in the request names a thing of the VM.
    None,
    /// The creation of a container, which can ask for the engine's socket.
    Container,
    /// A check of the body.
    Body(fn(&mut Value) -> Result<(), Refusal>),
    /// A check of the body that knows the VM's own networks.
    Network(fn(&mut Value, &VmNetwork) -> Result<(), Refusal>),
    /// A check of the parameters.
    Query(QueryJudge),
}

/// The container whose files dockerd opens for a request, as the VM's root.
///
/// Its mounts are judged again at that moment: it can be older than isolation, and links can have changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpensFiles {
    /// None.
    No,
    /// The container in the path.
    OfPath,
    /// The container in the path, which dockerd also sets up with its log, devices and limits.
    AtStart,
    /// The container in a parameter.
    OfParameter(&'static str),
}

/// A row of the table.
#[derive(Clone, Copy)]
pub struct Route {
    /// The method, in upper case as dockerd compares it.
    pub method: &'static str,
    /// The path.
    pub path: Pattern,
    /// The parameters.
    pub parameters: &'static [Parameter],
    /// The body.
    pub body: Body,
    /// dockerd may switch protocols.
    pub hijacks: bool,
    commands: RequestCommands,
    pub(crate) judge: Judge,
    pub(crate) opens_files: OpensFiles,
    /// A container joins the network in the path.
    pub(crate) joins_network: bool,
    /// The places of the body with sources of mounts.
    pub(crate) names_sources: SourcePlaces,
    /// The places of the answer with sources of mounts.
    pub(crate) shows_sources: Places,
}

impl std::fmt::Debug for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.method, self.path)
    }
}

impl Route {
    /// Returns true for `POST /containers/{name}/start`.
    pub(crate) fn starts_container(&self) -> bool {
        self.path == Pattern("containers/{name}/start")
    }
}

/// The rows whose paths begin with the same word.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family {
    /// The first segment of their paths.
    pub(super) first: &'static str,
    pub(super) routes: &'static [Route],
    /// The commands of requests below `first` that have no row. They are refused, but the list of commands comes first.
    pub(super) others: CommandUse,
}

/// A row that a request matches.
#[derive(Clone, Copy, Debug)]
pub struct Found<'a> {
    /// The row.
    pub route: &'static Route,
    /// The segments of the path that make up the name in it, if it has one.
    pub name: &'a [String],
}

impl Found<'_> {
    /// Returns the container whose files dockerd will open, as the client named it.
    pub(crate) fn opened_container(&self, query: &Query) -> Option<String> {
        let name = match self.route.opens_files {
            OpensFiles::No => return None,
            OpensFiles::OfPath | OpensFiles::AtStart => self.name.join("/"),
            OpensFiles::OfParameter(parameter) => query.first(parameter)?.to_owned(),
        };
        (!name.is_empty()).then_some(name)
    }
}

/// Returns the row of a request with these segments, without version. `None` for a request that is not passed on.
pub fn find<'a>(method: &str, segments: &'a [String]) -> Option<Found<'a>> {
    let family = routes::family(segments.first()?)?;
    // Rows with a fixed path come before those with a name, as in dockerd's router.
    let mut rows = family.routes.iter().filter(|route| route.method == method);
    rows.find_map(|route| route.path.matches(segments).map(|name| Found { route, name }))
}

/// Returns the uses of a request by commands. None for requests that every client makes before any command.
///
/// A request with a method that its path does not have counts as all rows with that path. It is refused in any case;
/// but a list that denies a command has to answer with its own message, whatever the method.
pub(super) fn commands(method: &str, segments: &[String], query: &str) -> Vec<CommandUse> {
    let Some(family) = segments.first().and_then(|first| routes::family(first)) else {
        return vec![CommandUse::UNKNOWN];
    };
    if let Some(found) = find(&method.to_ascii_uppercase(), segments) {
        return found.route.commands.uses(query);
    }
    let same_path = family.routes.iter().filter(|route| route.path.matches(segments).is_some());
    let uses: Vec<CommandUse> = same_path.flat_map(|route| route.commands.uses(query)).collect();
    if uses.is_empty() { vec![family.others] } else { uses }
}

/// Returns all rows.
pub fn routes() -> impl Iterator<Item = &'static Route> {
    routes::FAMILIES.iter().flat_map(|family| family.routes)
}

/// Returns true if a request with this path creates a container.
pub fn is_container_create(segments: &[String]) -> bool {
    matches!(segments, [first, second] if first == "containers" && second == "create")
}

/// Returns true for the requests of `docker checkpoint`.
///
/// They are refused with isolation and without: dockerd lists, makes and removes any directory that they name.
pub fn is_checkpoint(method: &str, segments: &[String]) -> bool {
    match segments {
        [containers, _, .., last] if containers == "containers" && last == "checkpoints" => true,
        // Other methods do not reach a handler, except with a container that is linked as `checkpoints`.
        [containers, _, .., before, _] if containers == "containers" && before == "checkpoints" => {
            method.eq_ignore_ascii_case("delete")
        }
        _ => false,
    }
}

#[cfg(test)]
mod judged_tests;
#[cfg(test)]
mod tests;
