//! The rows, by the first word of their paths, in dockerd's order: `api/server/router` of Docker Engine 26.1.

mod build;
mod containers;
mod images;
mod networks;
mod swarm;
mod system;
mod volumes;

use super::{Body, Family, Judge, OpensFiles, Parameter, Pattern, Route, Shape, Text};
use crate::{
    answer::Places,
    rules::{
        command_use::{CommandUse, RequestCommands},
        source_places::SourcePlaces,
    },
};

/// All rows.
pub(super) static FAMILIES: &[Family] = &[
    rows("_ping", system::PING, CommandUse::UNKNOWN),
    rows("version", system::VERSION, CommandUse::UNKNOWN),
    rows("containers", containers::CONTAINERS, containers::OTHERS),
    rows("exec", containers::EXECS, containers::EXEC),
    rows("commit", containers::COMMIT, containers::OTHERS),
    rows("images", images::IMAGES, images::OTHERS),
    rows("distribution", images::DISTRIBUTION, images::MANIFEST),
    rows("build", build::BUILDS, build::BUILD),
    rows("session", build::SESSION, build::BUILD),
    rows("grpc", build::GRPC, build::BUILD),
    rows("volumes", volumes::VOLUMES, volumes::VOLUME),
    rows("networks", networks::NETWORKS, networks::NETWORK),
    rows("info", system::INFO, CommandUse::UNKNOWN),
    rows("events", system::EVENTS, CommandUse::UNKNOWN),
    rows("auth", system::AUTH, CommandUse::UNKNOWN),
    rows("system", system::SYSTEM, system::SYSTEM_USE),
    rows("plugins", system::PLUGINS, system::PLUGIN),
    rows("swarm", swarm::SWARM, swarm::SWARM_USE),
    rows("nodes", swarm::NODES, swarm::NODE),
    rows("services", swarm::SERVICES, swarm::SERVICE),
    rows("tasks", swarm::TASKS, swarm::SERVICE),
    rows("secrets", swarm::SECRETS, swarm::SECRET),
    rows("configs", swarm::CONFIGS, swarm::CONFIG),
];

const fn rows(first: &'static str, routes: &'static [Route], others: CommandUse) -> Family {
    Family { first, routes, others }
}

/// Returns the rows whose paths begin with a word.
pub(super) fn family(first: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.first == first)
}

/// `filters` of a list or of `prune`: names, labels and states that dockerd compares with its own.
const FILTERS: Parameter = free("filters");

const fn free(name: &'static str) -> Parameter {
    Parameter::one(name, Text::Free)
}

const fn name(name: &'static str) -> Parameter {
    Parameter::one(name, Text::Name)
}

const fn route(method: &'static str, path: &'static str, commands: CommandUse) -> Route {
    Route {
        method,
        path: Pattern(path),
        parameters: &[],
        body: Body::None,
        hijacks: false,
        commands: RequestCommands::One(commands),
        judge: Judge::None,
        opens_files: OpensFiles::No,
        joins_network: false,
        names_sources: SourcePlaces::None,
        shows_sources: Places::None,
    }
}

const fn get(path: &'static str, commands: CommandUse) -> Route {
    route("GET", path, commands)
}

const fn head(path: &'static str, commands: CommandUse) -> Route {
    route("HEAD", path, commands)
}

const fn post(path: &'static str, commands: CommandUse) -> Route {
    route("POST", path, commands)
}

const fn put(path: &'static str, commands: CommandUse) -> Route {
    route("PUT", path, commands)
}

const fn delete(path: &'static str, commands: CommandUse) -> Route {
    route("DELETE", path, commands)
}

impl Route {
    const fn parameters(self, parameters: &'static [Parameter]) -> Self {
        Self { parameters, ..self }
    }

    const fn json(self, shape: &'static Shape) -> Self {
        Self { body: Body::Json(shape), ..self }
    }

    const fn stream(self) -> Self {
        Self { body: Body::Stream, ..self }
    }

    const fn hijacks(self) -> Self {
        Self { hijacks: true, ..self }
    }

    const fn judged(self, judge: Judge) -> Self {
        Self { judge, ..self }
    }

    const fn opens(self, opens_files: OpensFiles) -> Self {
        Self { opens_files, ..self }
    }

    const fn names_sources(self, names_sources: SourcePlaces) -> Self {
        Self { names_sources, ..self }
    }

    const fn shows_sources(self) -> Self {
        Self { shows_sources: Places::Descriptions, ..self }
    }

    const fn joins_network(self) -> Self {
        Self { joins_network: true, ..self }
    }

    const fn commands(self, commands: RequestCommands) -> Self {
        Self { commands, ..self }
    }
}
