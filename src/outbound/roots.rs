//! Authorities that are trusted besides those of the system (`ca-file`), and what is wrong with a
//! certificate that none of them vouches for.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{CertificateError, RootCertStore};

use crate::client::names::escape;
use crate::config::Context;

/// The largest file of roots that is read, in bytes.
const MAX_ROOTS: u64 = 4 << 20;

/// The longest that is told of what is wrong with a certificate, in characters: it may have many
/// names.
const MAX_WHY: usize = 300;

/// The file that a configuration names, which can be read.
///
/// # Errors
/// Says what is wrong.
pub fn file(name: &str, context: &Context<'_>) -> Result<PathBuf, String> {
    let path = context.folder.join(name);
    read(&path).map(|_| path)
}

/// Reads the certificates of a file in PEM form, of which there is one at least.
///
/// # Errors
/// Says what is wrong.
pub fn read(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut pem = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_ROOTS).read_to_end(&mut pem));
    read.map_err(|error| format!("cannot be read: {error}"))?;
    let expected = || "expected certificates in PEM form".to_owned();
    let mut roots = Vec::new();
    for root in CertificateDer::pem_slice_iter(&pem) {
        let root = root.map_err(|_| expected())?;
        // Who uses them says only that one of them is wrong, not whose.
        let taken = RootCertStore::empty().add(root.clone());
        taken.map_err(|error| format!("has a certificate that cannot be used: {error}"))?;
        roots.push(root);
    }
    if roots.is_empty() { Err(expected()) } else { Ok(roots) }
}

/// Why a server's certificate is not taken, and what can be done.
pub fn not_taken(why: &CertificateError) -> String {
    let remedy = match why {
        CertificateError::UnknownIssuer => "further roots can be named (ca-file)",
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "it has to be renewed there, if this machine's clock is right"
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "is this machine's clock right?"
        }
        CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
            "the server has to be called by the name that is in it"
        }
        // What the library underneath calls it is all that tells it from others.
        CertificateError::Other(other) if other.to_string().contains("CaUsedAsEndEntity") => {
            "it is that of an authority, as openssl makes them by default; the server needs one that \
             says CA:FALSE"
        }
        _ => "it needs another one",
    };
    let why: String = why.to_string().chars().take(MAX_WHY).collect();
    format!("the server's certificate is not taken: {}: {remedy}", escape(&why))
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::{ServerName, UnixTime};

    use super::*;

    #[test]
    fn what_is_wrong_with_a_certificate_is_told_with_what_can_be_done() {
        let (time, day) = (UnixTime::since_unix_epoch, std::time::Duration::from_hours(24));
        let early =
            CertificateError::NotValidYetContext { time: time(day), not_before: time(2 * day) };
        assert!(not_taken(&early).ends_with(": is this machine's clock right?"));
        let late = CertificateError::ExpiredContext { time: time(2 * day), not_after: time(day) };
        assert!(not_taken(&late).contains("renewed"));
        assert!(not_taken(&CertificateError::UnknownIssuer).ends_with("(ca-file)"));
        let expected = ServerName::try_from("example.org").unwrap();
        let presented = vec!["\u{1b}[2J".to_owned(); 1000];
        let another = not_taken(&CertificateError::NotValidForNameContext { expected, presented });
        assert!(another.contains("by the name that is in it"), "{another}");
        assert!(another.len() < 1000 && !another.contains('\u{1b}'), "{another}");
    }
}
