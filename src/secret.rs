//! Secrets: read from files, and never seen again but where they are used.

use std::convert::Infallible;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine as _};

use crate::config_reader::{Question, Reported, Table};
use crate::fs::file::OpenFile;

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
    /// Reads the only line of a file, which is a regular one: nobody is waited for to write it.
    ///
    /// # Errors
    /// If it cannot be read, or is no such text.
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

    /// A text of somebody who was told the secret, and may repeat it, without it.
    fn without(&self, text: &str) -> String {
        let secret: Vec<_> = self.0.chars().map(ways_to_write).collect();
        let mut without = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            let (told, length) = match length_at_the_beginning(&secret, rest) {
                Some(length) => ('…', length),
                None => (first, first.len_utf8()),
            };
            without.push(told);
            rest = rest.get(length..).unwrap_or_default();
        }
        without
    }

    /// The text itself, for whom it is meant.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

/// A character as it is, and as it stands in JSON, in a URL or a form, and in HTML.
fn ways_to_write(character: char) -> Vec<String> {
    let (mut utf_8, mut utf_16) = ([0; 4], [0; 2]);
    let json = character.encode_utf16(&mut utf_16).iter().map(|unit| format!("\\u{unit:04x}"));
    let percent = character.encode_utf8(&mut utf_8).bytes().map(|byte| format!("%{byte:02x}"));
    let number = u32::from(character);
    let mut ways = vec![
        character.to_string(),
        format!("\\{character}"),
        json.collect(),
        percent.collect(),
        format!("&#{number};"),
        format!("&#x{number:x};"),
    ];
    let named = match character {
        ' ' => Some("+"),
        '&' => Some("&amp;"),
        '<' => Some("&lt;"),
        '>' => Some("&gt;"),
        '"' => Some("&quot;"),
        _ => None,
    };
    ways.extend(named.map(str::to_owned));
    ways
}

/// How long a secret is, however its characters are written, if a text begins with it.
fn length_at_the_beginning(secret: &[Vec<String>], text: &str) -> Option<usize> {
    // A backslash may be one, or the half of one: every way is followed.
    let mut ends = vec![0];
    for ways in secret {
        let behind = |end| {
            ways.iter().filter_map(move |way| {
                let further = end + way.len();
                text.get(end..further)?.eq_ignore_ascii_case(way).then_some(further)
            })
        };
        let mut further: Vec<_> = ends.into_iter().flat_map(behind).collect();
        further.sort_unstable();
        further.dedup();
        ends = further;
        // None of them leads on.
        ends.last()?;
    }
    ends.last().copied()
}

/// What a server is told that nobody else may hear: a password, and what logins make of it.
#[derive(Debug, Clone, Default)]
pub struct Secrets(Vec<Secret>);

impl Secrets {
    /// Those of a login: of AUTH PLAIN and LOGIN (RFC 4616), and of HTTP (RFC 7617).
    pub fn of_login(user: &str, password: &Secret) -> Self {
        let Secret(secret) = password;
        let logins = [format!("\0{user}\0{secret}"), format!("{user}:{secret}"), secret.clone()];
        let mut secrets: Vec<_> =
            logins.iter().map(|login| Secret(BASE64_STANDARD.encode(login))).collect();
        // At last, as a short one may be in the others.
        secrets.push(password.clone());
        Self(secrets)
    }

    /// A text of somebody who was told them, and may repeat them, without them.
    pub fn without(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, secret| secret.without(&text))
    }
}

/// The file that a secret is in: the credential of that name, if the service manager has passed one
/// (systemd.exec(5), `LoadCredential=`), else the file of that name, relative to `folder`.
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

/// As [`read_path`], with another check.
pub(crate) fn checked_path(
    table: &mut Table<'_>,
    key: &'static str,
    check: fn(&Path) -> Result<(), String>,
) -> Result<Option<PathBuf>, Reported> {
    let Some(name) = table.text(key, |name| Ok::<_, Infallible>(name.to_owned()))? else {
        return Ok(None);
    };
    let credentials = std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from);
    let found = path(&name, table.base_dir(), credentials.as_deref());
    let checked = found.clone();
    table.probe(key, &name, Question::Check(Box::new(move || check(&checked))));
    Ok(Some(found))
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
    fn a_file_that_somebody_may_write_some_day_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("fifo");
        mknodat(CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
        let (sender, read) = mpsc::channel();
        thread::spawn(move || sender.send(Secret::read(&path)));
        let read = read.recv_timeout(Duration::from_mins(1)).unwrap();
        assert_eq!(read.unwrap_err().to_string(), "not a regular file");
    }

    #[test]
    fn a_secret_that_is_repeated_is_taken_out_however_it_is_written() {
        let without = |secret: &str, text: &str| Secret(secret.to_owned()).without(text);
        assert_eq!(without("hush", "hush is wrong: hush!"), "… is wrong: …!");
        assert_eq!(without("hush", "hus h%75s"), "hus h%75s");
        let secret = "a\"\\\\ü\u{1f600} /&%41+";
        for written in [
            secret,
            "a\\\"\\\\\\\\ü\u{1f600} /&%41+",
            "a\\\"\\\\\\\\\\u00fc\\ud83d\\ude00 \\/&%41+",
            "a\\u0022\\u005C\\u005c\\u00FC\\uD83D\\uDE00\\u0020\\/\\u0026%41\\u002b",
            "a%22%5C%5c%C3%BC%f0%9f%98%80+%2F%26%2541%2B",
            "a&quot;\\\\ü&#128512; &#x2F;&amp;%41+",
        ] {
            assert_eq!(without(secret, &format!("x{written}y{written}")), "x…y…", "{written}");
        }
    }

    #[test]
    fn a_login_that_is_repeated_is_taken_out() {
        let secrets = Secrets::of_login("me", &Secret("hush".to_owned()));
        for said in ["hush", "aHVzaA==", "AUTH PLAIN AG1lAGh1c2g=", "Basic bWU6aHVzaA=="] {
            let told = secrets.without(said);
            assert!(told.ends_with('…'), "{told}");
        }
        assert_eq!(Secrets::default().without("hush"), "hush");
    }

    proptest! {
        #[test]
        fn any_secret_is_taken_out_of_a_form_and_of_json(
            secret in "\\PC{1,20}", before in "[<>]{0,5}", behind in "[<>]{0,5}",
        ) {
            prop_assume!(!secret.contains(['<', '>']));
            let json = serde_json::to_string(&secret).unwrap();
            let form: Vec<_> = secret.bytes().map(|byte| format!("%{byte:02X}")).collect();
            for written in [&secret, &json[1..json.len() - 1], &form.concat()] {
                let told = Secret(secret.clone()).without(&format!("{before}{written}{behind}"));
                prop_assert!(told.starts_with(&format!("{before}…")), "{}", told);
                prop_assert!(told.ends_with(&behind), "{}", told);
            }
        }
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
