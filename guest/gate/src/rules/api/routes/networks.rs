//! Networks.

use super::{FILTERS, delete, free, get, post};
use crate::rules::{
    api::{Judge, Route, shapes::network},
    command_use::CommandUse,
    judges,
};

pub(super) const NETWORK: CommandUse = CommandUse::of(&["network"], &["network"], &[]);
const PRUNE: CommandUse = CommandUse::of(&["network"], &["network", "system"], &[]);

pub(super) static NETWORKS: &[Route] = &[
    get("networks", NETWORK).parameters(&[FILTERS]),
    get("networks/{name}", NETWORK).parameters(&[free("verbose"), free("scope")]),
    post("networks/create", NETWORK).json(&network::CREATE).judged(Judge::Network(judges::network::create)),
    post("networks/{name}/connect", NETWORK)
        .json(&network::CONNECT)
        .judged(Judge::Body(judges::network::connect))
        .joins_network(),
    post("networks/{name}/disconnect", NETWORK).json(&network::DISCONNECT),
    post("networks/prune", PRUNE).parameters(&[FILTERS]),
    delete("networks/{name}", NETWORK),
];
