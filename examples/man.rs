//! Generates the manual pages: `handout.1` from the command line, `handout.toml.5` from the shipped
//! configuration.
//!
//! Usage: `cargo run --example man -- FOLDER`

use std::fs;
use std::io;
use std::path::Path;

use clap::builder::StyledStr;
use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use handout::cli::args::{Cli, DEFAULT_CONFIG};

const CONFIGURATION: &str = include_str!("../config/handout.toml");

const DESCRIPTION: &str = "\
handout serve is a daemon that serves the time and files over plain TCP to any client that can \
open a socket, such as nc(1) or telnet(1). The other commands check its configuration, reload it, and are \
clients for its services.";

const CONFIGURATION_DESCRIPTION: &str = "\
The configuration is written in TOML. Below is the shipped configuration: every key with its \
default and its meaning.";

const FILES: &[(&str, &str)] = &[
    (DEFAULT_CONFIG, "The default configuration file; see handout.toml(5)."),
    (
        ".handout-mirror.json",
        "In the folder of a mirror: the manifest of its files, so that only changed files are \
         transferred. It can be removed.",
    ),
    (
        ".handout-alerts.json",
        "In the state folder of the service, such as /var/lib/handout: the queue of alerts.",
    ),
    ("/run/handout/", "The folder for Unix sockets of the service."),
    ("/run/handout/control", "The socket of handout reload, for root and the user of the service."),
    ("/usr/share/doc/handout/", "The wire formats, and examples."),
];
const ENVIRONMENT: &[(&str, &str)] = &[
    ("HANDOUT_CONFIG", "The configuration file if --config is absent."),
    ("NO_COLOR", "If set and not empty, the log on a terminal has no colours."),
    ("TZ", "The local time zone."),
    (
        "NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS, JOURNAL_STREAM",
        "Set by systemd for handout serve; see systemd.exec(5).",
    ),
    (
        "RUNTIME_DIRECTORY",
        "Set by systemd (RuntimeDirectory=): the folder of the control socket [/run/handout].",
    ),
    ("STATE_DIRECTORY", "Set by systemd (StateDirectory=): the folder of the queue of alerts."),
    ("CREDENTIALS_DIRECTORY", "Set by systemd: the folder of the secrets from LoadCredential=."),
];
const SIGNALS: &[(&str, &str)] = &[
    (
        "SIGTERM, SIGINT",
        "handout serve closes its listeners at once. Connections that do not finish within the \
         configured grace are reset. Mirrors stop, and resume their downloads at the next start. \
         Due alerts are sent; the others stay in the queue. A second signal ends the daemon at \
         once. Clients end without leaving incomplete files, except for the hidden file from which \
         handout download resumes.",
    ),
    (
        "SIGHUP",
        "handout serve reloads its configuration. Unchanged services keep their sockets and \
         connections. If the configuration has a fault, nothing changes and the fault is logged. \
         handout reload does the same and waits for the outcome.",
    ),
];

fn main() -> io::Result<()> {
    let folder = std::env::args_os().nth(1).expect("the argument is a folder");
    let folder = Path::new(&folder);
    fs::write(folder.join("handout.1"), literal(&commands()?))?;
    fs::write(folder.join("handout.toml.5"), literal(&configuration()))
}

fn commands() -> io::Result<String> {
    // --help and -V are described once.
    let mut command = Cli::command()
        .disable_help_subcommand(true)
        .mut_subcommands(|command| command.disable_help_flag(true));
    command.build();

    let mut head = title("HANDOUT", "1");
    head.control("SH", ["NAME"]);
    head.text([roman(format!("handout - {}", text(command.get_about())))]);
    head.control("SH", ["SYNOPSIS"]).control("nf", []);
    for command in command.get_subcommands_mut() {
        let usage = command.render_usage().to_string();
        head.text([bold(usage.trim_start_matches("Usage: "))]);
    }
    head.control("fi", []);
    head.control("SH", ["DESCRIPTION"]);
    head.text([roman(DESCRIPTION)]);
    head.control("SH", ["OPTIONS"]);
    let mut page = head.to_roff() + &options(&command)?;

    page += ".SH COMMANDS\n";
    for command in command.get_subcommands() {
        let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
        let mut about = Roff::new();
        about.control("SS", [name]).text([roman(text(command.get_about()) + ".")]);
        let mut examples = Roff::new();
        paragraphs(&mut examples, &text(command.get_after_help()));
        page += &(about.to_roff() + &options(command)? + &examples.to_roff());
    }

    let mut tail = Roff::new();
    entries(&mut tail, "FILES", FILES);
    entries(&mut tail, "ENVIRONMENT", ENVIRONMENT);
    tail.control("SH", ["EXIT STATUS"]).text([roman(text(command.get_after_help()))]);
    entries(&mut tail, "SIGNALS", SIGNALS);
    tail.control("SH", ["SEE ALSO"]).text([roman("handout.toml(5), systemd.service(5)")]);
    Ok(page + &tail.to_roff())
}

