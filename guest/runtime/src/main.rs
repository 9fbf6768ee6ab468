//! The program `bulkhead-runtime`, which the guest has as `sysbox-runc`; see the library.

fn main() -> std::process::ExitCode {
    bulkhead_runtime::main()
}
