//! The engine itself, and its plugins.

use super::{FILTERS, Parameter, free, get, head, post};
use crate::rules::{
    api::{Route, Text, shapes},
    command_use::{CommandUse, RequestCommands},
};

pub(super) const SYSTEM_USE: CommandUse = CommandUse::of(&["system"], &["system"], &[]);
pub(super) const PLUGIN: CommandUse = CommandUse::of(&["plugin"], &["plugin"], &[]);
const INFO_USE: CommandUse = CommandUse::of(&["info"], &["system"], &["login", "pull", "push", "build", "search"]);
const EVENTS_USE: CommandUse = CommandUse::of(&["events"], &["system"], &["stats", "container"]);
const LOGIN: CommandUse = CommandUse::of(&["login"], &["system"], &[]);

/// Every client sends them before any command.
pub(super) static PING: &[Route] = &[
    get("_ping", CommandUse::UNKNOWN).commands(RequestCommands::None),
    head("_ping", CommandUse::UNKNOWN).commands(RequestCommands::None),
];
pub(super) static VERSION: &[Route] = &[get("version", CommandUse::UNKNOWN).commands(RequestCommands::None)];

pub(super) static EVENTS: &[Route] = &[get("events", EVENTS_USE).parameters(&[free("since"), free("until"), FILTERS])];
pub(super) static INFO: &[Route] = &[get("info", INFO_USE)];
pub(super) static SYSTEM: &[Route] =
    &[get("system/df", SYSTEM_USE).parameters(&[Parameter::many("type", Text::Free)]).shows_sources()];
pub(super) static AUTH: &[Route] = &[post("auth", LOGIN).json(&shapes::AUTHENTICATION)];

/// To look only: a plugin is a program of anybody's that runs in the VM, outside of all containers.
pub(super) static PLUGINS: &[Route] =
    &[get("plugins", PLUGIN).parameters(&[FILTERS]), get("plugins/{name}/json", PLUGIN)];
