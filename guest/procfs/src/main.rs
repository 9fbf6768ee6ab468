//! The program `bulkhead-procfs`; see the library.

fn main() -> std::process::ExitCode {
    bulkhead_procfs::main()
}
