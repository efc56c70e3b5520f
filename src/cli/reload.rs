//! `handout reload`

use std::process::ExitCode;

use tokio::time::timeout;

use super::args;
use super::output::{EX_CONFIG, complain, fail, print};
use super::runtime::run_until_signal;
use crate::daemon::control::{self, Reply};

pub(super) fn run(arguments: args::Reload) -> ExitCode {
    run_until_signal(reload(arguments))
}

/// Requests a reload from the running daemon and prints its result.
async fn reload(arguments: args::Reload) -> ExitCode {
    let path = arguments.socket.unwrap_or_else(control::default_path);
    let limit = arguments.timeout;
    match timeout(limit, control::request_reload(&path)).await {
        Ok(Ok(Reply::Reloaded { .. })) if arguments.quiet => ExitCode::SUCCESS,
        Ok(Ok(Reply::Reloaded { summary })) => print(format!("{summary}\n").as_bytes()),
        Ok(Ok(Reply::Rejected { faults })) => {
            for fault in &faults {
                complain(fault);
            }
            complain("reload failed: the daemon keeps its old configuration");
            ExitCode::from(EX_CONFIG)
        }
        Ok(Ok(Reply::Refused { reason })) => {
            complain(&format!("cannot reload: {reason}"));
            ExitCode::FAILURE
        }
        Ok(Err(error)) => fail(&error),
        Err(_) => {
            complain(&format!("the daemon did not reply within {} s", limit.as_secs_f64()));
            ExitCode::FAILURE
        }
    }
}