fn configuration() -> String {
    let mut page = title("HANDOUT.TOML", "5");
    page.control("SH", ["NAME"]).text([roman("handout.toml - the configuration of handout(1)")]);
    page.control("SH", ["DESCRIPTION"]).text([roman(CONFIGURATION_DESCRIPTION)]);
    page.control("SH", ["THE FILE"]);
    // Without indentation, because the lines are long.
    page.control("in", ["0"]);
    example(&mut page, CONFIGURATION.lines());
    page.control("SH", ["SEE ALSO"]).text([roman("handout(1)")]);
    page.to_roff()
}

/// Returns a page with its title, without a date, so that builds are reproducible.
fn title(name: &str, section: &str) -> Roff {
    let mut roff = Roff::new();
    let source = concat!("handout ", env!("CARGO_PKG_VERSION"));
    roff.control("TH", [name, section, "\"\"", source]);
    roff
}

/// Returns the options of a command without the heading.
fn options(command: &Command) -> io::Result<String> {
    let mut section = Vec::new();
    Man::new(command.clone()).render_options_section(&mut section)?;
    let section = String::from_utf8_lossy(&section);
    let options = section.split_once(".SH OPTIONS\n").map(|(_, options)| options);
    Ok(options.unwrap_or_default().to_owned())
}

/// Adds a section of terms with descriptions.
fn entries(roff: &mut Roff, section: &str, entries: &[(&str, &str)]) {
    roff.control("SH", [section]);
    for (term, meaning) in entries {
        roff.control("TP", []).text([bold(*term)]).text([roman(*meaning)]);
    }
}

/// Adds a text of --help, whose indented lines are examples.
fn paragraphs(roff: &mut Roff, text: &str) {
    let lines: Vec<_> = text.lines().filter(|line| !line.is_empty()).collect();
    for block in lines.chunk_by(|a, b| a.starts_with(' ') == b.starts_with(' ')) {
        if block.iter().all(|line| line.starts_with(' ')) {
            example(roff, block.iter().copied());
        } else {
            for line in block {
                roff.control("PP", []).text([roman(*line)]);
            }
        }
    }
}

/// Adds lines verbatim, as an example.
fn example<'a>(roff: &mut Roff, lines: impl Iterator<Item = &'a str>) {
    roff.control("EX", []);
    for line in lines {
        roff.text([roman(line)]);
    }
    roff.control("EE", []);
}

fn text(text: Option<&StyledStr>) -> String {
    text.map(ToString::to_string).unwrap_or_default()
}

/// Escapes characters that roff replaces by typographic ones.
fn literal(page: &str) -> String {
    // The first is the apostrophe as written by the roff crate.
    [(r"\*(Aq", r"\(aq"), ("'", r"\(aq"), ("`", r"\(ga"), ("^", r"\(ha"), ("~", r"\(ti")]
        .iter()
        .fold(page.to_owned(), |page, (sign, escaped)| page.replace(sign, escaped))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_prose_and_keeps_examples() {
        let mut roff = Roff::new();
        paragraphs(&mut roff, "Examples:\n  a  b\n  .c\n\nThe end.");
        let expected = ".PP\nExamples:\n.EX\n  a  b\n  .c\n.EE\n.PP\nThe end.\n";
        assert_eq!(roff.to_roff(), expected);
    }

    #[test]
    fn escapes_characters_of_roff() {
        let mut roff = Roff::new();
        example(&mut roff, ["'a' `b` ~/c^d", "\\n-e", ".f", ""].into_iter());
        let expected = r".EX
\&\(aqa\(aq \(gab\(ga \(ti/c\(had
\\n\-e
\&.f

.EE
";
        assert_eq!(literal(&roff.to_roff()), expected);
    }
}
