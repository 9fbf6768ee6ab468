//! The host program.

fn main() -> std::process::ExitCode {
    bulkhead::vmm::run()
}
