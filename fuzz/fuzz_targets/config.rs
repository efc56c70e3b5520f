//! Configuration files: no input panics, every diagnostic names a line of the file in one line, and
//! a second load has the same result.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use handout::internals::{Config, Position, Sources};
use handout_fuzz::{folder, is_one_line};
use libfuzzer_sys::fuzz_target;

/// The file, in a folder with a file and a folder that it can name.
static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    fs::create_dir(folder().join("d")).unwrap();
    fs::write(folder().join("f"), "a file, and a password").unwrap();
    folder().join("handout.toml")
});

fuzz_target!(|text: &[u8]| {
    fs::write(&*FILE, text).unwrap();
    let sources = Sources { file: Some(FILE.clone()), ..Sources::default() };
    let read = Config::load(&sources);
    assert_eq!(read, Config::load(&sources));
    let Err(faults) = read else { return };
    assert!(!faults.0.is_empty());
    let lines = 1 + text.iter().filter(|byte| **byte == b'\n').count();
    for fault in &faults.0 {
        match &fault.position {
            Position::Line(_, line) => assert!((1..=lines).contains(line), "{fault}"),
            Position::File(_) => assert!(fault.key.is_empty(), "{fault}"),
            Position::Argument(_) => panic!("{fault}"),
        }
        assert!(is_one_line(&fault.to_string()), "{fault:?}");
    }
});
