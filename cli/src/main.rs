//! The program `murphy`: everything is in the library, so that tests build the same program.

use std::process::ExitCode;

fn main() -> ExitCode {
    murphy_cli::main_with(std::env::args_os())
}
