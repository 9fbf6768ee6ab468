//! The guest's replacement for dockerd's `docker-proxy`: one process for each published port, from the container's start
//! to its end.
//!
//! It asks init for the mapping, init asks the host, and there the backend listens and the network process passes
//! connections into the guest: none of their data passes here. The mapping exists as long as this process's connection to
//! init, so it ends however this process ends. Only for containers on the same bridge it listens itself ([`relay`]).

mod arguments;
mod parent_pipe;
mod relay;

use std::{path::Path, process::ExitCode};

use arguments::Arguments;
use bulkhead_guest_common::{
    error::chain,
    port_mapping::{ANSWER_TIMEOUT, Mapping},
};
use bulkhead_protocol::{PORTS_SOCKET, PortMapping};
use parent_pipe::ParentPipe;

fn main() -> ExitCode {
    // First of all: any file opened before could get the pipe's number.
    let parent = ParentPipe::inherited();
    let mapping = match arguments::parse(std::env::args().skip(1)) {
        Ok(Arguments::Version) => {
            println!("bulkhead-port-proxy version {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Arguments::Publish(port)) => publish(&port).map(|mapping| (mapping, port)),
        Err(error) => Err(error.to_string()),
    };
    let result = mapping.as_ref().map(|_| ()).map_err(Clone::clone);
    if let Err(reason) = &result {
        eprintln!("{reason}");
    }
    // If the pipe is broken, dockerd has given up, and must not find the port taken when it tries again.
    let reported = parent.is_none_or(|parent| parent.report(&result).is_ok());
    match mapping {
        Ok((mapping, port)) if reported => {
            // Too late for dockerd to hear of it, and the port is published all the same.
            if let Err(error) = relay::start(&port) {
                eprintln!("containers do not reach port {} by their gateway's address: {error}", port.host_port);
            }
            mapping.wait();
            ExitCode::SUCCESS
        }
        _ => ExitCode::FAILURE,
    }
}

fn publish(port: &PortMapping) -> Result<Mapping, String> {
    Mapping::publish(Path::new(PORTS_SOCKET), port, ANSWER_TIMEOUT).map_err(|error| chain(&error))
}
