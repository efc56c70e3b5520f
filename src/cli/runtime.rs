//! Runs clients on one thread, and turns signals into cancellations.

use std::io;
use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::output::{complain, fail};
use crate::daemon::StopSignals;
use crate::runtime;

/// Runs a client until it ends. The first signal cancels its token, the second ends it.
pub(super) fn run_client(client: impl AsyncFnOnce(CancellationToken) -> ExitCode) -> ExitCode {
    let runtime = match runtime::event_loop() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(async {
        let (signals, mut hangup) = match (stop_signals(), signal(SignalKind::hangup())) {
            (Ok(signals), Ok(hangup)) => (signals, hangup),
            (Err(error), _) | (_, Err(error)) => return fail(&error),
        };
        let stop = signals.stop.clone();
        tokio::spawn(async move {
            hangup.recv().await;
            stop.cancel();
        });
        tokio::select! {
            code = client(signals.stop) => code,
            () = signals.stop_now.cancelled() => interrupted(),
        }
    });
    runtime.shutdown_timeout(runtime::SHUTDOWN_TIMEOUT);
    code
}

/// Runs a client that removes incomplete files when it is dropped, which the first signal does.
pub(super) fn run_until_signal(client: impl Future<Output = ExitCode>) -> ExitCode {
    run_client(async |stop| stop.run_until_cancelled(client).await.unwrap_or_else(interrupted))
}

pub(super) fn interrupted() -> ExitCode {
    complain("interrupted");
    ExitCode::FAILURE
}

/// Returns tokens that SIGTERM and SIGINT cancel: the first signal `stop`, the second `stop_now`.
pub(super) fn stop_signals() -> io::Result<StopSignals> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Lets writes above RLIMIT_FSIZE fail instead of killing the process.
    let _ = signal(SignalKind::from_raw(libc::SIGXFSZ))?;
    let signals = StopSignals::default();
    let tokens = signals.clone();
    tokio::spawn(async move {
        for token in [tokens.stop, tokens.stop_now] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            token.cancel();
        }
    });
    Ok(signals)
}
