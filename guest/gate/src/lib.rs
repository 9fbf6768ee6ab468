//! The Docker API filter: the only client of dockerd's own socket.
//!
//! Every way into the engine (vsock from the host, a unix socket inside the guest) ends here. The gate looks at the
//! few requests that decide what a container may reach, refuses or rewrites them, and streams everything else through
//! unchanged, hijacked connections included.

mod configuration;
mod create_with_socket;
mod dockerd;
mod error;
mod fd_store;
mod forward;
mod gate;
mod half_close;
mod hijack;
mod images;
mod json_file;
mod listener;
mod proxy;
mod refresh;
mod registry_digests;
mod removals;
mod response;
pub mod rules;
mod socket_server;
mod sockets;

pub use configuration::{ConfigurationError, read_configuration};
pub use fd_store::inherited;
pub use gate::{Caller, Gate};
pub use listener::{ListenError, UnixAcceptor, VsockAcceptor};
pub use proxy::serve_connection;
pub use rules::Isolation;
pub use socket_server::{adopt_socket, answer_runtime, create_placeholder};
pub use sockets::{Directories, Sockets};
