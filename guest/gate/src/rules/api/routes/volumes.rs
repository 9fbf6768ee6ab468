//! Volumes.

use super::{FILTERS, delete, free, get, post, put};
use crate::rules::{
    api::{Judge, Route, shapes::volume},
    command_use::CommandUse,
    judges,
    source_places::SourcePlaces,
};

pub(super) const VOLUME: CommandUse = CommandUse::of(&["volume"], &["volume"], &[]);
const PRUNE: CommandUse = CommandUse::of(&["volume"], &["volume", "system"], &[]);

pub(super) static VOLUMES: &[Route] = &[
    get("volumes", VOLUME).parameters(&[FILTERS]).shows_sources(),
    get("volumes/{name}", VOLUME).shows_sources(),
    post("volumes/create", VOLUME)
        .json(&volume::CREATE)
        .judged(Judge::Body(judges::volume::create))
        .names_sources(SourcePlaces::Volume)
        .shows_sources(),
    post("volumes/prune", PRUNE).parameters(&[FILTERS]),
    put("volumes/{name}", VOLUME).parameters(&[free("version")]).json(&volume::UPDATE),
    delete("volumes/{name}", VOLUME).parameters(&[free("force")]),
];
