//! Volumes.

use super::{FILTERS, delete, free, get, post, put};
use crate::rules::{
    api::{Judge, Route, shapes::volume},
    command_use::CommandUse,
    judges,
};

pub(super) const VOLUME: CommandUse = CommandUse::of(&["volume"], &["volume"], &[]);
const PRUNE: CommandUse = CommandUse::of(&["volume"], &["volume", "system"], &[]);

pub(super) static VOLUMES: &[Route] = &[
    get("volumes", VOLUME).parameters(&[FILTERS]),
    get("volumes/{name}", VOLUME),
    post("volumes/create", VOLUME).json(&volume::CREATE).judged(Judge::Body(judges::volume::create)),
    post("volumes/prune", PRUNE).parameters(&[FILTERS]),
    put("volumes/{name}", VOLUME).parameters(&[free("version")]).json(&volume::UPDATE),
    delete("volumes/{name}", VOLUME).parameters(&[free("force")]),
];
