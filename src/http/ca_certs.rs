//! Additional trusted root certificates (`ca-file`).

use std::fs;
use std::io::Read;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use crate::document::without_bom;

/// Maximum size of the file in bytes.
const MAX_FILE_SIZE: u64 = 4 << 20;

/// Reads a PEM file with at least one certificate.
pub(crate) fn read(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let mut pem = Vec::new();
    let read = fs::File::open(path).and_then(|file| file.take(MAX_FILE_SIZE).read_to_end(&mut pem));
    read.map_err(|error| format!("cannot be read: {error}"))?;
    let expected = || "expected certificates in PEM form".to_owned();
    let mut roots = Vec::new();
    for root in CertificateDer::pem_slice_iter(without_bom(&pem)) {
        let root = root.map_err(|_| expected())?;
        // Checked here because rustls does not report the file later.
        let added = RootCertStore::empty().add(root.clone());
        added.map_err(|error| format!("has a certificate that cannot be used: {error}"))?;
        roots.push(root);
    }
    if roots.is_empty() { Err(expected()) } else { Ok(roots) }
}
