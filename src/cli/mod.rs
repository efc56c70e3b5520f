//! The command line.

pub mod args;
#[cfg(feature = "gateway")]
pub mod download;
pub mod manual;
pub mod progress;
#[cfg(feature = "gateway")]
pub mod send;

use std::error::Error;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::cli::args::{Cli, Command};
use crate::cli::progress::Progress;
use crate::client;
use crate::client::fetch::Order;
use crate::config::{Config, Sources};
use crate::config_reader::Diagnostics;
use crate::daemon::control;
use crate::daemon::control::{ControlSocket, ReloadSender, Reply};
use crate::daemon::manager;
use crate::daemon::{Daemon, Orders};
use crate::fs::filename::escape;
use crate::net::sockets::Inherited;
use crate::runtime;
use crate::runtime::Workers;
use crate::telemetry::logging;
use crate::telemetry::logging::Logger;
use crate::text::error_chain;
use clap::{CommandFactory, Parser};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// Wrong configuration (sysexits(3), `EX_CONFIG`), which a restart does not mend.
const WRONG_CONFIGURATION: u8 = 78;

/// Maximum time for the daemon's last message on standard error.
const COMPLAINT_TIMEOUT: Duration = Duration::from_secs(1);

/// Parses the command line and runs the subcommand.
pub fn run() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(arguments) => serve(arguments),
        Command::Check(arguments) => check(arguments),
        Command::Reload(arguments) => in_client(|stop| until(stop, reload(arguments))),
        Command::Time(arguments) => in_client(|stop| until(stop, time(&arguments))),
        Command::Fetch(arguments) => match arguments.order() {
            Ok(order) => in_client(|stop| until(stop, fetch(&arguments, &order))),
            Err(error) => error.exit(),
        },
        Command::Download(arguments) => download(&arguments),
        Command::Mail(arguments) => mail(&arguments),
        Command::Sms(arguments) => sms(&arguments),
        Command::Completions { shell } => {
            let mut completions = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "handout", &mut completions);
            print(&completions)
        }
        Command::Manual { page } => {
            page.render().map_or_else(|error| fail(&error), |page| print(page.as_bytes()))
        }
    }
}

/// Runs a client, which needs one thread, until it has done. A signal asks it to stop; a second one
/// ends it.
fn in_client<F: Future<Output = ExitCode>>(
    client: impl FnOnce(CancellationToken) -> F,
) -> ExitCode {
    let runtime = match runtime::event_loop() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    let code = runtime.block_on(async {
        let orders = match orders() {
            Ok(orders) => orders,
            Err(error) => return fail(&error),
        };
        let mut hangup = match signal(SignalKind::hangup()) {
            Ok(hangup) => hangup,
            Err(error) => return fail(&error),
        };
        let stop = orders.stop.clone();
        tokio::spawn(async move {
            hangup.recv().await;
            stop.cancel();
        });
        tokio::select! {
            code = client(orders.stop) => code,
            () = orders.stop_now.cancelled() => interrupted(),
        }
    });
    runtime.shutdown_timeout(runtime::END_TIME);
    code
}

/// Runs a client that, dropped, removes what is not whole.
async fn until(stop: CancellationToken, client: impl Future<Output = ExitCode>) -> ExitCode {
    stop.run_until_cancelled(client).await.unwrap_or_else(interrupted)
}

fn interrupted() -> ExitCode {
    complain("interrupted");
    ExitCode::FAILURE
}

#[cfg(feature = "gateway")]
fn download(arguments: &args::Download) -> ExitCode {
    let order = match download::order(arguments) {
        Ok(order) => order,
        Err(error) => error.exit(),
    };
    in_client(|stop| async move {
        let downloaded = if arguments.dry_run {
            download::dry_run(&order, &stop).await
        } else {
            download::download(&order, arguments.quiet, &stop).await
        };
        match downloaded {
            _ if stop.is_cancelled() => interrupted(),
            Ok(downloaded) => {
                let printed = print(downloaded.lines.as_bytes());
                if downloaded.complete { printed } else { ExitCode::FAILURE }
            }
            Err(error) => fail(&error),
        }
    })
}

#[cfg(not(feature = "gateway"))]
fn download(_: &args::Download) -> ExitCode {
    absent("`download`", "mirror")
}

async fn time(arguments: &args::Time) -> ExitCode {
    let told = async {
        let answer = client::time::ask(arguments.question()).await?;
        let mut lines = answer.line()? + "\n";
        if arguments.offset {
            let offset = answer.offset(&arguments.timezone()?)?;
            lines = format!("{lines}offset {offset}\n");
        }
        Ok::<_, Box<dyn Error>>(lines)
    };
    match told.await {
        Ok(lines) => print(lines.as_bytes()),
        Err(error) => fail(&*error),
    }
}

