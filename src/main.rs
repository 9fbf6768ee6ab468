//! The host program.

use std::process::ExitCode;

use bulkhead::log;

fn main() -> ExitCode {
    // The VM's processes have no command line: everything comes over the sockets that they inherit.
    match std::env::args_os().nth(1) {
        Some(verb) if verb == "vmm" => child(bulkhead_vmm::run),
        Some(verb) if verb == "net" => child(bulkhead_net::run),
        // `bulkhead share` is a verb of the command line.
        Some(verb) if verb == "share-server" => child(bulkhead_share::run),
        _ => bulkhead::cli::main(),
    }
}

/// Runs a process of the VM, whose standard error leads to the backend's log.
fn child(run: fn() -> ExitCode) -> ExitCode {
    log::to_standard_error();
    log::abort_on_panic();
    run()
}
