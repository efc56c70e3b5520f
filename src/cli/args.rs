//! The command line as types: the source of `--help`, of the shell completions and of the manual
//! page.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use jiff::tz::TimeZone;

use crate::client::Server;
use crate::client::fetch::{FetchOptions, Output, Selection};
use crate::client::time::Question;
use crate::clock::find_zone;
use crate::config::Sources;
use crate::config_reader::values;
use crate::fs::atomic::OverwritePolicy;

/// Default path of the configuration file.
pub const DEFAULT_CONFIG: &str = "/etc/handout/handout.toml";

/// Hands out the time and files over plain TCP to anything that can open a socket.
#[derive(Debug, Parser)]
#[command(
    version,
    max_term_width = 100,
    after_help = "Exit codes: 0 done, 1 it failed, 2 wrong usage, 78 wrong configuration."
)]
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
  nc -d HOST 6789
  nc -d HOST 5566 | jq -r .filedata | base64 -d > picture.jpg

Exit codes: 0 stopped as ordered, 1 it failed, 2 wrong usage, 78 wrong configuration.")]
    Serve(Serve),
    /// Read and check the configuration, say every fault, touch nothing
    #[command(after_help = "\
Examples:
  handout check
  handout check --config config/handout.toml
  handout check --connect                   also try the server of every mail and SMS channel

Exit codes: 0 no fault, 1 a channel cannot be used or a file system does not answer, 2 wrong usage,
78 wrong configuration.")]
    Check(Check),
    /// Reload the configuration of the running daemon, wait, and print the outcome
    #[command(after_help = "\
Examples:
  handout reload
  handout reload --socket /run/handout-lab/control

Every fault is printed, and after a fault the daemon goes on with its old configuration. A daemon
that was started by hand has a control socket with `handout serve --control PATH`, and is reloaded
by SIGHUP as well.
Exit codes: 0 reloaded, 1 the daemon cannot be reached or did not reply, 2 wrong usage, 78 the
daemon rejected its configuration.")]
    Reload(Reload),
    /// Ask a time service and print what it says
    #[command(after_help = "\
Examples:
  handout time 192.0.2.1
  handout time --offset clock.example.org:6789
  handout time --rfc868 --udp --offset time.example.org:37

Exit codes: 0 done, 1 it failed, 2 wrong usage.")]
    Time(Time),
    /// Save what a file service hands out
    #[command(after_help = "\
Examples:
  handout fetch 192.0.2.1                   what it pushes, by its own name
  handout fetch 192.0.2.1 -o picture.jpg    the same by a name of yours
  handout fetch 192.0.2.1 --list            the files that it has
  handout fetch 192.0.2.1 a.txt sub/b.txt   some of them
  handout fetch 192.0.2.1 --all -o mirror/  all of them, with sub-folders

Nothing is overwritten without --force, and a file appears only when it is whole.
Exit codes: 0 everything was saved, 1 something was not, 2 wrong usage.")]
    Fetch(Fetch),
    /// Save what is at URLs, or in a listing that is at one, over HTTP(S)
    #[command(after_help = "\
Examples:
  handout download https://example.org/ca.pem
  handout download --update -o pictures/ https://example.org/1.jpg https://example.org/2.jpg
  handout download --list /newslist --url /picUrl --filename /title -o pictures/ \\
      https://api.example.org/pictures.json

A file appears only when it is whole, with the server's time. Nothing is overwritten without --force
or --update. What has come of a file that is interrupted is kept, hidden, and the same command goes
on from there. Other hosts, to which a listing or a redirect leads, must have public addresses.
Exit codes: 0 everything is there, 1 something failed, 2 wrong usage.")]
    Download(Download),
    /// Send a mail through a configured channel
    #[command(after_help = "\
Examples:
  handout mail ops --subject 'The backup is done' 'All 20 files are there.'
  df -h | handout mail ops --subject 'Disks of today'
  handout mail ops --subject Report --to boss@example.org --attach report.pdf 'See the report.'

What the mail is known by (its Message-ID) is printed when the server has taken it.
Exit codes: 0 everybody gets it, 1 somebody does not, 2 wrong usage, 78 wrong configuration.")]
    Mail(Mail),
    /// Send an SMS through a configured channel
    #[command(after_help = "\
Examples:
  handout sms ops 'The backup is done'
  uptime | handout sms ops --to 13800000000

What the provider knows it by is printed when it has taken it.
Exit codes: 0 everybody gets it, 1 somebody does not, 2 wrong usage, 78 wrong configuration.")]
    Sms(Sms),
    /// Print the completions of a shell
    #[command(after_help = "\
Examples:
  source <(handout completions bash)
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

