//! The manual pages of examples/man.rs against their sources.

use std::fs;
use std::process::Command;

use crate::common::{program, run};

/// Returns a generated page without roff escapes.
fn page(name: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["run", "--quiet", "--locked", "--offline", "--example", "man"]);
    if cfg!(not(feature = "gateway")) {
        command.arg("--no-default-features");
    }
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("--").arg(folder.path());
    let output = run(&mut command);
    assert!(output.status.success(), "{output:?}");
    let text = fs::read_to_string(folder.path().join(name)).unwrap();
    [(r"\-", "-"), (r"\(aq", "'"), (r"\(ga", "`"), (r"\(ti", "~"), (r"\fB", ""), (r"\fR", "")]
        .iter()
        .fold(text, |text, (escaped, sign)| text.replace(escaped, sign))
}

fn help(arguments: &[&str]) -> String {
    let output = run(program().args(arguments).arg("--help").env("COLUMNS", "1000"));
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the first words of a list in --help.
fn listed<'a>(help: &'a str, heading: &str) -> Vec<&'a str> {
    let list = help.split_once(heading).unwrap().1.split("\n\n").next().unwrap();
    list.lines().filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn describes_every_command_option_and_example() {
    let page = page("handout.1");
    assert!(page.starts_with(".TH HANDOUT 1 "), "{page:.80}");
    let whole = help(&[]);
    let commands = listed(&whole, "Commands:\n");
    assert!(commands.len() > 5, "{commands:?}");
    for command in commands {
        if command == "help" {
            continue;
        }
        let (_, section) = page.split_once(&format!(".SS \"handout {command}\"\n")).unwrap();
        let section = section.split("\n.S").next().unwrap();
        let help = help(&[command]);
        let options = help.lines().map(str::trim).filter(|line| line.starts_with('-'));
        for name in options.flat_map(str::split_whitespace).filter(|word| word.starts_with("--")) {
            assert!(name == "--help" || section.contains(name), "{command} {name}: {section}");
        }
        let (_, examples) = help.split_once("Examples:\n").unwrap();
        for line in examples.lines() {
            assert!(section.contains(line), "{line}: {section}");
        }
    }
    for name in ["--help", "--version", "SIGHUP", "HANDOUT_CONFIG", "/etc/handout/handout.toml"] {
        assert!(page.contains(name), "{name}: {page}");
    }
}

#[test]
fn contains_the_shipped_configuration() {
    let page = page("handout.toml.5");
    assert!(page.starts_with(".TH HANDOUT.TOML 5 "), "{page:.80}");
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config/handout.toml");
    assert!(page.contains(&fs::read_to_string(shipped).unwrap()), "{page}");
}
