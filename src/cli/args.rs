//! The command line as types: the source of `--help`, of the shell completions and of the manual
//! page.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use jiff::tz::TimeZone;

use crate::client::HostPort;
use crate::client::fetch::{FetchOptions, Output, Selection};
use crate::client::time::TimeRequest;
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
    after_help = "Exit codes: 0 success, 1 failure, 2 usage error, 78 configuration error."
)]
pub struct Cli {
    /// The selected subcommand.
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

From any machine:
  nc -d HOST 6789
  nc -d HOST 5566 | jq -r .filedata | base64 -d > picture.jpg

Exit codes: 0 stopped by a signal, 1 failure, 2 usage error, 78 configuration error.")]
    Serve(Serve),
    /// Check the configuration and print every fault
    #[command(after_help = "\
Examples:
  handout check
  handout check --config config/handout.toml
  handout check --connect                   also connect to the server of every channel

Exit codes: 0 no fault, 1 a channel or file system failed, 2 usage error, 78 configuration error.")]
    Check(Check),
    /// Reload the configuration of the running daemon and print the outcome
    #[command(after_help = "\
Examples:
  handout reload
  handout reload --socket /run/handout-lab/control

If the configuration has faults, all are printed and the daemon keeps the old configuration.
`handout serve --control PATH` sets the control socket of a daemon that is started by hand. SIGHUP
reloads the configuration, too.
Exit codes: 0 reloaded, 1 no reply from the daemon, 2 usage error, 78 configuration error.")]
    Reload(Reload),
    /// Query a time service
    #[command(after_help = "\
Examples:
  handout time 192.0.2.1
  handout time --offset clock.example.org:6789
  handout time --rfc868 --udp --offset time.example.org:37

Exit codes: 0 success, 1 failure, 2 usage error.")]
    Time(Time),
    /// Fetch files from a file service
    #[command(after_help = "\
Examples:
  handout fetch 192.0.2.1                   the file of the service, under its own name
  handout fetch 192.0.2.1 -o picture.jpg    the same file under another name
  handout fetch 192.0.2.1 --list            the list of files of a folder service
  handout fetch 192.0.2.1 a.txt sub/b.txt   some of these files
  handout fetch 192.0.2.1 --all -o mirror/  all of these files, with subfolders

Files appear only when they are complete. Existing files are replaced only with --force.
Exit codes: 0 all files saved, 1 at least one file failed, 2 usage error.")]
    Fetch(Fetch),
    /// Download URLs, or the entries of a JSON listing, over HTTP(S)
    #[command(after_help = "\
Examples:
  handout download https://example.org/ca.pem
  handout download --update -o pictures/ https://example.org/1.jpg https://example.org/2.jpg
  handout download --list /newslist --url /picUrl --filename /title -o pictures/ \\
      https://api.example.org/pictures.json

Files appear only when they are complete, with the server's modification time. Existing files are
replaced only with --force or --update. An interrupted download keeps its data in a hidden file,
from which the same command resumes. Hosts named only by a listing or a redirect must have public
addresses.
Exit codes: 0 all files are up to date, 1 at least one file failed, 2 usage error.")]
    Download(Download),
    /// Send a mail through a configured channel
    #[command(after_help = "\
Examples:
  handout mail ops --subject 'The backup is done' 'All 20 files are there.'
  df -h | handout mail ops --subject 'Disks of today'
  handout mail ops --subject Report --to boss@example.org --attach report.pdf 'See the report.'

The Message-ID is printed when the server has accepted the mail.
Exit codes: 0 accepted for all recipients, 1 failure, 2 usage error, 78 configuration error.")]
    Mail(Mail),
    /// Send an SMS through a configured channel
    #[command(after_help = "\
Examples:
  handout sms ops 'The backup is done'
  uptime | handout sms ops --to 13800000000

The provider's message ID is printed when the provider has accepted the SMS.
Exit codes: 0 accepted for all recipients, 1 failure, 2 usage error, 78 configuration error.")]
    Sms(Sms),
    /// Print shell completions
    #[command(after_help = "\
Examples:
  source <(handout completions bash)
  handout completions fish > ~/.config/fish/completions/handout.fish")]
    Completions {
        /// Shell to generate completions for
        shell: Shell,
    },
}

/// The option that names the configuration file.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// Configuration file [default: /etc/handout/handout.toml]
    #[arg(long, value_name = "FILE", env = "HANDOUT_CONFIG")]
    pub config: Option<PathBuf>,
}

