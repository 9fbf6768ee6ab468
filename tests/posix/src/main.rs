//! `posix-table DIRECTORY`: runs the table there and prints each row that differs, and a line with the numbers.

use std::{path::Path, process::ExitCode};

fn main() -> ExitCode {
    let Some(directory) = std::env::args_os().nth(1) else {
        eprintln!("usage: posix-table DIRECTORY");
        return ExitCode::from(2);
    };
    let (differing, rows) = posix_table::run(Path::new(&directory));
    for line in &differing {
        println!("{line}");
    }
    println!("{} of {rows} rows as expected", rows - differing.len());
    if differing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
