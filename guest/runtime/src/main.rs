//! The program `sysbox-runc`; see the library.

fn main() -> std::process::ExitCode {
    sysbox_runc::main()
}