/// Arguments of `handout check`.
#[derive(Debug, Args)]
pub struct Check {
    /// The configuration file.
    #[command(flatten)]
    pub config: ConfigFile,
    /// Also connect to the server of every channel, with login and recipients of mail; send nothing
    #[arg(long)]
    pub connect: bool,
}

/// Arguments of `handout reload`.
#[derive(Debug, Args)]
pub struct Reload {
    /// Control socket [default: /run/handout/control]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Maximum time to wait for the outcome
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = values::duration)]
    pub timeout: Duration,
    /// Print errors only
    #[arg(short, long)]
    pub quiet: bool,
}

/// Arguments of `handout mail`.
#[derive(Debug, Args)]
pub struct Mail {
    /// The configuration file.
    #[command(flatten)]
    pub config: ConfigFile,
    /// Channel: NAME of a table [mail.NAME]
    pub name: String,
    /// Subject line
    #[arg(short, long, value_name = "SUBJECT")]
    pub subject: String,
    /// Send to this address instead of the configured ones
    #[arg(long, value_name = "ADDRESS")]
    pub to: Vec<String>,
    /// Attach this file
    #[arg(short, long, value_name = "FILE")]
    pub attach: Vec<PathBuf>,
    /// Print the mail instead of sending it
    #[arg(long)]
    pub dry_run: bool,
    /// Text; if absent or -, read from standard input
    pub text: Option<String>,
}

/// Arguments of `handout sms`.
#[derive(Debug, Args)]
pub struct Sms {
    /// The configuration file.
    #[command(flatten)]
    pub config: ConfigFile,
    /// Channel: NAME of a table [sms.NAME]
    pub name: String,
    /// Send to this number instead of the configured ones
    #[arg(long, value_name = "NUMBER")]
    pub to: Vec<String>,
    /// Print the request, without secrets, instead of sending it
    #[arg(long)]
    pub dry_run: bool,
    /// Text; if absent or -, read from standard input
    pub text: Option<String>,
}

/// Arguments of `handout serve`.
#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    config: ConfigFile,
    /// Serve the time on this address: HOST:PORT, udp:HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    time: Vec<String>,
    /// Serve this file, or the files of this folder, on this address: HOST:PORT=PATH
    #[arg(long, value_name = "ADDR=PATH", value_parser = address_and_path)]
    file: Vec<(String, String)>,
    /// Create the control socket at this path [default: /run/handout/control, if possible]
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
}

/// Arguments of `handout time`.
#[derive(Debug, Args)]
pub struct Time {
    /// Time service; an IPv6 address with a port needs brackets [default port: 6789]
    #[arg(value_name = "HOST[:PORT]")]
    server: HostPort,
    /// Also print the clock offset of the server, its error bound and the round-trip time
    #[arg(long)]
    pub offset: bool,
    /// Use the binary protocol of RFC 868
    #[arg(long)]
    rfc868: bool,
    /// Use UDP instead of TCP
    #[arg(long)]
    udp: bool,
    /// Time zone of a reply without one: local, UTC or a name such as Asia/Shanghai
    /// [default: local]
    #[arg(long, value_name = "ZONE", value_parser = find_zone)]
    timezone: Option<TimeZone>,
    /// Maximum time for the whole query
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = values::duration)]
    timeout: Duration,
}

impl Time {
    /// Returns the request for the client.
    pub fn request(&self) -> TimeRequest {
        let Self { server, udp, rfc868, timeout, .. } = self;
        TimeRequest { server: server.clone(), udp: *udp, rfc868: *rfc868, timeout: *timeout }
    }

    /// Returns the time zone of a reply without one. The local zone is looked up only on demand:
    /// a machine without one, as in an initramfs, can still query the time.
    ///
    /// # Errors
    /// If the local zone is needed and unknown.
    pub fn timezone(&self) -> Result<TimeZone, String> {
        self.timezone.clone().map_or_else(|| find_zone("local"), Ok)
    }
}

