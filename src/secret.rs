//! Secrets: read from files or credentials, and never printed.

use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine as _};

use crate::config_reader::{Reported, Table};
use crate::fs::file::OpenFile;

/// Maximum length of a secret, in bytes.
const MAX_SECRET: u64 = 64 << 10;

/// A text that its `Debug` form does not contain.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// Reads the only line of a regular file.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut text = String::new();
        let file = OpenFile::open(path)?.into_file();
        file.take(MAX_SECRET + 1).read_to_string(&mut text)?;
        let line = text.trim_end_matches(['\r', '\n']);
        if line.is_empty() || text.len() as u64 > MAX_SECRET || line.contains('\n') {
            return Err(io::Error::other("expected one line"));
        }
        Ok(Self(line.to_owned()))
    }

    /// Returns the text for its intended receiver.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// Texts that a server may repeat and no message may contain: a password and its login encodings.
#[derive(Debug, Clone, Default)]
pub struct Secrets {
    /// Raw and base64 forms, compared with case.
    exact: Vec<Secret>,
    /// Percent-encoded, compared without case.
    percent: Vec<Secret>,
}

impl Secrets {
    /// Collects the encodings of AUTH PLAIN and LOGIN (RFC 4616), HTTP (RFC 7617) and forms.
    pub fn of_login(user: &str, password: &Secret) -> Self {
        let Secret(secret) = password;
        let logins = [format!("\0{user}\0{secret}"), format!("{user}:{secret}"), secret.clone()];
        let every: Vec<_> = secret.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let encoded = logins.iter().map(|login| Secret(BASE64_STANDARD.encode(login)));
        let percent = |is_plain: fn(u8) -> bool| {
            let bytes = secret.bytes().map(|byte| match byte {
                b' ' if is_plain(b' ') => "+".to_owned(),
                byte if byte.is_ascii_alphanumeric() || is_plain(byte) => char::from(byte).into(),
                byte => format!("%{byte:02x}"),
            });
            Secret(bytes.collect::<String>().to_ascii_lowercase())
        };
        Self {
            exact: encoded.chain([password.clone()]).collect(),
            // Every byte, as in URLs (RFC 3986), and as in forms (WHATWG URL).
            percent: vec![
                Secret(every.concat()),
                percent(|byte| b"-._~".contains(&byte)),
                percent(|byte| b"*-._ ".contains(&byte)),
            ],
        }
    }

    /// Returns the text, or a notice if it contains a secret.
    pub fn withhold(&self, text: &str) -> String {
        let lower = text.to_ascii_lowercase();
        let is_secret = self.exact.iter().any(|Secret(secret)| text.contains(secret))
            || self.percent.iter().any(|Secret(secret)| lower.contains(secret));
        let notice = "(withheld, because the server repeats the password)";
        if is_secret { notice } else { text }.to_owned()
    }
}

/// Returns the file of a secret: the credential of that name (systemd.exec(5), `LoadCredential=`),
/// or a path relative to `folder`. The credentials are in memory, so this cannot hang.
pub(crate) fn path(name: &str, folder: &Path, credentials: Option<&Path>) -> PathBuf {
    let credential = credentials.filter(|_| !name.contains('/')).map(|folder| folder.join(name));
    credential.filter(|path| path.is_file()).unwrap_or_else(|| folder.join(name))
}

/// Reads the key that names the file of a secret. The probe stage reads the secret.
pub(crate) fn read_path(
    table: &mut Table<'_>,
    key: &'static str,
) -> Result<Option<PathBuf>, Reported> {
    checked_path(table, key, |path| {
        Secret::read(path).map(drop).map_err(|error| format!("cannot be read: {error}"))
    })
}

/// Like [`read_path`], with another check.
pub(crate) fn checked_path(
    table: &mut Table<'_>,
    key: &'static str,
    check: fn(&Path) -> Result<(), String>,
) -> Result<Option<PathBuf>, Reported> {
    let base_dir = table.base_dir();
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    table.located_path(key, |name| path(name, base_dir, credentials.as_deref()), check)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use proptest::prelude::*;
    use rustix::fs::{CWD, FileType, mknodat};

    use super::*;

    #[test]
    fn reads_one_line_and_prints_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        fs::write(&path, "hush\n").unwrap();
        let secret = Secret::read(&path).unwrap();
        assert_eq!((secret.reveal(), format!("{secret:?}").as_str()), ("hush", "Secret(…)"));
        for bad in ["", "\n", "a\nb\n"] {
            fs::write(&path, bad).unwrap();
            assert!(Secret::read(&path).is_err(), "{bad:?}");
        }
        fs::write(&path, "x".repeat(100_000)).unwrap();
        assert!(Secret::read(&path).is_err());
    }

    #[test]
    fn refuses_a_fifo_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        let (sender, read) = mpsc::channel();
        thread::spawn(move || sender.send(Secret::read(&path)));
        let read = read.recv_timeout(Duration::from_mins(1)).unwrap();
        assert_eq!(read.unwrap_err().to_string(), "not a regular file");
    }

    #[test]
    fn withholds_texts_with_a_secret() {
        let secrets = Secrets::of_login("me", &Secret("hu sh/ü".to_owned()));
        for text in [
            "550 hu sh/ü is wrong",
            "aHUgc2gvw7w=",
            "AUTH PLAIN AG1lAGh1IHNoL8O8",
            "Basic bWU6aHUgc2gvw7w=",
            "password=hu+sh%2F%C3%BC&x",
            "hu%20sh%2f%c3%bc",
        ] {
            assert!(secrets.withhold(text).starts_with("(withheld"), "{text}");
        }
        assert_eq!(secrets.withhold("hu sh"), "hu sh");
        assert_eq!(Secrets::default().withhold("hush"), "hush");
    }

    proptest! {
        #[test]
        fn withholds_every_encoding_of_a_secret(secret in "\\PC{1,20}", around in "[<>]{0,5}") {
            let secrets = Secrets::of_login("me", &Secret(secret.clone()));
            let every: Vec<_> = secret.bytes().map(|byte| format!("%{byte:02X}")).collect();
            for written in [secret.clone(), BASE64_STANDARD.encode(&secret), every.concat()] {
                let text = format!("{around}{written}{around}");
                prop_assert!(secrets.withhold(&text).starts_with("(withheld"), "{}", text);
            }
        }
    }

    #[test]
    fn prefers_credentials_to_files() {
        let (folder, credentials) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let found = |name| path(name, folder.path(), Some(credentials.path()));
        assert_eq!(found("token"), folder.path().join("token"));
        fs::write(credentials.path().join("token"), "hush").unwrap();
        assert_eq!(found("token"), credentials.path().join("token"));
        assert_eq!(found("./token"), folder.path().join("./token"));
        assert_eq!(path("token", folder.path(), None), folder.path().join("token"));
    }
}
