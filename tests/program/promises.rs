//! The page of promises names tests that are there, and what only the source can tell is so.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What stands between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether there is such a test: `module::tests::name` of the library, `program::module::name` of
/// this one, `script: name` of a script.
fn exists(name: &str) -> bool {
    let read = |path: PathBuf| fs::read_to_string(root().join(path)).unwrap_or_default();
    if let Some((script, name)) = name.split_once(": ") {
        let script = read(script.into());
        return script.contains(&format!("\n{name}() {{"))
            || script.contains(&format!("\nstep {name}\n"));
    }
    let parts: Vec<_> = name.split("::").collect();
    let (path, name) = match parts.as_slice() {
        ["program", module, name] => (format!("tests/program/{module}"), name),
        [modules @ .., "tests", name] => (format!("src/{}", modules.join("/")), name),
        _ => return false,
    };
    let source = read(format!("{path}.rs").into()) + &read(format!("{path}/mod.rs").into());
    // A test, and not a function of that name.
    source.match_indices(&format!("fn {name}(")).any(|(at, _)| {
        let before = source.get(..at).unwrap_or_default();
        let last = before.trim_end().trim_end_matches("async").trim_end();
        last.ends_with(']') && last.rsplit("\n\n").next().unwrap_or_default().contains("test")
    })
}

#[test]
fn every_promise_names_tests_that_there_are() {
    let page = fs::read_to_string(root().join("tests/README.md")).unwrap();
    let mut promises = 0;
    for row in page.lines().filter(|line| line.starts_with("| ")) {
        let cells: Vec<_> = row.split(" | ").collect();
        let [promise, tests] = cells.as_slice() else { panic!("{row}") };
        if *promise == "| promise" {
            continue;
        }
        promises += 1;
        let mut names = quoted(tests).peekable();
        assert!(names.peek().is_some(), "nothing pins: {promise}");
        for name in names {
            assert!(exists(name), "there is no test {name}, which should pin: {promise}");
        }
    }
    assert!(promises > 0);
}

#[test]
fn a_test_that_is_not_there_is_seen() {
    assert!(exists("program::promises::a_test_that_is_not_there_is_seen"));
    for name in [
        "program::promises::a_test_that_was_removed",
        "program::promises::exists",
        "program::gone::a_test_that_is_not_there_is_seen",
        "limits::tests::a_test_that_was_removed",
        "limits::a_network_has_no_bits_of_a_host",
        "tests/systemd/reload.sh: a_check_that_was_removed",
        "soak",
    ] {
        assert!(!exists(name), "{name}");
    }
}

/// The files of the library and the program, with what is in them.
fn sources() -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let source = fs::read_to_string(&path).unwrap();
                found.push((path.strip_prefix(root()).unwrap().to_owned(), source));
            }
        }
    }
    found
}

#[test]
fn unsafe_code_is_in_one_file_only() {
    let sources = sources();
    let with = |words: &str| -> Vec<_> {
        let files = sources.iter().filter(|(_, source)| source.contains(words));
        files.map(|(path, _)| path.to_str().unwrap()).collect()
    };
    assert_eq!(with("allow(unsafe_code"), ["src/sys.rs"]);
    assert_eq!(with("unsafe {"), ["src/sys.rs"]);
    assert_eq!(with("deny(unsafe_code"), ["src/lib.rs"]);
    assert_eq!(with("forbid(unsafe_code"), ["src/main.rs"]);
}

#[test]
fn the_core_names_no_library_of_what_is_done_to_the_outside() {
    for (path, source) in sources() {
        let outside = [
            "src/http",
            "src/notify",
            "src/mirror",
            "src/alert",
            "src/cli/download.rs",
            "src/cli/send.rs",
        ];
        if outside.iter().any(|outside| path.starts_with(outside)) {
            continue;
        }
        for library in ["reqwest", "mail_builder", "rustls", "flate2", "httpdate"] {
            let named = |line: &str| line.contains(library) && !line.trim_start().starts_with("//");
            assert!(!source.lines().any(named), "{} names {library}", path.display());
        }
    }
}
