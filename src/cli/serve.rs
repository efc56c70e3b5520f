//! `handout serve`

use std::error::Error;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use super::args;
use super::output::{EX_CONFIG, complain};
use super::runtime::stop_signals;
use crate::config::{Config, Sources};
use crate::daemon::control::{self, ControlSocket, ReloadSender};
use crate::daemon::{Daemon, manager};
use crate::fs::filename::escape;
use crate::net::sockets::Inherited;
use crate::runtime::{self, Workers};
use crate::telemetry::logging::Logger;
use crate::text::error_chain;

/// Maximum time for the last message on standard error.
const COMPLAINT_TIMEOUT: Duration = Duration::from_secs(1);

pub(super) fn run(arguments: args::Serve) -> ExitCode {
    match serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, text)) => {
            complain_briefly(text);
            code
        }
    }
}

/// Serves until a signal. An error consists of an exit code and a message.
fn serve(arguments: args::Serve) -> Result<(), (ExitCode, String)> {
    let control = arguments.control.clone();
    let sources = Sources::from(arguments);
    // Before anything is opened, because inherited descriptors are identified by their numbers.
    let inherited =
        Inherited::take_all().map_err(|error| (ExitCode::FAILURE, error_chain(&error)))?;
    let config = Config::load_to_serve(&sources).map_err(|faults| {
        // A transient fault is worth a restart.
        if faults.is_transient() {
            (ExitCode::FAILURE, error_chain(&faults))
        } else {
            (ExitCode::from(EX_CONFIG), faults.to_string())
        }
    })?;
    run_daemon(sources, &config, inherited, control.as_deref()).map_err(|error| {
        // Passed sockets that do not fit the configuration will not fit after a restart.
        let code = match error.downcast_ref() {
            Some(manager::Error::Activation(_)) => ExitCode::from(EX_CONFIG),
            _ => ExitCode::FAILURE,
        };
        (code, error_chain(&*error))
    })
}

fn run_daemon(
    sources: Sources,
    config: &Config,
    inherited: Vec<Inherited>,
    control: Option<&Path>,
) -> Result<(), Box<dyn Error>> {
    let log = Logger::start(&config.log)?;
    let runtime = runtime::event_loop()?;
    let result = runtime.block_on(async {
        let signals = stop_signals()?;
        let (reloads, queue) = control::reload_queue();
        tokio::spawn(reload_on_hangup(reloads.clone())?);
        if let Some(socket) = open_control(control)? {
            let stop = signals.stop.clone();
            tokio::spawn(stop.run_until_cancelled_owned(socket.serve(reloads)));
        }
        let starting = Daemon::start(sources, config, inherited, Workers::start()?, log);
        // Reading a file may hang.
        let stop = signals.stop.clone();
        match stop.run_until_cancelled(starting).await {
            None => Ok(()),
            Some(daemon) => Ok(daemon?.run(signals, queue).await?),
        }
    });
    runtime.shutdown_timeout(runtime::SHUTDOWN_TIMEOUT);
    result
}

fn open_control(path: Option<&Path>) -> Result<Option<ControlSocket>, Box<dyn Error>> {
    ControlSocket::open(path).map_err(|error| {
        let path = path.map(|path| escape(&path.to_string_lossy())).unwrap_or_default();
        format!("cannot open the control socket {path}: {error}").into()
    })
}

fn reload_on_hangup(reloads: ReloadSender) -> io::Result<impl Future<Output = ()>> {
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        while hangup.recv().await.is_some() {
            // Signals during a reload are merged into one more reload.
            reloads.notify();
        }
    })
}

/// Prints the final error within a bounded time: standard error may be a full pipe.
fn complain_briefly(text: String) {
    let (done, written) = mpsc::channel();
    let started = thread::Builder::new().spawn(move || {
        complain(&text);
        let _ = done.send(());
    });
    // Without a thread, only the exit code reports the failure.
    if started.is_ok() {
        let _ = written.recv_timeout(COMPLAINT_TIMEOUT);
    }
}
