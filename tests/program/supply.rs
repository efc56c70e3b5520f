//! What handout is built of: no more than is justified, with no newer compiler than is said.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::run;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// What cargo prints about this project, as it is locked.
fn cargo(arguments: &[&str]) -> String {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).args(["--locked", "--offline"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = run(&mut cargo);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Cargo.toml, as cargo reads it.
fn manifest() -> Value {
    let all = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    serde_json::from_str::<Value>(&all).unwrap()["packages"][0].take()
}

/// The crates in a chapter of the page of dependencies.
fn justified(chapter: &str) -> BTreeSet<String> {
    let page = read("DEPENDENCIES.md");
    let (_, chapter) = page.split_once(&format!("\n## {chapter}\n")).unwrap();
    let chapter = chapter.split("\n## ").next().unwrap();
    let rows = chapter.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split('`').next().unwrap().to_owned()).collect()
}

#[test]
fn justifies_every_direct_dependency() {
    let manifest = manifest();
    let named = |optional: bool| -> BTreeSet<String> {
        let all = manifest["dependencies"].as_array().unwrap().iter();
        let normal = all.filter(|one| one["kind"].is_null() && one["optional"] == optional);
        normal.map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(justified("The core"), named(false));
    assert_eq!(justified("The gateway"), named(true));
}

/// How many crates are built for Linux, but for handout itself.
fn crates(features: &[&str]) -> usize {
    let tree = ["tree", "--edges", "normal", "--prefix", "none", "--no-dedupe"];
    let linux = ["--target", "x86_64-unknown-linux-gnu"];
    let all = cargo(&[&tree[..], &linux, features].concat());
    let crates: BTreeSet<_> =
        all.lines().map(|line| line.trim_end_matches(" (proc-macro)")).collect();
    assert!(crates.iter().any(|name| name.starts_with("handout v")), "{crates:?}");
    crates.len() - 1
}

#[test]
fn there_are_no_more_crates_than_were_agreed_on() {
    let page = read("DEPENDENCIES.md");
    let agreed: Vec<usize> =
        page.split("**").skip(1).step_by(2).map(|number| number.parse().unwrap()).collect();
    // A number that is too high is no bound.
    assert_eq!([crates(&["--no-default-features"]), crates(&[])], *agreed);
}

#[test]
fn the_minimum_of_rust_is_said_once() {
    let minimum = manifest()["rust_version"].as_str().unwrap().to_owned();
    assert!(read("README.md").contains(&format!("Rust toolchain ({minimum} or newer)")));
    // What is built here is built with that or a newer one, or cargo would have refused to.
    assert!(read(".ci/run").contains("rust-version"), "nothing tries whether it is enough");
}
