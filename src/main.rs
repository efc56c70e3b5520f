//! Entry point of the `handout` executable; the library contains the program.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    handout::cli::run()
}