async fn fetch(arguments: &args::Fetch, order: &Order) -> ExitCode {
    if !arguments.list {
        let mut progress = Progress::new(arguments.quiet);
        let saved = client::fetch::fetch(order, &mut progress).await;
        return if saved { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match client::fetch::list(order).await {
        Ok(files) => {
            let lines = files.iter().map(|file| {
                let modified = escape(file.modified.as_deref().unwrap_or("-"));
                format!("{:>12} {modified} {}\n", file.size, escape(&file.filename))
            });
            print(lines.collect::<String>().as_bytes())
        }
        Err(error) => fail(&error),
    }
}

#[cfg(feature = "gateway")]
fn mail(arguments: &args::Mail) -> ExitCode {
    match send::mail(arguments) {
        Ok(mail) if arguments.dry_run => print(mail.formatted()),
        Ok(mail) => in_client(|stop| until(stop, async move { told(mail.send().await) })),
        Err(error) => not_begun(error),
    }
}

#[cfg(feature = "gateway")]
fn sms(arguments: &args::Sms) -> ExitCode {
    match send::sms(arguments) {
        Ok(sms) if arguments.dry_run => print(sms.show().as_bytes()),
        Ok(sms) => in_client(|stop| until(stop, async move { told(sms.send().await) })),
        Err(error) => not_begun(error),
    }
}

#[cfg(feature = "gateway")]
fn told(sent: Result<send::Sent, send::Failure>) -> ExitCode {
    match sent {
        Ok(sent) => {
            let lines = sent.ids.iter().map(|id| format!("{id}\n"));
            let printed = print(lines.collect::<String>().as_bytes());
            for (to, failure) in &sent.refused {
                complain(&format!("{}: {failure}", escape(to)));
            }
            if sent.refused.is_empty() { printed } else { ExitCode::FAILURE }
        }
        Err(failure) => fail(&failure),
    }
}

#[cfg(feature = "gateway")]
fn not_begun(error: send::Error) -> ExitCode {
    match error {
        send::Error::Usage(error) => error.exit(),
        send::Error::Configuration(faults) => refuse(&faults),
        error @ send::Error::Other(_) => fail(&error),
    }
}

#[cfg(not(feature = "gateway"))]
fn mail(_: &args::Mail) -> ExitCode {
    absent("`mail`", "alert")
}

#[cfg(not(feature = "gateway"))]
fn sms(_: &args::Sms) -> ExitCode {
    absent("`sms`", "alert")
}

fn check(arguments: args::Check) -> ExitCode {
    let sources = Sources::from(arguments.config);
    let config = match Config::load(&sources) {
        Ok(config) => config,
        // It may be right when the file system answers again.
        Err(faults) if faults.is_transient() => return fail(&faults),
        Err(faults) => return refuse(&faults),
    };
    let lines = config.services.iter().map(|service| {
        let listen: Vec<_> = service.listen.iter().map(ToString::to_string).collect();
        format!("{} on {}\n", service.name, listen.join(", "))
    });
    let mirrors = config
        .mirrors
        .iter()
        .map(|mirror| format!("mirror.{} into {}\n", mirror.name(), shown(mirror.folder())));
    let channels = config.alerts.lines().map(|line| line + "\n");
    let end = ["no fault found\n".to_owned()];
    let checked =
        print(lines.chain(mirrors).chain(channels).chain(end).collect::<String>().as_bytes());
    if arguments.connect { connect(config) } else { checked }
}

/// Tries every channel of a configuration.
#[cfg(feature = "gateway")]
fn connect(config: Config) -> ExitCode {
    in_client(|stop| {
        until(stop, async move {
            let mut code = ExitCode::SUCCESS;
            if config.alerts.channels.is_empty() {
                code = print(b"no channel to connect to\n");
            }
            for channel in &config.alerts.channels {
                let name = channel.name();
                match channel.try_out().await {
                    Ok(done) => {
                        let _ = print(format!("{name}: {done}\n").as_bytes());
                    }
                    Err(failure) => {
                        complain(&format!("{name}: {failure}"));
                        code = ExitCode::FAILURE;
                    }
                }
            }
            code
        })
    })
}

#[cfg(not(feature = "gateway"))]
fn connect(_: Config) -> ExitCode {
    absent("channels", "alert")
}

#[cfg(not(feature = "gateway"))]
fn absent(what: &str, feature: &str) -> ExitCode {
    complain(&format!("this build has no {what}: it was built without the feature `{feature}`"));
    ExitCode::FAILURE
}

fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

/// Requests a reload from the running daemon and prints its outcome.
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
            ExitCode::from(WRONG_CONFIGURATION)
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

fn serve(arguments: args::Serve) -> ExitCode {
    match try_to_serve(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, text)) => {
            complain_briefly(text);
            code
        }
    }
}

