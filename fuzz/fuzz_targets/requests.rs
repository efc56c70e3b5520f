//! Requests to a folder: each line gives one reply, in order, however the lines are cut. Who asks the
//! file system itself knows what the reply has to be.
//!
//! Input: how it is cut, in one byte, and what a client sends.
#![no_main]

use std::fs;
use std::num::NonZeroU32;
use std::os::unix::fs::symlink;
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, LazyLock};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use handout::internals::{Folder, FolderService, FolderSettings as Settings, MAX_NAME};
use handout_fuzz::{answered, folder, pieces};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What is there for whoever asks for the list.
const LISTED: [&str; 7] = ["a", "big", "empty", "in", "s/b", "s/in", "é x"];

/// The folder, as its path is without links.
static ROOT: LazyLock<PathBuf> = LazyLock::new(|| {
    let root = folder().join("root");
    fs::create_dir_all(root.join("s/.h")).unwrap();
    fs::create_dir_all(root.join(".d")).unwrap();
    let big: Vec<u8> = (0..=255).cycle().take(4000).collect();
    for (name, data) in [
        ("../secret", &b"?"[..]),
        ("a", b"hello"),
        ("big", &big),
        ("empty", b""),
        ("s/b", b"\0\xff"),
        ("é x", b"x"),
        (".d/x", b"hidden, but not for links"),
        ("s/.h/x", b"hidden"),
        (".x", b"hidden"),
    ] {
        fs::write(root.join(name), data).unwrap();
    }
    for (name, to) in [
        ("in", ".d/x"),
        ("s/in", "../a"),
        ("s/out", "../../secret"),
        ("out", "/etc/passwd"),
        ("up", ".."),
        ("t", "s"),
        ("round", "round"),
    ] {
        symlink(to, root.join(name)).unwrap();
    }
    root.canonicalize().unwrap()
});

/// A service that keeps small files and encodes the large one as it is sent.
static SERVICE: LazyLock<Arc<FolderService>> = LazyLock::new(|| {
    let folder = Folder::open(&ROOT).unwrap();
    let settings = Settings { folder, cache_limit: 8000, max_files: NonZeroU32::new(100).unwrap() };
    Arc::new(FolderService::new("file.fuzzed".into(), settings))
});

/// The content of what a name stands for, if that may be handed out.
fn content(name: &str) -> Option<Vec<u8>> {
    let path = Path::new(name);
    let is_visible = |component: Component<'_>| matches!(component, Component::Normal(part) if !part.as_encoded_bytes().starts_with(b"."));
    // Components are the same for "a//b", "a/./b" and "a/b/"; only one of them is the name.
    let is_plain = path.components().collect::<PathBuf>().as_os_str() == name;
    if !is_plain || !path.components().all(is_visible) {
        return None;
    }
    let real = ROOT.join(path).canonicalize().ok()?;
    (real.starts_with(&*ROOT) && real.is_file()).then(|| fs::read(real).unwrap())
}

/// Checks the reply to a line.
fn check(line: &[u8], reply: &Value) {
    if line.is_empty() {
        let files = reply["files"].as_array().unwrap();
        assert!(files.iter().map(|file| file["filename"].as_str().unwrap()).eq(LISTED), "{reply}");
        for file in files {
            let length = content(file["filename"].as_str().unwrap()).unwrap().len();
            assert_eq!(file["size"], length, "{reply}");
        }
        return;
    }
    let Ok(name) = str::from_utf8(line) else {
        let name = String::from_utf8_lossy(line);
        return assert_eq!(*reply, json!({"error": "the name is not UTF-8", "filename": name}));
    };
    let Some(content) = content(name) else {
        return assert_eq!(*reply, json!({"error": "no such file", "filename": name}));
    };
    assert_eq!(reply["filename"], name);
    assert_eq!(reply["size"], content.len());
    assert_eq!(reply["filedata"], BASE64_STANDARD.encode(&content));
    let digest = Sha256::digest(&content).into_iter().map(|byte| format!("{byte:02x}"));
    assert_eq!(reply["sha256"], digest.collect::<String>());
}

fuzz_target!(|input: &[u8]| {
    let Some((how, input)) = input.split_first() else { return };
    let ask =
        |pieces: Vec<&[u8]>| answered(pieces, async |connection| SERVICE.answer(connection).await);
    let heard = ask(vec![input]);
    assert!(heard == ask(pieces(*how, input).collect()), "cutting it makes a difference");

    let mut replies = serde_json::Deserializer::from_slice(&heard).into_iter::<Value>();
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let reply = replies.next().unwrap().unwrap();
        if line.len() > MAX_NAME {
            assert_eq!(reply, json!({"error": "a request is longer than 4096 bytes"}));
            break;
        }
        check(line.strip_suffix(b"\r").unwrap_or(line), &reply);
    }
    assert!(replies.next().is_none());
    let count = heard.iter().filter(|byte| **byte == b'\n').count();
    assert_eq!(count, serde_json::Deserializer::from_slice(&heard).into_iter::<Value>().count());
});
