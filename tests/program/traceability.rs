//! Every promise in tests/README.md names existing tests, and properties of the source hold.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the texts between backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Returns whether a test exists: `module::tests::name` (unit test), `program::module::name` or
/// `script: name`.
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
    let sources = [".rs", "/mod.rs", "/tests.rs"].map(|end| read(format!("{path}{end}").into()));
    let source = sources.concat();
    // A test, not a helper function.
    source.match_indices(&format!("fn {name}(")).any(|(at, _)| {
        let before = source.get(..at).unwrap_or_default();
        let last = before.trim_end().trim_end_matches("async").trim_end();
        last.ends_with(']') && last.rsplit("\n\n").next().unwrap_or_default().contains("test")
    })
}

#[test]
fn every_promise_names_existing_tests() {
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
fn a_missing_test_is_detected() {
    assert!(exists("program::traceability::a_missing_test_is_detected"));
    for name in [
        "program::traceability::a_test_that_was_removed",
        "program::traceability::exists",
        "program::gone::a_missing_test_is_detected",
        "limits::tests::a_test_that_was_removed",
        "limits::a_network_has_no_bits_of_a_host",
        "tests/systemd/reload.sh: a_check_that_was_removed",
        "soak",
    ] {
        assert!(!exists(name), "{name}");
    }
}

/// Returns the paths and the content of all source files.
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
fn core_uses_no_library_of_the_gateway() {
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
