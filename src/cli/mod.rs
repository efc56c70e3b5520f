//! The command line: parses it and runs one subcommand, each in its own file.
//!
//! [`args`] defines the arguments, [`output`] prints results and errors, [`runtime`] runs clients
//! until they end or a signal stops them. The work of a command belongs to the modules below.

pub mod args;
mod check;
#[cfg(feature = "gateway")]
mod download;
mod fetch;
mod output;
mod progress;
mod reload;
mod runtime;
#[cfg(feature = "gateway")]
mod send;
mod serve;
mod time;

use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use args::{Cli, Command};
use output::print;

/// Parses the command line and runs the subcommand.
pub fn run() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Check(arguments) => check::run(arguments),
        Command::Reload(arguments) => reload::run(arguments),
        Command::Time(arguments) => time::run(&arguments),
        Command::Fetch(arguments) => fetch::run(&arguments),
        #[cfg(feature = "gateway")]
        Command::Download(arguments) => download::run(&arguments),
        #[cfg(feature = "gateway")]
        Command::Mail(arguments) => send::run_mail(&arguments),
        #[cfg(feature = "gateway")]
        Command::Sms(arguments) => send::run_sms(&arguments),
        #[cfg(not(feature = "gateway"))]
        Command::Download(_) => output::missing_feature("`download`"),
        #[cfg(not(feature = "gateway"))]
        Command::Mail(_) => output::missing_feature("`mail`"),
        #[cfg(not(feature = "gateway"))]
        Command::Sms(_) => output::missing_feature("`sms`"),
        Command::Completions { shell } => {
            let mut completions = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "handout", &mut completions);
            print(&completions)
        }
    }
}
