//! Stands in the guest where dockerd expects its `docker-proxy`: one process for each published port, from the
//! container's start to its end.
//!
//! It moves no data and does not listen. It asks init for the mapping, init asks the host, and there the backend listens
//! and the network process passes connections into the guest. The mapping lives as long as this process' connection to
//! init, so that it ends however this process ends.

mod arguments;
mod init;
mod parent;

use std::{error::Error, path::Path, process::ExitCode};

use arguments::Arguments;
use bulkhead_protocol::{PORTS_SOCKET, PortMapping};
use init::Mapping;
use parent::Parent;

fn main() -> ExitCode {
    let parent = Parent::inherited();
    let mapping = match arguments::parse(std::env::args().skip(1)) {
        Ok(Arguments::Version) => {
            println!("bulkhead-port-proxy version {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Arguments::Publish(port)) => publish(&port),
        Err(error) => Err(error.to_string()),
    };
    let outcome = mapping.as_ref().map(|_| ()).map_err(Clone::clone);
    if let Err(reason) = &outcome {
        eprintln!("{reason}");
    }
    // A dockerd that does not listen has given up.
    let told = parent.is_none_or(|parent| parent.tell(&outcome).is_ok());
    match mapping {
        Ok(mapping) if told => {
            mapping.wait();
            ExitCode::SUCCESS
        }
        _ => ExitCode::FAILURE,
    }
}

fn publish(port: &PortMapping) -> Result<Mapping, String> {
    Mapping::publish(Path::new(PORTS_SOCKET), port, init::PATIENCE).map_err(|error| {
        let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
        format!("{error}{cause}")
    })
}
