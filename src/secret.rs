//! Secrets: read from files, and never seen again but where they are used.

use std::fmt;
use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// The longest secret that is read, in bytes.
const MAX_SECRET: u64 = 64 << 10;

/// A text that is not printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// Reads a file's only line.
    ///
    /// # Errors
    /// If it cannot be read, or is no such text.
    pub fn read(path: &Path) -> io::Result<Self> {
        let mut text = String::new();
        fs::File::open(path)?.take(MAX_SECRET + 1).read_to_string(&mut text)?;
        let line = text.trim_end_matches(['\r', '\n']);
        if line.is_empty() || text.len() as u64 > MAX_SECRET || line.contains('\n') {
            return Err(io::Error::other("expected one line"));
        }
        Ok(Self(line.to_owned()))
    }

    /// The text itself, for whom it is meant.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// The file that a secret is in: the credential of that name, if the service manager has passed one
/// (systemd.exec(5), `LoadCredential=`), else the file of that name, relative to `folder`.
pub fn path(name: &str, folder: &Path, credentials: Option<&Path>) -> PathBuf {
    let credential = credentials.filter(|_| !name.contains('/')).map(|folder| folder.join(name));
    credential.filter(|path| path.is_file()).unwrap_or_else(|| folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_one_line_and_not_printed() {
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
    fn a_credential_comes_before_a_file() {
        let (folder, credentials) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let found = |name| path(name, folder.path(), Some(credentials.path()));
        assert_eq!(found("token"), folder.path().join("token"));
        fs::write(credentials.path().join("token"), "hush").unwrap();
        assert_eq!(found("token"), credentials.path().join("token"));
        assert_eq!(found("./token"), folder.path().join("./token"));
        assert_eq!(path("token", folder.path(), None), folder.path().join("token"));
    }
}
