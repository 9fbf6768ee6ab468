//! Swarm: the cluster, nodes, services and their tasks, secrets and configs.

use super::{FILTERS, Parameter, delete, free, get, post};
use crate::rules::{
    api::{
        Judge, Route,
        shapes::{service, swarm},
    },
    command_use::CommandUse,
    judges,
    source_places::SourcePlaces,
};

pub(super) const SWARM_USE: CommandUse = CommandUse::of(&["swarm"], &["swarm"], &[]);
pub(super) const NODE: CommandUse = CommandUse::of(&["node"], &["node"], &[]);
pub(super) const SERVICE: CommandUse = CommandUse::of(&["service", "stack"], &["service", "stack"], &["node"]);
pub(super) const SECRET: CommandUse = CommandUse::of(&["secret"], &["secret"], &["stack", "service"]);
pub(super) const CONFIG: CommandUse = CommandUse::of(&["config"], &["config"], &["stack", "service"]);

/// Of the object that an update replaces.
const VERSION: &[Parameter] = &[free("version")];
const LOGS: &[Parameter] =
    &[free("follow"), free("timestamps"), free("since"), free("tail"), free("stdout"), free("stderr"), free("details")];

pub(super) static SWARM: &[Route] = &[
    post("swarm/init", SWARM_USE).json(&swarm::INIT).judged(Judge::Body(judges::swarm::init)),
    post("swarm/join", SWARM_USE).json(&swarm::JOIN).judged(Judge::Body(judges::swarm::join)),
    post("swarm/leave", SWARM_USE).parameters(&[free("force")]),
    get("swarm", SWARM_USE),
    get("swarm/unlockkey", SWARM_USE),
    post("swarm/update", SWARM_USE)
        .parameters(&[
            free("version"),
            free("rotateWorkerToken"),
            free("rotateManagerToken"),
            free("rotateManagerUnlockKey"),
        ])
        .json(&swarm::UPDATE)
        .judged(Judge::Body(judges::swarm::update)),
    post("swarm/unlock", SWARM_USE).json(&swarm::UNLOCK),
];

pub(super) static SERVICES: &[Route] = &[
    get("services", SERVICE).parameters(&[FILTERS, free("status")]).shows_sources(),
    get("services/{id}", SERVICE).parameters(&[free("insertDefaults")]).shows_sources(),
    post("services/create", SERVICE)
        .json(&service::SERVICE)
        .names_sources(SourcePlaces::Service)
        .judged(Judge::Body(judges::service::create_or_update)),
    post("services/{id}/update", SERVICE)
        .parameters(&[free("version"), free("registryAuthFrom"), free("rollback")])
        .json(&service::SERVICE)
        .names_sources(SourcePlaces::Service)
        .judged(Judge::Body(judges::service::create_or_update)),
    delete("services/{id}", SERVICE),
    get("services/{id}/logs", SERVICE).parameters(LOGS),
];

pub(super) static TASKS: &[Route] = &[
    get("tasks", SERVICE).parameters(&[FILTERS]).shows_sources(),
    get("tasks/{id}", SERVICE).shows_sources(),
    get("tasks/{id}/logs", SERVICE).parameters(LOGS),
];

pub(super) static NODES: &[Route] = &[
    get("nodes", NODE).parameters(&[FILTERS]),
    get("nodes/{id}", NODE),
    delete("nodes/{id}", NODE).parameters(&[free("force")]),
    post("nodes/{id}/update", NODE).parameters(VERSION).json(&swarm::NODE),
];

pub(super) static SECRETS: &[Route] = &[
    get("secrets", SECRET).parameters(&[FILTERS]),
    post("secrets/create", SECRET).json(&swarm::SECRET),
    delete("secrets/{id}", SECRET),
    get("secrets/{id}", SECRET),
    post("secrets/{id}/update", SECRET).parameters(VERSION).json(&swarm::SECRET),
];

pub(super) static CONFIGS: &[Route] = &[
    get("configs", CONFIG).parameters(&[FILTERS]),
    post("configs/create", CONFIG).json(&swarm::SECRET),
    delete("configs/{id}", CONFIG),
    get("configs/{id}", CONFIG),
    post("configs/{id}/update", CONFIG).parameters(VERSION).json(&swarm::SECRET),
];
