//! Dependencies and compiler: every crate is justified, their number is bounded.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::common::run;

fn read(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

/// Runs cargo on this project with the lock file.
fn cargo(arguments: &[&str]) -> String {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).args(["--locked", "--offline"]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let output = run(&mut cargo);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// Returns the manifest as JSON.
fn manifest() -> Value {
    let all = cargo(&["metadata", "--no-deps", "--format-version", "1"]);
    serde_json::from_str::<Value>(&all).unwrap()["packages"][0].take()
}

/// Returns the crates in a section of DEPENDENCIES.md.
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

/// Returns the number of crates for Linux without handout itself.
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
fn has_the_stated_number_of_crates() {
    let page = read("DEPENDENCIES.md");
    let agreed: Vec<usize> =
        page.split("**").skip(1).step_by(2).map(|number| number.parse().unwrap()).collect();
    // The stated numbers are exact, otherwise they would not be bounds.
    assert_eq!([crates(&["--no-default-features"]), crates(&[])], *agreed);
}

#[test]
fn states_the_rust_version_once() {
    let minimum = manifest()["rust_version"].as_str().unwrap().to_owned();
    assert!(read("README.md").contains(&format!("Rust toolchain ({minimum} or newer)")));
    // Cargo refuses to build with an older compiler.
    assert!(read(".ci/run").contains("rust-version"), "nothing tries whether it is enough");
}
