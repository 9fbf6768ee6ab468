//! The host program.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The VM's processes have no command line: everything comes over the sockets that they inherit.
    match std::env::args_os().nth(1) {
        Some(verb) if verb == "vmm" => bulkhead_vmm::run(),
        Some(verb) if verb == "net" => bulkhead_net::run(),
        _ => bulkhead::cli::main(),
    }
}
