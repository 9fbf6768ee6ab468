//! The Docker API filter: the only client of dockerd's own socket.
//!
//! Every way into the engine (vsock from the host, a unix socket inside the guest) ends here. The gate looks at the
//! few requests that decide what a container may reach, refuses or rewrites them, and streams everything else through
//! unchanged, hijacked connections included.

mod answer;
mod create;
mod engine;
mod hijack;
mod images;
mod linger;
mod listener;
pub mod policy;
mod proxy;
mod refresh;
mod sockets;
mod store;
mod watch;

pub use listener::{ListenError, UnixEntrance, VsockEntrance};
pub use policy::Isolation;
pub use proxy::{Caller, Gate, serve_connection};
pub use sockets::{Places, Sockets, adopt, answer_runtime, mark_place};
pub use store::inherited;
