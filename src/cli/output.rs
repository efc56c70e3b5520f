//! Prints results and errors, and maps them to exit codes.

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use crate::config_reader::Diagnostics;
use crate::telemetry::logging;
use crate::text::error_chain;

/// Exit code of an invalid configuration, which a restart does not repair (`EX_CONFIG` in
/// sysexits(3)).
pub(super) const EX_CONFIG: u8 = 78;

/// Prints a result. A reader that closes the pipe early is no error.
pub(super) fn print(result: &[u8]) -> ExitCode {
    match io::stdout().write_all(result) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!("cannot print: {error}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Prints every fault of the configuration.
pub(super) fn reject(faults: &Diagnostics) -> ExitCode {
    complain(&faults.to_string());
    ExitCode::from(EX_CONFIG)
}

pub(super) fn fail(error: &dyn Error) -> ExitCode {
    complain(&error_chain(error));
    ExitCode::FAILURE
}

#[cfg(not(feature = "gateway"))]
pub(super) fn missing_feature(name: &str) -> ExitCode {
    complain(&format!("this build has no {name}: it was built without the feature `gateway`"));
    ExitCode::FAILURE
}

/// Prints lines to standard error. If it is closed, only the exit code reports the problem.
pub(super) fn complain(text: &str) {
    // The journal reads the priority from this prefix (sd-daemon(3)).
    let prefix = if logging::stderr_is_the_journal() { "<3>" } else { "" };
    for line in text.lines() {
        let _ = writeln!(io::stderr(), "{prefix}handout: {line}");
    }
}
