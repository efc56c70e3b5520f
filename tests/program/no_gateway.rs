//! Without the feature `gateway`, every use of mirrors, downloads and alerts is refused with the
//! reason.

use std::fs;

use crate::common::{Daemon, program, run};

#[test]
fn mail_and_sms_name_the_missing_feature() {
    for arguments in [&["mail", "ops", "--subject", "Test", "text"][..], &["sms", "ops", "text"]] {
        let output = run(program().args(arguments));
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains(arguments[0]) && said.contains("feature `gateway`"), "{said}");
    }
}

#[test]
fn configured_channels_name_the_missing_feature() {
    for (table, keys) in [
        ("mail.ops", "server = \"127.0.0.1:25\""),
        ("sms.ops", "provider = \"ihuyi\""),
        ("alert", "to = [\"mail.ops\"]"),
    ] {
        let said = Daemon::try_start(&format!("[{table}]\n{keys}\n")).unwrap_err();
        assert!(said.contains(table) && said.contains("feature `gateway`"), "{said}");
    }
}

#[test]
fn check_connect_names_the_missing_feature() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("handout.toml");
    fs::write(&config, "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n").unwrap();
    let output = run(program().args(["check", "--connect", "--config"]).arg(config));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(String::from_utf8(output.stderr).unwrap().contains("feature `gateway`"));
}

#[test]
fn download_names_the_missing_feature() {
    let folder = tempfile::tempdir().unwrap();
    let mut command = program();
    let output =
        run(command.args(["download", "https://example.org/a.txt"]).current_dir(folder.path()));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("download") && said.contains("feature `gateway`"), "{said}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn configured_mirrors_name_the_missing_feature() {
    let mirror = "[mirror.a]\nurls = [\"https://example.org/a\"]\ninto = \"a\"\n";
    let said = Daemon::try_start(mirror).unwrap_err();
    assert!(said.contains("mirror.a") && said.contains("feature `gateway`"), "{said}");
}
