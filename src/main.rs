//! The host program.

use std::process::ExitCode;

fn main() -> ExitCode {
    // The VM's process has no command line: everything comes over its control socket.
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "vmm") {
        return vmm();
    }
    bulkhead::cli::main()
}

/// The process that runs one VM; started by the backend only.
fn vmm() -> ExitCode {
    eprintln!("error: this build has no VMM");
    ExitCode::FAILURE
}
