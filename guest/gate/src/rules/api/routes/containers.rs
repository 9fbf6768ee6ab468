//! Containers, commands in them, and their commit.

use super::{FILTERS, Parameter, delete, free, get, head, name, post, put};
use crate::rules::{
    api::{Judge, OpensFiles, Route, Text, shapes::container},
    command_use::CommandUse,
    judges,
    source_places::SourcePlaces,
};

const GROUP: &[&str] = &["container"];

const fn by(owners: &'static [&'static str], helpers: &'static [&'static str]) -> CommandUse {
    CommandUse::of(owners, GROUP, helpers)
}

pub(super) const OTHERS: CommandUse = by(&[], &[]);
/// start, resize and inspect of an exec are parts of the one command.
pub(super) const EXEC: CommandUse = by(&["exec"], &[]);
const ATTACH: CommandUse = by(&["attach"], &["run", "start"]);
const CP: CommandUse = by(&["cp"], &[]);
const PRUNE: CommandUse = CommandUse::of(&["container"], &["container", "system"], &[]);

const STREAMS: &[Parameter] =
    &[free("detachKeys"), free("stdin"), free("stdout"), free("stderr"), free("logs"), free("stream")];
const STOP: &[Parameter] = &[free("signal"), free("t")];
const SIZE: &[Parameter] = &[free("h"), free("w")];
const FILE: Parameter = Parameter::one("path", Text::Path);

pub(super) static CONTAINERS: &[Route] = &[
    head("containers/{name}/archive", CP).parameters(&[FILE]).opens(OpensFiles::OfPath),
    get("containers/json", by(&["ps"], &[]))
        .parameters(&[free("all"), free("size"), name("since"), name("before"), free("limit"), FILTERS])
        .names_sources(SourcePlaces::Filter)
        .shows_sources(),
    get("containers/{name}/export", by(&["export"], &[])).opens(OpensFiles::OfPath),
    get("containers/{name}/changes", by(&["diff"], &[])),
    get("containers/{name}/json", by(&["inspect", "port"], &["run", "start", "attach", "exec", "logs", "cp"]))
        .parameters(&[free("size")])
        .shows_sources(),
    // dockerd runs ps(1) with the arguments, shows nothing but the container's processes, and refuses options that
    // would make it show others.
    get("containers/{name}/top", by(&["top"], &[])).parameters(&[free("ps_args")]),
    get("containers/{name}/logs", by(&["logs"], &[])).parameters(&[
        free("follow"),
        free("timestamps"),
        free("since"),
        free("until"),
        free("tail"),
        free("stdout"),
        free("stderr"),
        free("details"),
    ]),
    get("containers/{name}/stats", by(&["stats"], &[])).parameters(&[free("stream"), free("one-shot")]),
    get("containers/{name}/attach/ws", ATTACH).parameters(STREAMS).hijacks(),
    get("containers/{name}/archive", CP).parameters(&[FILE]).opens(OpensFiles::OfPath),
    post("containers/create", by(&["create", "run"], &[]))
        .parameters(&[free("name"), free("platform")])
        .json(&container::CREATE)
        .names_sources(SourcePlaces::Container)
        .judged(Judge::Container),
    post("containers/{name}/kill", by(&["kill"], &["run", "attach", "start"])).parameters(&[free("signal")]),
    post("containers/{name}/pause", by(&["pause"], &[])),
    post("containers/{name}/unpause", by(&["unpause"], &[])),
    post("containers/{name}/restart", by(&["restart"], &[])).parameters(STOP).opens(OpensFiles::AtStart),
    // Without `checkpoint` and `checkpoint-dir`, a path of the VM. `detachKeys` belongs to the attach beside it.
    post("containers/{name}/start", by(&["start"], &["run"])).opens(OpensFiles::AtStart),
    post("containers/{name}/stop", by(&["stop"], &[])).parameters(STOP),
    post("containers/{name}/wait", by(&["wait"], &["run", "start", "attach"])).parameters(&[free("condition")]),
    post("containers/{name}/resize", by(&[], &["run", "start", "attach"])).parameters(SIZE),
    post("containers/{name}/attach", ATTACH).parameters(STREAMS).hijacks(),
    post("containers/{name}/exec", EXEC).json(&container::EXEC_CREATE),
    post("containers/{name}/rename", by(&["rename"], &[])).parameters(&[free("name")]),
    post("containers/{name}/update", by(&["update"], &[]))
        .json(&container::UPDATE)
        .judged(Judge::Body(judges::container::update)),
    post("containers/prune", PRUNE).parameters(&[FILTERS]),
    put("containers/{name}/archive", CP)
        .parameters(&[FILE, free("noOverwriteDirNonDir"), free("copyUIDGID")])
        .stream()
        .opens(OpensFiles::OfPath),
    delete("containers/{name}", by(&["rm"], &[])).parameters(&[free("force"), free("v"), free("link")]),
];

pub(super) static EXECS: &[Route] = &[
    get("exec/{name}/json", EXEC),
    post("exec/{name}/start", EXEC).json(&container::EXEC_START).hijacks(),
    post("exec/{name}/resize", EXEC).parameters(SIZE),
];

pub(super) static COMMIT: &[Route] = &[post("commit", by(&["commit"], &[]))
    .parameters(&[
        free("repo"),
        free("tag"),
        name("container"),
        Parameter::one("pause", Text::CommitPause),
        free("author"),
        free("comment"),
        Parameter::many("changes", Text::Free),
    ])
    .json(&container::CONFIG)
    .judged(Judge::Query(judges::commit::query))
    .opens(OpensFiles::OfParameter("container"))];
