//! The program `murphy` again, in the package of the tests, so that they always run what they were built with.

use std::process::ExitCode;

fn main() -> ExitCode {
    murphy_cli::main_with(std::env::args_os())
}
