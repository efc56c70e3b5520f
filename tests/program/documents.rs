//! The shipped examples and those in the documents are valid.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use crate::common::{Daemon, PROGRAM, decode, program, read_all, run};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn examples() -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join("config")).unwrap().map(|entry| entry.unwrap().path());
    let examples: Vec<_> =
        entries.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
    assert!(!examples.is_empty());
    examples
}

fn check(path: &Path) -> (Option<i32>, String) {
    let output = run(program().args(["check", "--config"]).arg(path).env("TZ", "UTC"));
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn accepts_every_shipped_example() {
    for example in examples() {
        assert_eq!(check(&example), (Some(0), String::new()), "{example:?}");
    }
}

#[test]
fn refuses_an_unknown_key_in_any_table_of_the_shipped_examples() {
    for example in examples() {
        let text = fs::read_to_string(&example).unwrap();
        let folder = tempfile::tempdir().unwrap();
        for entry in fs::read_dir(root().join("config")).unwrap() {
            let path = entry.unwrap().path();
            symlink(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        let lines: Vec<_> = text.lines().collect();
        let headers = (0..lines.len()).filter(|line| lines[*line].starts_with('['));
        let mut tried = 0;
        // Before the first table, and after every header.
        for place in std::iter::once(0).chain(headers.map(|line| line + 1)) {
            let mut with_junk = lines.clone();
            with_junk.insert(place, "junk-key = 1");
            let path = folder.path().join("with-junk.toml");
            fs::write(&path, with_junk.join("\n")).unwrap();
            let (code, message) = check(&path);
            assert_eq!(code, Some(78), "{example:?} line {place}");
            let expected = format!(":{}: ", place + 1);
            assert!(message.contains(&expected) && message.contains("junk-key"), "{message}");
            tried += 1;
        }
        let tables = 1 + count_tables(DeTable::parse(&text).unwrap().get_ref());
        assert_eq!(tried, tables, "{example:?}: a table was not found by its header");
    }
}

/// The number of tables below one that have keys, and therefore a header.
fn count_tables(table: &DeTable<'_>) -> usize {
    let below = table.iter().map(|(_, value)| match value.get_ref() {
        DeValue::Table(table) => {
            let own = table.iter().any(|(_, value)| !value.get_ref().is_table());
            usize::from(own) + count_tables(table)
        }
        _ => 0,
    });
    below.sum()
}

#[test]
fn serves_the_time_and_the_picture_of_the_shipped_configuration() {
    let text = fs::read_to_string(root().join("config/handout.toml")).unwrap();
    let picture = fs::read(root().join("config/picture.jpg")).unwrap();
    let text = text.replace(":6789", ":0").replace(":5566", ":0");
    let text = text.replace("format = \"auto\"", "format = \"json\"");
    let daemon = Daemon::start_with(&text, &[("picture.jpg", &picture)], |_| {});
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    let document = read_all(daemon.tcp("file.picture"));
    assert_eq!(decode(&document), ("picture.jpg".to_owned(), picture));
}

#[test]
fn states_the_defaults_in_the_shipped_configuration() {
    // Each key of [log], [daemon] and [limits] has its default in the file.
    let folder = tempfile::tempdir().unwrap();
    let load = |text: &str| {
        let file = folder.path().join("handout.toml");
        fs::write(&file, text).unwrap();
        fs::copy(root().join("config/picture.jpg"), folder.path().join("picture.jpg")).unwrap();
        let sources = handout::internals::Sources { file: Some(file), ..Default::default() };
        handout::internals::Config::load(&sources).unwrap()
    };
    let shipped = load(&fs::read_to_string(root().join("config/handout.toml")).unwrap());
    let bare = load(
        "[time.clock]\nlisten = [\"127.0.0.1:6789\", \"udp:127.0.0.1:6789\"]\n\
         [file.picture]\npath = \"picture.jpg\"\n[metrics]",
    );
    assert_eq!(shipped, bare);
}

#[test]
fn accepts_every_configuration_in_the_readme() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for file in ["picture.jpg", "mail.password", "sms.password"] {
        fs::write(folder.path().join(file), "x").unwrap();
    }
    fs::create_dir(folder.path().join("files")).unwrap();
    let blocks: Vec<_> = readme
        .split("```toml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap().replace("/srv/", ""))
        .collect();
    assert!(!blocks.is_empty());
    // A build without the gateway accepts the rest.
    let mirrors = |block: &&String| cfg!(feature = "gateway") || !block.contains("[mirror.");
    let alerts = |block: &&String| cfg!(feature = "gateway") || !block.contains("[alert]");
    for block in blocks.iter().filter(mirrors).filter(alerts) {
        let path = folder.path().join("handout.toml");
        fs::write(&path, block).unwrap();
        assert_eq!(check(&path), (Some(0), String::new()), "{block}");
    }
}

#[test]
fn resolves_every_link_in_the_documents() {
    for document in ["README.md", "CHANGELOG.md", "DEPENDENCIES.md", "SECURITY.md"] {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for link in text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap();
            if !target.is_empty() && !target.contains("://") {
                assert!(root().join(target).exists(), "{document}: {target}");
            }
        }
    }
}

#[test]
fn generates_completions_for_the_common_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(std::process::Command::new(PROGRAM).args(["completions", shell]));
        assert!(output.status.success());
        assert!(String::from_utf8(output.stdout).unwrap().contains("completions"));
    }
}

#[test]
fn serves_the_time_and_a_file_from_arguments_alone() {
    let picture = root().join("config/picture.jpg");
    let mut command = program();
    command.args(["serve", "--time", "127.0.0.1:0", "--file"]);
    command.arg(format!("127.0.0.1:0={}", picture.display()));
    let mut child = command.env("TZ", "UTC").stderr(std::process::Stdio::piped()).spawn().unwrap();
    let stderr = child.stderr.take().unwrap();
    let mut addresses = Vec::new();
    for line in std::io::BufRead::lines(std::io::BufReader::new(stderr)) {
        let line = line.unwrap();
        if let Some((_, address)) = line.split_once("address=") {
            addresses.push(address.parse().unwrap());
        }
        if line.contains("ready: ") {
            break;
        }
    }
    let time = read_all(addresses[0]);
    let document = read_all(addresses[1]);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(time.len(), 27);
    assert_eq!(decode(&document), ("picture.jpg".to_owned(), fs::read(picture).unwrap()));
}
