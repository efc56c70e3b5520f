//! The source tree is as docs/architecture.md describes it.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn document() -> String {
    fs::read_to_string(root().join("docs/architecture.md")).unwrap()
}

/// Returns the rank of each module in the document; the lowest layer has the highest rank.
fn ranks(document: &str) -> HashMap<&str, usize> {
    let (_, layers) = document.split_once("```layers\n").unwrap();
    let (layers, _) = layers.split_once("```").unwrap();
    let rows = layers.lines().enumerate();
    rows.flat_map(|(rank, row)| row.split_whitespace().map(move |name| (name, rank))).collect()
}

/// Returns the sources by their path below src/, without unit tests, which end each file.
fn sources() -> Vec<(PathBuf, String)> {
    let src = root().join("src");
    let mut found = Vec::new();
    let mut folders = vec![src.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            if path.file_name().is_some_and(|name| name == "tests.rs") {
                continue;
            }
            let source = fs::read_to_string(&path).unwrap();
            let (code, _) = source.split_once("mod tests {").unwrap_or((&source, ""));
            found.push((path.strip_prefix(&src).unwrap().to_owned(), code.to_owned()));
        }
    }
    found
}

/// Returns the imports of `module` that are not from a lower layer.
fn upward<'a>(ranks: &HashMap<&str, usize>, module: &str, source: &'a str) -> Vec<&'a str> {
    let code = source.lines().filter(|line| !line.trim_start().starts_with("//"));
    let paths = code.flat_map(|line| line.split("crate::").skip(1));
    let names =
        paths.filter_map(|path| path.split(|c: char| !c.is_alphanumeric() && c != '_').next());
    let own = ranks[module];
    let is_upward =
        |name: &&str| *name != module && ranks.get(name).is_none_or(|rank| *rank <= own);
    names.filter(is_upward).collect()
}

#[test]
fn modules_import_only_from_lower_layers() {
    let document = document();
    let ranks = ranks(&document);
    for (path, source) in sources() {
        let first = path.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.trim_end_matches(".rs");
        if module == "lib" {
            continue;
        }
        assert!(ranks.contains_key(module), "{module} is in no layer");
        let upward = upward(&ranks, module, &source);
        assert!(upward.is_empty(), "{} imports from {upward:?}", path.display());
    }
}

#[test]
fn an_upward_import_is_detected() {
    let document = document();
    let ranks = ranks(&document);
    let source =
        "use crate::daemon::Daemon;\nuse crate::text::counted;\n// crate::cli\ncrate::gone::x();";
    assert_eq!(upward(&ranks, "net", source), ["daemon", "gone"]);
    assert_eq!(upward(&ranks, "cli", source), ["gone"]);
}

#[test]
fn files_are_short() {
    for (path, source) in sources() {
        let lines = source.lines().count();
        assert!(lines <= 450, "{}: {lines} lines without tests, at most 450", path.display());
    }
}

/// Whether `word` follows `before` somewhere.
fn has_word(source: &str, before: &str, word: &str) -> bool {
    source.match_indices(&format!("{before}{word}")).any(|(at, found)| {
        !source[at + found.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_')
    })
}

/// Whether a source implements a type or declares a trait.
fn has_impl(source: &str, owner: &str) -> bool {
    let mut blocks =
        source.lines().filter(|line| line.starts_with("impl") || line.contains("trait "));
    blocks.any(|line| has_word(line, "", owner))
}

#[test]
fn names_in_the_document_exist() {
    let document = document();
    let (_, paths) = document.split_once("## An accepted connection").unwrap();
    let sources = sources();
    let mut checked = 0;
    for name in paths.split('`').skip(1).step_by(2) {
        let is_path = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        let is_name = name.contains('_') || name.contains("::");
        if !is_name || !name.chars().all(is_path) {
            continue;
        }
        let (owner, function) = name.rsplit_once("::").unwrap_or(("", name));
        let exists = sources.iter().any(|(path, source)| {
            has_word(source, "fn ", function)
                && (owner.is_empty()
                    || path.file_stem().unwrap() == owner
                    || has_impl(source, owner))
        });
        assert!(exists, "{name} does not exist");
        checked += 1;
    }
    assert!(checked > 20, "{checked} names");
}