/// What to check.
#[derive(Debug, Args)]
pub struct Check {
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigFile,
    /// Also try the server, encryption, login and mail recipients of every channel, sending nothing
    #[arg(long)]
    pub connect: bool,
}

/// How to reload.
#[derive(Debug, Args)]
pub struct Reload {
    /// The control socket [default: /run/handout/control]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How long to wait for the outcome
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = values::duration)]
    pub timeout: Duration,
    /// Say only what failed
    #[arg(short, long)]
    pub quiet: bool,
}

/// What to send as a mail.
#[derive(Debug, Args)]
pub struct Mail {
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigFile,
    /// The channel: NAME of a table [mail.NAME]
    pub name: String,
    /// What it is about, in a line
    #[arg(short, long, value_name = "SUBJECT")]
    pub subject: String,
    /// To this address instead of those of the configuration
    #[arg(long, value_name = "ADDRESS")]
    pub to: Vec<String>,
    /// With this file
    #[arg(short, long, value_name = "FILE")]
    pub attach: Vec<PathBuf>,
    /// Print the mail as it would go, and send nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The text; without it, or as -, it is read from standard input
    pub text: Option<String>,
}

/// What to send as an SMS.
#[derive(Debug, Args)]
pub struct Sms {
    /// Where the configuration is.
    #[command(flatten)]
    pub config: ConfigFile,
    /// The channel: NAME of a table [sms.NAME]
    pub name: String,
    /// To this number instead of those of the configuration
    #[arg(long, value_name = "NUMBER")]
    pub to: Vec<String>,
    /// Print what would be asked of the provider, without secrets, and send nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The text; without it, or as -, it is read from standard input
    pub text: Option<String>,
}

/// What to serve.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    config: ConfigFile,
    /// Tell the time on this address: HOST:PORT, udp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    time: Vec<String>,
    /// Hand out this file, or the files of this folder, on this address: HOST:PORT=PATH
    #[arg(long, value_name = "ADDR=PATH", value_parser = address_and_path)]
    file: Vec<(String, String)>,
    /// Create the socket for `handout reload` here [default: /run/handout/control, if possible]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// How to ask for the time.
#[derive(Debug, Args)]
pub struct Time {
    /// The service; an IPv6 address with a port stands in brackets [default port: 6789]
    #[arg(value_name = "HOST[:PORT]")]
    server: Server,
    /// Also print by how much its clock is ahead of this machine's, the bound of that, and the round
    /// trip
    #[arg(long)]
    pub offset: bool,
    /// Ask for the four bytes of RFC 868
    #[arg(long)]
    rfc868: bool,
    /// Ask by datagram
    #[arg(long)]
    udp: bool,
    /// The zone of a reply that does not say it: local, UTC or a name such as Asia/Shanghai
    /// [default: local]
    #[arg(long, value_name = "ZONE", value_parser = find_zone)]
    timezone: Option<TimeZone>,
    /// How long all may take
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::duration)]
    timeout: Duration,
}

impl Time {
    /// What to ask.
    pub fn question(&self) -> Question {
        let Self { server, udp, rfc868, timeout, .. } = self;
        Question { server: server.clone(), udp: *udp, rfc868: *rfc868, timeout: *timeout }
    }

    /// The zone of a reply that does not say it. The machine's own is looked for only now: one
    /// that has none, as in an initramfs, can still be told the time.
    ///
    /// # Errors
    /// If this machine's own is wanted and not known.
    pub fn timezone(&self) -> Result<TimeZone, String> {
        self.timezone.clone().map_or_else(|| find_zone("local"), Ok)
    }
}

/// What to fetch.
#[derive(Debug, Args)]
pub struct Fetch {
    /// The service; an IPv6 address with a port stands in brackets [default port: 5566]
    #[arg(value_name = "HOST[:PORT]")]
    server: Server,
    /// Files of a folder service; without any, what the service pushes
    #[arg(value_name = "NAME", conflicts_with = "all")]
    names: Vec<String>,
    /// Every file of a folder service, with its sub-folders
    #[arg(long)]
    all: bool,
    /// Print which files a folder service has: size, time of change, name
    #[arg(long, conflicts_with_all = ["names", "all", "output", "force"])]
    pub list: bool,
    /// Save to this file, into this folder, or to standard output (-); a device or FIFO is written
    /// to, and a socket is refused
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Replace files that are there
    #[arg(long)]
    force: bool,
    /// The largest file that is taken
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = values::size)]
    max_size: u64,
    /// How long all may take
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = values::duration)]
    timeout: Duration,
    /// How long the service may be silent
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    idle_timeout: Duration,
    /// Say only what failed
    #[arg(short, long)]
    pub quiet: bool,
}

