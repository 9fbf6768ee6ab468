//! The Docker API filter: the only client of dockerd's own socket.
//!
//! Every way into the engine (vsock from the host, a unix socket inside the guest) ends here. The gate looks at the
//! few requests that decide what a container may reach, refuses or rewrites them, and streams everything else through
//! unchanged, hijacked connections included.

mod answer;
mod hijack;
mod linger;
mod listener;
pub mod policy;
mod proxy;
mod refresh;

pub use listener::{ListenError, UnixEntrance, VsockEntrance};
pub use policy::Isolation;
pub use proxy::{Gate, serve_connection};
