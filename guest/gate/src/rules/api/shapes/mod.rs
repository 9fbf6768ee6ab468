//! Shapes of all bodies, after the Go types of `api/types` in Docker Engine 26.1.
//!
//! A field that is missing here does not reach dockerd. Four are left out on purpose, all of them names of plugins or
//! parts of plugins, none of which can be installed: `PluginSpec` of a service, the `Driver` of a secret, the log
//! driver in swarm's `TaskDefaults`, and `ClusterVolumeSpec` at the creation of a volume.

pub(super) mod container;
pub(super) mod network;
pub(super) mod service;
pub(super) mod swarm;
pub(super) mod volume;

use super::{
    kind::Text,
    shape::{Field, Shape},
};

pub(super) const FREE: Shape = Shape::Text(Text::Free);
pub(super) const NAME: Shape = Shape::Text(Text::Name);
pub(super) const PATH: Shape = Shape::Text(Text::Path);
pub(super) const NAMESPACE: Shape = Shape::Text(Text::Namespace);
pub(super) const INTEGER: Shape = Shape::Integer;
pub(super) const UINT16: Shape = Shape::Unsigned(0xffff);
pub(super) const UINT32: Shape = Shape::Unsigned(0xffff_ffff);
pub(super) const UINT64: Shape = Shape::Unsigned(u64::MAX);
pub(super) const BOOL: Shape = Shape::Bool;
pub(super) const FREE_LIST: Shape = Shape::List(&FREE);
pub(super) const NAME_LIST: Shape = Shape::List(&NAME);
/// Labels and similar maps of the user's words.
pub(super) const FREE_MAP: Shape = Shape::Map(Text::Free, &FREE);
/// Go's `struct{}`.
pub(super) const EMPTY: Shape = Shape::Object(&[]);
/// `[2]uint`, a console's height and width.
pub(super) const CONSOLE_SIZE: Shape = Shape::List(&UINT64);

/// `POST /auth`, and `POST /images/{name}/push` of clients that send no `X-Registry-Auth`.
pub(super) static AUTHENTICATION: Shape = Shape::Object(&[AUTHENTICATION_FIELDS]);
const AUTHENTICATION_FIELDS: &[Field] = &[
    ("username", FREE),
    ("password", FREE),
    ("auth", FREE),
    ("email", FREE),
    ("serveraddress", Shape::Text(Text::Remote)),
    ("identitytoken", FREE),
    ("registrytoken", FREE),
];
