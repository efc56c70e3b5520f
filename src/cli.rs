//! The command line as types: the source of `--help` and of the shell completions.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::Sources;

/// The configuration file if nobody names one.
const DEFAULT_CONFIG: &str = "/etc/handout/handout.toml";

/// Hands out the time and files over plain TCP to anything that can open a socket.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve the time and files until SIGTERM or SIGINT
    #[command(after_help = "\
Examples:
  handout serve --config config/handout.toml
  handout serve --time 0.0.0.0:6789 --time udp:0.0.0.0:6789
  handout serve --file 0.0.0.0:5566=picture.jpg

Then, from anywhere:
  nc HOST 6789
  nc HOST 5566 | jq -r .filedata | base64 -d > picture.jpg

Exit codes: 0 stopped as ordered, 1 it failed, 2 wrong usage, 78 wrong configuration.")]
    Serve(Serve),
    /// Read and check the configuration, say every fault, touch nothing
    #[command(after_help = "\
Examples:
  handout check
  handout check --config config/handout.toml

Exit codes: 0 no fault, 2 wrong usage, 78 wrong configuration.")]
    Check(ConfigFile),
    /// Print the completions of a shell
    #[command(after_help = "\
Examples:
  handout completions bash > /usr/share/bash-completion/completions/handout
  handout completions fish > ~/.config/fish/completions/handout.fish")]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// Where the configuration is.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// The configuration file [default: /etc/handout/handout.toml]
    #[arg(long, value_name = "FILE", env = "HANDOUT_CONFIG")]
    pub config: Option<PathBuf>,
}

/// What to serve.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    config: ConfigFile,
    /// Tell the time on this address: HOST:PORT, udp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    time: Vec<String>,
    /// Hand out this file on this address: HOST:PORT=PATH or unix:PATH=PATH
    #[arg(long, value_name = "ADDR=PATH", value_parser = address_and_path)]
    file: Vec<(String, String)>,
}

fn address_and_path(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((address, path)) if !address.is_empty() && !path.is_empty() => {
            Ok((address.to_owned(), path.to_owned()))
        }
        _ => Err("expected ADDR=PATH, as 0.0.0.0:5566=picture.jpg".to_owned()),
    }
}

impl From<ConfigFile> for Sources {
    fn from(file: ConfigFile) -> Self {
        let file = file.config.unwrap_or_else(|| DEFAULT_CONFIG.into());
        Self { file: Some(file), ..Self::default() }
    }
}

impl From<Serve> for Sources {
    /// Services on the command line need no file; one that is named is read beside them.
    fn from(serve: Serve) -> Self {
        let Serve { config, time, file: files } = serve;
        if time.is_empty() && files.is_empty() {
            return config.into();
        }
        Self { file: config.config, time, files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_help_names_the_default_that_is_used() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("check").unwrap().render_help().to_string();
        assert!(help.contains(DEFAULT_CONFIG));
    }

    #[test]
    fn a_file_argument_is_an_address_and_a_path() {
        let parsed = address_and_path("0.0.0.0:5566=a=b.jpg");
        assert_eq!(parsed, Ok(("0.0.0.0:5566".to_owned(), "a=b.jpg".to_owned())));
        for bad in ["", "a.jpg", "=a.jpg", "0.0.0.0:5566="] {
            assert!(address_and_path(bad).is_err(), "{bad}");
        }
    }
}