/// Serves until it is ordered to stop. An error is an exit code and a text.
fn try_to_serve(arguments: args::Serve) -> Result<(), (ExitCode, String)> {
    let control = arguments.control.clone();
    let sources = Sources::from(arguments);
    // Before anything is opened, as they are known by their numbers.
    let inherited =
        Inherited::take_all().map_err(|error| (ExitCode::FAILURE, error_chain(&error)))?;
    let config = Config::load_to_serve(&sources).map_err(|faults| {
        // A transient fault is worth a restart.
        if faults.is_transient() {
            (ExitCode::FAILURE, error_chain(&faults))
        } else {
            (ExitCode::from(WRONG_CONFIGURATION), faults.to_string())
        }
    })?;
    let served = || -> Result<(), Box<dyn Error>> {
        let log = Logger::start(&config.log)?;
        let runtime = runtime::event_loop()?;
        let served = runtime.block_on(async {
            let orders = orders()?;
            let (reloads, queue) = control::reload_queue();
            tokio::spawn(reload_on_hangup(reloads.clone())?);
            if let Some(socket) = open_control(control.as_deref())? {
                let stop = orders.stop.clone();
                tokio::spawn(stop.run_until_cancelled_owned(socket.serve(reloads)));
            }
            let starting = Daemon::start(sources, &config, inherited, Workers::start()?, log);
            // A file may hang while it is read.
            let stop = orders.stop.clone();
            match stop.run_until_cancelled(starting).await {
                None => Ok(()),
                Some(daemon) => Ok(daemon?.run(orders, queue).await?),
            }
        });
        runtime.shutdown_timeout(runtime::END_TIME);
        served
    };
    served().map_err(|error| {
        // It does not fit the sockets that it is given, which a restart does not mend.
        let code = match error.downcast_ref() {
            Some(manager::Error::Activation(_)) => ExitCode::from(WRONG_CONFIGURATION),
            _ => ExitCode::FAILURE,
        };
        (code, error_chain(&*error))
    })
}

/// Turns signals into orders: the first asks, the second insists.
fn orders() -> io::Result<Orders> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Beyond a limit on the size of files (RLIMIT_FSIZE) a write fails, and nothing is left behind;
    // uncaught, this signal would end the process at once.
    let _ = signal(SignalKind::from_raw(libc::SIGXFSZ))?;
    let orders = Orders::default();
    let tell = orders.clone();
    tokio::spawn(async move {
        for order in [tell.stop, tell.stop_now] {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            order.cancel();
        }
    });
    Ok(orders)
}

fn open_control(path: Option<&Path>) -> Result<Option<ControlSocket>, Box<dyn Error>> {
    ControlSocket::open(path).map_err(|error| {
        let path = path.map(shown).unwrap_or_default();
        format!("cannot open the control socket {path}: {error}").into()
    })
}

fn reload_on_hangup(reloads: ReloadSender) -> io::Result<impl Future<Output = ()>> {
    let mut hangup = signal(SignalKind::hangup())?;
    Ok(async move {
        while hangup.recv().await.is_some() {
            // Several that come during a reload are one more.
            reloads.notify();
        }
    })
}

/// Says every fault of the configuration.
fn refuse(faults: &Diagnostics) -> ExitCode {
    complain(&faults.to_string());
    ExitCode::from(WRONG_CONFIGURATION)
}

fn fail(error: &dyn Error) -> ExitCode {
    complain(&error_chain(error));
    ExitCode::FAILURE
}

/// Prints a result. Who stops reading has what it wants.
fn print(result: &[u8]) -> ExitCode {
    match io::stdout().write_all(result) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            complain(&format!("cannot print: {error}"));
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Reports why the daemon does not run, for a bounded time: its standard error may be a pipe that is
/// full, and the process must end nevertheless.
fn complain_briefly(text: String) {
    let (done, written) = mpsc::channel();
    let started = thread::Builder::new().spawn(move || {
        complain(&text);
        let _ = done.send(());
    });
    // Without a thread there is no message, but still the exit code.
    if started.is_ok() {
        let _ = written.recv_timeout(COMPLAINT_TIMEOUT);
    }
}

/// Says what is wrong, line by line. If standard error is closed, the exit code has to do.
fn complain(text: &str) {
    // The journal takes the priority of an error from this prefix (sd-daemon(3)).
    let prefix = if logging::stderr_is_the_journal() { "<3>" } else { "" };
    for line in text.lines() {
        let _ = writeln!(io::stderr(), "{prefix}handout: {line}");
    }
}
