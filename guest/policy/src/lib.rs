//! Rules about names that a Docker client chooses: paths, volumes, drivers, networks, options.
//!
//! dockerd acts as the VM's root on whatever a client names. So the same rules hold wherever a name becomes an action:
//! in the gate, when a request arrives; in the runtime, when a container starts; in init, for the options of dockerd.
//! Each rule lists what is allowed and refuses the rest, because a list of what is forbidden is never complete.
//!
//! The functions decide by text alone and do no I/O. A name that passes here is still judged by what it turns out to be
//! when it is opened, by the runtime.

pub mod addresses;
pub mod containers;
pub mod daemon;
pub mod drivers;
pub mod logs;
pub mod networks;
pub mod shares;
pub mod sources;
pub mod volumes;
