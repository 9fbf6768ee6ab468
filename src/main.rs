//! The host program.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The VM's process has no command line: everything comes over its control socket.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "vmm") {
        return bulkhead::vmm::run();
    }
    bulkhead::cli::main()
}
