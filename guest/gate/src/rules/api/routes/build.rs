//! Builds.

use super::{FILTERS, Parameter, free, post};
use crate::rules::{
    api::{Judge, Route, Text},
    command_use::CommandUse,
    judges,
};

/// BuildKit works over `/session` and `/grpc` alone; `/build` is the older builder, or BuildKit's for old clients.
pub(super) const BUILD: CommandUse = CommandUse::of(&["build", "buildx"], &["builder", "image"], &[]);
const PRUNE: CommandUse = CommandUse::of(&["builder", "buildx"], &["builder", "system"], &[]);

pub(super) static BUILDS: &[Route] = &[
    post("build", BUILD)
        .parameters(&[
            Parameter::one("dockerfile", Text::Path),
            free("q"),
            free("nocache"),
            free("rm"),
            free("forcerm"),
            free("pull"),
            free("memswap"),
            free("memory"),
            free("cpushares"),
            free("cpuperiod"),
            free("cpuquota"),
            free("cpusetcpus"),
            free("cpusetmems"),
            Parameter::one("cgroupparent", Text::CgroupParent),
            Parameter::one("networkmode", Text::Namespace),
            Parameter::many("t", Text::Free),
            Parameter::many("extrahosts", Text::Free),
            Parameter::many("securityopt", Text::Free),
            Parameter::one("squash", Text::BuildSquash),
            free("target"),
            Parameter::one("remote", Text::BuildRemote),
            free("session"),
            free("buildid"),
            free("platform"),
            Parameter::one("outputs", Text::BuildOutputs),
            free("shmsize"),
            free("isolation"),
            Parameter::one("ulimits", Text::BuildLimits),
            free("buildargs"),
            free("labels"),
            free("cachefrom"),
            free("version"),
        ])
        .stream()
        .judged(Judge::Query(judges::build::query)),
    post("build/prune", PRUNE).parameters(&[FILTERS, free("keep-storage"), free("all")]),
    post("build/cancel", BUILD).parameters(&[free("id")]),
];

// Their streams are not read: what a build step may do is BuildKit's configuration and the runtime's to decide.
pub(super) static SESSION: &[Route] = &[post("session", BUILD).hijacks()];
pub(super) static GRPC: &[Route] = &[post("grpc", BUILD).hijacks()];
