//! Images, and what registries say about them.

use super::{FILTERS, Parameter, delete, free, get, name, post};
use crate::rules::{
    api::{Route, Text, shapes},
    command_use::{CommandUse, RequestCommands},
};

const GROUP: &[&str] = &["image"];

const fn by(owners: &'static [&'static str], helpers: &'static [&'static str]) -> CommandUse {
    CommandUse::of(owners, GROUP, helpers)
}

pub(super) const OTHERS: CommandUse = by(&[], &[]);
pub(super) const MANIFEST: CommandUse = by(&["manifest"], &["pull"]);
const PULL: CommandUse = by(&["pull"], &[]);
const IMPORT: CommandUse = by(&["import"], &[]);
const SAVE: CommandUse = by(&["save"], &[]);
const PRUNE: CommandUse = CommandUse::of(&["image"], &["image", "system"], &[]);

pub(super) static IMAGES: &[Route] = &[
    get("images/json", by(&["images"], &[])).parameters(&[
        free("all"),
        FILTERS,
        // Until API 1.40.
        free("filter"),
        free("shared-size"),
    ]),
    get("images/search", by(&["search"], &[])).parameters(&[
        Parameter::one("term", Text::Remote),
        free("limit"),
        FILTERS,
    ]),
    get("images/get", SAVE).parameters(&[Parameter::many("names", Text::Name)]),
    get("images/{name}/get", SAVE),
    get("images/{name}/history", by(&["history"], &[])),
    get("images/{name}/json", by(&["inspect"], &["run", "create", "pull", "build"])),
    post("images/load", by(&["load"], &[])).parameters(&[free("quiet")]).stream(),
    // The body is the archive of an import from stdin (`fromSrc=-`).
    post("images/create", OTHERS)
        .commands(RequestCommands::PullOrImport { pull: PULL, import: IMPORT })
        .parameters(&[
            Parameter::one("fromImage", Text::Remote),
            Parameter::one("fromSrc", Text::Remote),
            free("repo"),
            free("tag"),
            free("message"),
            free("platform"),
            Parameter::many("changes", Text::Free),
        ])
        .stream(),
    // Old clients send their credentials in the body.
    post("images/{name}/push", by(&["push"], &[])).parameters(&[free("tag")]).json(&shapes::AUTHENTICATION),
    post("images/{name}/tag", by(&["tag"], &[])).parameters(&[name("repo"), free("tag")]),
    post("images/prune", PRUNE).parameters(&[FILTERS]),
    delete("images/{name}", by(&["rmi"], &[])).parameters(&[free("force"), free("noprune")]),
];

pub(super) static DISTRIBUTION: &[Route] = &[get("distribution/{name}/json", MANIFEST)];
