//! The Docker API filter between clients and dockerd.
//!
//! Every way into the engine ends here: vsock port 1023 from the host, a unix socket for processes of the guest, and
//! one unix socket for each container that may use the engine. dockerd's own socket lies in a directory that only the
//! VM's root can enter, and the gate is its only client.
//!
//! # A request
//!
//! 1. [`listener`](UnixAcceptor) accepts. vsock is not namespaced, so a container could connect, too; only connections
//!    from CID 2, the host, are served.
//! 2. `proxy` reads the head of the request and refuses routes that are never passed on: checkpoints, `docker load` where
//!    the administrator blocks it, and from a container's socket each command that the list of commands forbids.
//! 3. With isolation on, `admission` looks the request up in the table of routes ([`rules::api`]); one that is not there
//!    is refused. Path, parameters and headers are written again. A JSON body is read by its shape, at most 4 MiB,
//!    judged, and written again as well; all other bodies stream. A container gets the isolating runtime. Paths of the
//!    host that are shared become those of the VM first ([`SharedDirectories`]).
//! 4. Before dockerd opens a container's files (`docker cp`, `commit`, `start`, …), `in_use` judges what it mounts now.
//! 5. `forward` sends the request to dockerd on a connection of its own and streams the response back. If dockerd
//!    switches protocols (attach, exec, BuildKit's session), `hijack` joins the two connections, and each direction
//!    ends on its own.
//! 6. `answer` shows the host's paths again, in descriptions and errors.
//!
//! With isolation off nothing is checked except `docker load` and checkpoints. In both cases paths of the host are
//! translated, and new containers get the environment that the administrator or the user configured (proxies).
//!
//! # Sockets in containers
//!
//! A container whose image is allowed can bind-mount `/run/docker.sock`, which in the VM is an empty file. It does not
//! get dockerd's socket but another one, with the gate behind it, that no other container shares.
//!
//! 1. **Creation** (`create_with_socket`). The gate checks the image, lets dockerd create the container, checks the
//!    image that the container really has (a name can change its meaning in between), and writes the grant beside
//!    dockerd's own files of the container. Without a grant, a container that mounts the socket is removed again.
//! 2. **Start** (`socket_server`). dockerd starts the runtime, perhaps because of a restart policy while its API is not
//!    up yet. The runtime finds the bind and sends the container's ID to the gate (`grants.sock`). The gate reads the
//!    grant, checks it against the current list of images, makes `/run/bulkhead/sockets/containers/ID` and answers; the
//!    runtime binds that instead, ID-mapped like any bind. The gate asks dockerd nothing at that moment, because
//!    dockerd holds locks. A container that got past step 1 (`--volumes-from`) is stopped here.
//! 3. **Use** (`proxy`, [`rules`]). Each socket has its own listener, at most 128 HTTP connections, and the list of
//!    commands, which the rows of the table name.
//! 4. **Restart of the gate** (`fd_store`). A bind shows the very socket it was made with, so init stores the listening
//!    descriptors (`FDSTORE` of sd_notify(3)) and hands them to each new gate. Clients wait in the sockets' queues.
//! 5. **Removal** (`removals`). dockerd deletes the container's directory; inotify reports it, and the gate closes the
//!    socket, its connections and init's copy.
//!
//! An image counts by its content, not by its name (`images`). The gate asks for the digest behind a tag through
//! dockerd (`/distribution`), at creation and at each pull of a listed tag; `registry_digests` keeps the responses on
//! the data disk for times when the registry is out of reach.
//!
//! # Trust
//!
//! The client on the host is trusted with the engine, but not with the VM. A container with a socket is not trusted at
//! all: it can send any bytes and keep connections open. The gate is the first wall only; the runtime checks each mount
//! again by the file that it opens, so that a spelling which slips past the gate does not bring a path of the VM into a
//! container.

mod admission;
mod answer;
mod configuration;
mod create_with_socket;
mod dockerd;
mod drain;
mod error;
mod fd_store;
mod forward;
mod gate;
mod half_close;
mod hijack;
mod images;
mod in_use;
mod ingress_ports;
mod json_file;
mod listener;
mod proxy;
mod registry_digests;
mod removals;
mod response;
pub mod rules;
mod shares;
mod socket_server;
mod sockets;

pub use configuration::{ConfigurationError, read_configuration};
pub use fd_store::inherited;
pub use gate::{Caller, Gate};
pub use ingress_ports::publish_ingress_ports;
pub use listener::{ListenError, UnixAcceptor, VsockAcceptor};
pub use proxy::serve_connection;
pub use rules::Isolation;
pub use shares::{ShareList, SharedDirectories};
pub use socket_server::{adopt_socket, answer_runtime, create_placeholder};
pub use sockets::{Directories, Sockets};
