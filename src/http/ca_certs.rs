//! Files of certificates that are trusted besides those of the system (`ca-file`).

use std::fs;
use std::io::Read;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::document::without_bom;

/// The largest file of roots that is read, in bytes.
const MAX_ROOTS: u64 = 4 << 20;

/// Reads the certificates of a file in PEM form, of which there is one at least.
///
/// # Errors
/// Says what is wrong.
pub(crate) fn read(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut pem = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_ROOTS).read_to_end(&mut pem));
    read.map_err(|error| format!("cannot be read: {error}"))?;
    let expected = || "expected certificates in PEM form".to_owned();
    let mut roots = Vec::new();
    for root in CertificateDer::pem_slice_iter(without_bom(&pem)) {
        let root = root.map_err(|_| expected())?;
        // Who uses them says only that one of them is wrong, not whose.
        let taken = RootCertStore::empty().add(root.clone());
        taken.map_err(|error| format!("has a certificate that cannot be used: {error}"))?;
        roots.push(root);
    }
    if roots.is_empty() { Err(expected()) } else { Ok(roots) }
}
