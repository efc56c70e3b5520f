//! The manual pages, against what they are made from.

use std::fs;

use crate::common::{program, run};

/// A page as a reader sees it, but for its lay-out.
fn page(arguments: &[&str]) -> String {
    let output = run(program().arg("manual").args(arguments));
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    [(r"\-", "-"), (r"\(aq", "'"), (r"\(ga", "`"), (r"\(ti", "~"), (r"\fB", ""), (r"\fR", "")]
        .iter()
        .fold(text, |text, (escaped, sign)| text.replace(escaped, sign))
}

fn help(arguments: &[&str]) -> String {
    let output = run(program().args(arguments).arg("--help").env("COLUMNS", "1000"));
    String::from_utf8(output.stdout).unwrap()
}

/// The first word of each line of a list that --help has.
fn listed<'a>(help: &'a str, heading: &str) -> Vec<&'a str> {
    let list = help.split_once(heading).unwrap().1.split("\n\n").next().unwrap();
    list.lines().filter_map(|line| line.split_whitespace().next()).collect()
}

#[test]
fn the_page_of_the_commands_has_every_command_option_and_example() {
    let page = page(&[]);
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
    assert_eq!(page, self::page(&["handout"]));
}

#[test]
fn the_page_of_the_configuration_has_it_as_it_is_shipped() {
    let page = page(&["handout.toml"]);
    assert!(page.starts_with(".TH HANDOUT.TOML 5 "), "{page:.80}");
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config/handout.toml");
    assert!(page.contains(&fs::read_to_string(shipped).unwrap()), "{page}");
}

#[test]
fn a_page_that_is_not_there_is_wrong_usage() {
    assert_eq!(run(program().args(["manual", "picture"])).status.code(), Some(2));
}

#[test]
fn who_stops_reading_has_what_it_wants() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = program().arg("manual").stdout(writer).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}
