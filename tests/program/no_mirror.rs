//! A build without the feature `mirror` says so wherever somebody wants a mirror or a download.

use std::fs;

use crate::common::{Daemon, program, run};

#[test]
fn a_download_says_that_this_build_lacks_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program();
    let output =
        run(command.args(["download", "https://example.org/a.txt"]).current_dir(folder.path()));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("download") && said.contains("feature `mirror`"), "{said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn a_mirror_in_the_configuration_is_a_fault_that_says_that_this_build_lacks_it() {
    let mirror = "[mirror.a]\nurls = [\"https://example.org/a\"]\ninto = \"a\"\n";
    let said = Daemon::try_start(mirror).unwrap_err();
    assert!(said.contains("mirror.a") && said.contains("feature `mirror`"), "{said}");
}