/// Arguments of `handout fetch`.
#[derive(Debug, Args)]
pub struct Fetch {
    /// File service; an IPv6 address with a port needs brackets [default port: 5566]
    #[arg(value_name = "HOST[:PORT]")]
    server: HostPort,
    /// Files of a folder service [default: the single file of a file service]
    #[arg(value_name = "NAME", conflicts_with = "all")]
    names: Vec<String>,
    /// Fetch all files of a folder service, with subfolders
    #[arg(long)]
    all: bool,
    /// List the files of a folder service: size, modification time, name
    #[arg(long, conflicts_with_all = ["names", "all", "output", "force"])]
    pub list: bool,
    /// Save to this file or folder, or to standard output (-); devices and FIFOs are written to,
    /// sockets are refused
    #[arg(short, long, value_name = "PATH")]
    output: Option<PathBuf>,
    /// Replace existing files
    #[arg(long)]
    force: bool,
    /// Maximum size of a file
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = values::size)]
    max_size: u64,
    /// Maximum time for the whole fetch
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = values::duration)]
    timeout: Duration,
    /// Maximum time without data from the service
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    idle_timeout: Duration,
    /// Print errors only
    #[arg(short, long)]
    pub quiet: bool,
}

/// Arguments of `handout download`.
#[derive(Debug, Args)]
pub struct Download {
    /// URLs of files, saved under the last segment of their path; with --list, URL of the listing
    #[arg(value_name = "URL", required = true)]
    pub urls: Vec<String>,
    /// Save into this folder
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub output: PathBuf,
    /// Download the entries of a JSON listing: JSON pointer to its array ("" for the document)
    #[arg(long, value_name = "POINTER", requires = "url")]
    pub list: Option<String>,
    /// JSON pointer to the URL in an entry ("" for the whole entry)
    #[arg(long, value_name = "POINTER", requires = "list")]
    pub url: Option<String>,
    /// JSON pointer to the file name in an entry [default: last segment of the URL's path]
    #[arg(long, value_name = "POINTER", requires = "list")]
    pub filename: Option<String>,
    /// JSON pointer to the SHA-256 digest in an entry, which the file must match
    #[arg(long, value_name = "POINTER", requires = "list")]
    pub sha256: Option<String>,
    /// Number of simultaneous downloads
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub jobs: u32,
    /// Replace existing files
    #[arg(long)]
    pub force: bool,
    /// Replace existing files that have changed on the server; their validators are kept in a
    /// hidden file in the same folder
    #[arg(long)]
    pub update: bool,
    /// Maximum size of a file
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = values::size)]
    pub max_size: u64,
    /// Maximum time without data from a server
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = values::duration)]
    pub timeout: Duration,
    /// Maximum time for a file, including retries
    #[arg(long, value_name = "DURATION", default_value = "1h", value_parser = values::duration)]
    pub max_duration: Duration,
    /// Maximum number of retries of a file after transient failures
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub retries: u32,
    /// Send this header to the servers of the URLs only; @FILE reads headers from a file, which
    /// keeps secrets out of the process list
    #[arg(long = "header", value_name = "NAME: VALUE")]
    pub headers: Vec<String>,
    /// Also trust these certificates (PEM): issuers, or the server's own
    #[arg(long, value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// Use this proxy, and none from the environment; the proxy resolves names, so that only
    /// addresses in URLs are checked
    #[arg(long, value_name = "URL")]
    pub proxy: Option<String>,
    /// Print the files that would be requested, without requesting them
    #[arg(long)]
    pub dry_run: bool,
    /// Print errors only
    #[arg(short, long)]
    pub quiet: bool,
}

impl Fetch {
    /// Returns the parameters of the fetch.
    ///
    /// # Errors
    /// If several files are fetched and the output is not a folder.
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
            let problem =
                "several files need -o with an existing folder or a path that ends with /";
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

/// Whether a path names standard output.
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
        _ => Err("expected ADDR=PATH, such as 0.0.0.0:5566=picture.jpg".to_owned()),
    }
}

impl ConfigFile {
    /// Returns the path of the file, or the default path.
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
    /// Services on the command line need no file, but are added to those of a named file.
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
    fn passes_the_consistency_checks_of_clap() {
        Cli::command().debug_assert();
    }

    #[test]
    fn names_the_default_configuration_file_in_the_help() {
        let mut command = Cli::command();
        let help = command.find_subcommand_mut("check").unwrap().render_help().to_string();
        assert!(help.contains(DEFAULT_CONFIG));
    }

    #[test]
    fn splits_file_arguments_at_the_first_equals_sign() {
        let parsed = address_and_path("0.0.0.0:5566=a=b.jpg");
        assert_eq!(parsed, Ok(("0.0.0.0:5566".to_owned(), "a=b.jpg".to_owned())));
        for bad in ["", "a.jpg", "=a.jpg", "0.0.0.0:5566="] {
            assert!(address_and_path(bad).is_err(), "{bad}");
        }
    }
}