/// What to download.
#[derive(Debug, Args)]
pub struct Download {
    /// What to save, under the last part of its path; or, with --list, where the listing is
    #[arg(value_name = "URL", required = true)]
    pub urls: Vec<String>,
    /// Save into this folder
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub output: PathBuf,
    /// The URL is that of a JSON listing, with the array at this pointer ("" for the whole)
    #[arg(long, value_name = "POINTER", requires = "url")]
    pub list: Option<String>,
    /// In each entry of the listing, where its URL is ("" for the whole)
    #[arg(long, value_name = "POINTER", requires = "list")]
    pub url: Option<String>,
    /// In each entry, where its name is [default: the last part of its URL's path]
    #[arg(long, value_name = "POINTER", requires = "list")]
    pub filename: Option<String>,
    /// In each entry, where the digest is that must hold
    #[arg(long, value_name = "POINTER", requires = "list")]
    pub sha256: Option<String>,
    /// How many at one time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub jobs: u32,
    /// Replace files that are there
    #[arg(long)]
    pub force: bool,
    /// Replace files that are there if they have changed; what the server says of them is kept in
    /// a hidden file beside them
    #[arg(long)]
    pub update: bool,
    /// The largest file that is taken
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = values::size)]
    pub max_size: u64,
    /// How long a server may be silent
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    pub timeout: Duration,
    /// How long a file may take, with all attempts
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = values::duration)]
    pub max_duration: Duration,
    /// How often a file is tried again that fails for a reason that may pass
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub retries: u32,
    /// Say this, too, to the servers of the URLs, but to no other; @FILE: each line of a file, which
    /// is the place for what is secret
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<String>,
    /// Trust these certificates (PEM) besides those of the system: issuers, or the server's own
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Ask this proxy, and none that the environment names; it looks up the names, so that only
    /// addresses in URLs are looked at here
    #[arg(long, value_name = "URL")]
    pub proxy: Option<String>,
    /// Only print what would be asked for
    #[arg(long)]
    pub dry_run: bool,
    /// Say only what failed
    #[arg(short, long)]
    pub quiet: bool,
}

impl Fetch {
    /// Returns the parameters of the fetch.
    ///
    /// # Errors
    /// If several files are fetched to an output that is not a folder.
    pub fn options(&self) -> Result<FetchOptions, clap::Error> {
        let selection = match (self.all, self.names.as_slice()) {
            (true, _) => Selection::All,
            (false, []) => Selection::Pushed,
            (false, names) => Selection::Names(names.to_vec()),
        };
        let output = match &self.output {
            None => Output::Folder(PathBuf::from(".")),
            Some(path) if is_stdout(path) => Output::Stdout,
            Some(path) if selection == Selection::All || is_folder(path) => {
                Output::Folder(path.clone())
            }
            Some(path) => Output::File(path.clone()),
        };
        let several = self.all || self.names.len() > 1;
        if several && !matches!(output, Output::Folder(_)) {
            let problem = "several files need -o with a folder that is there, or that ends with /";
            return Err(Cli::command().error(ErrorKind::ArgumentConflict, problem));
        }
        Ok(FetchOptions {
            server: self.server.clone(),
            selection,
            output,
            overwrite: OverwritePolicy::from_flags(self.force, false),
            max_size: self.max_size,
            timeout: self.timeout,
            idle_timeout: self.idle_timeout,
        })
    }
}

/// Whether a path is standard output, whatever that is connected to.
fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

fn is_folder(path: &Path) -> bool {
    path.as_os_str().as_encoded_bytes().ends_with(b"/") || path.is_dir()
}

fn address_and_path(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((address, path)) if !address.is_empty() && !path.is_empty() => {
            Ok((address.to_owned(), path.to_owned()))
        }
        _ => Err("expected ADDR=PATH, as 0.0.0.0:5566=picture.jpg".to_owned()),
    }
}

impl ConfigFile {
    /// The file, whether it is named or not.
    pub fn path(&self) -> &Path {
        self.config.as_deref().unwrap_or(Path::new(DEFAULT_CONFIG))
    }
}

impl From<ConfigFile> for Sources {
    fn from(file: ConfigFile) -> Self {
        Self { file: Some(file.path().to_owned()), ..Self::default() }
    }
}

impl From<Serve> for Sources {
    /// Services on the command line need no file; one that is named is read beside them.
    fn from(serve: Serve) -> Self {
        let Serve { config, time, file: files, .. } = serve;
        if time.is_empty() && files.is_empty() {
            return config.into();
        }
        Self { file: config.config, time, files }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
