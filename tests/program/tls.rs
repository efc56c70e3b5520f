//! Certificates that `openssl` makes, shown by `openssl s_server` to `handout download`.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::common::run;
use crate::servers::{Outcome, Place, Server, bounded};

/// The names of the servers here.
const NAMES: &str = "subjectAltName=DNS:localhost,IP:127.0.0.1";

/// Makes `NAME.pem` and `NAME.key`, issued by itself; `time` is when, as faketime reads it.
fn certificate_at(folder: &Path, name: &str, time: &str, more: &[&str]) {
    let mut command = Command::new("faketime");
    command.args(["-f", time, "openssl", "req", "-x509", "-newkey", "ec"]);
    command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2"]);
    command.args(["-out", &format!("{name}.pem"), "-keyout", &format!("{name}.key")]);
    command.args(more).current_dir(folder).stdin(Stdio::null());
    let output = run(&mut command);
    assert!(output.status.success(), "{output:?}");
}

/// The same now, for these names.
fn certificate(folder: &Path, name: &str, names: &str, more: &[&str]) {
    let subject = format!("/O=Tests/CN={name}");
    let more = [&["-subj", &subject, "-addext", names], more].concat();
    certificate_at(folder, name, "+0", &more);
}

/// An `openssl s_server` that serves its folder. Connections to it are counted on the way.
struct TlsServer {
    child: Child,
    relay: Server,
    connections: Arc<AtomicUsize>,
}

impl TlsServer {
    /// Shows `NAME.pem` of the folder.
    fn start(folder: &Path, name: &str, options: &[&str]) -> Self {
        let mut command = Command::new("openssl");
        command.args(["s_server", "-accept", "127.0.0.1:0", "-WWW"]);
        command.args(["-cert", &format!("{name}.pem"), "-key", &format!("{name}.key")]);
        command.args(options).current_dir(folder);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut said = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        while !line.starts_with("ACCEPT") {
            line.clear();
            assert_ne!(said.read_line(&mut line).unwrap(), 0, "openssl s_server {name} ended");
        }
        thread::spawn(move || io::copy(&mut said, &mut io::sink()));
        let port: u16 = line.trim().rsplit(':').next().unwrap().parse().unwrap();
        let connections = Arc::<AtomicUsize>::default();
        let counted = Arc::clone(&connections);
        let relay = Server::answers(move |stream| {
            counted.fetch_add(1, Ordering::SeqCst);
            if let Ok(server) = TcpStream::connect(("127.0.0.1", port)) {
                relay(stream, server);
            }
        });
        Self { child, relay, connections }
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}/a.txt", self.relay.address.port())
    }
}

impl Drop for TlsServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Passes everything on in both directions.
fn relay(client: TcpStream, server: TcpStream) {
    let pass = |mut from: TcpStream, mut to: TcpStream| {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    };
    let (other_client, other_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
    let back = thread::spawn(move || pass(other_server, other_client));
    pass(client, server);
    let _ = back.join();
}

/// A folder with the file that the servers there serve.
fn folder() -> Place {
    let place = Place::new();
    fs::write(place.path("a.txt"), "alpha").unwrap();
    place
}

/// Downloads with the usual retries.
fn download(place: &Place, url: &str, ca_file: Option<&str>) -> Outcome {
    let _ = fs::remove_dir_all(place.path("out"));
    let mut command = bounded();
    command.args(["download", url, "-o", "out"]).current_dir(place.path(""));
    Outcome::of(run(command.args(ca_file.map(|file| ["--ca-file", file]).iter().flatten())))
}

fn is_plain(outcome: &Outcome) {
    for debug in ["Other", "Error", "CaUsed", "{", "}", "::", "Some("] {
        assert!(!outcome.stderr.contains(debug), "{debug}: {outcome:?}");
    }
}

#[test]
fn accepts_a_certificate_that_is_in_the_ca_file_byte_for_byte() {
    let place = folder();
    let folder = place.path("");
    certificate(&folder, "authority", NAMES, &[]);
    certificate(&folder, "leaf", NAMES, &["-addext", "basicConstraints=critical,CA:FALSE"]);
    let issued = ["-CA", "authority.pem", "-CAkey", "authority.key"];
    let no_authority = ["-addext", "basicConstraints=critical,CA:FALSE"];
    certificate(&folder, "issued", NAMES, &[&issued[..], &no_authority].concat());
    certificate_at(&folder, "nameless", "+0", &["-subj", "/CN=localhost"]);
    for (name, ca_file) in [
        ("authority", "authority.pem"),
        ("leaf", "leaf.pem"),
        ("nameless", "nameless.pem"),
        ("issued", "issued.pem"),
        ("issued", "authority.pem"),
    ] {
        for version in ["-tls1_2", "-tls1_3"] {
            let server = TlsServer::start(&folder, name, &[version]);
            download(&place, &server.url("localhost"), Some(ca_file)).succeeded();
            assert_eq!(fs::read(place.path("out/a.txt")).unwrap(), b"alpha", "{name}");
        }
    }
    // One among several, in a file with other text in it.
    let all =
        ["leaf", "authority"].map(|name| fs::read_to_string(place.path(&format!("{name}.pem"))));
    let all = all.map(|pem| format!("# a note\n{}\n", pem.unwrap())).concat();
    fs::write(place.path("all.pem"), all).unwrap();
    let server = TlsServer::start(&folder, "authority", &[]);
    download(&place, &server.url("127.0.0.1"), Some("all.pem")).succeeded();
}

#[test]
fn checks_name_validity_and_purpose_of_a_certificate_that_is_in_the_ca_file() {
    let place = folder();
    let folder = place.path("");
    let subject = ["-subj", "/CN=Tests", "-addext", NAMES];
    certificate_at(&folder, "expired", "-100d", &subject);
    certificate_at(&folder, "early", "+100d", &subject);
    certificate_at(&folder, "nameless", "+0", &["-subj", "/CN=example.org"]);
    certificate(&folder, "another", "subjectAltName=DNS:example.org,IP:192.0.2.1", &[]);
    certificate(&folder, "wildcard", "subjectAltName=DNS:*", &[]);
    certificate(&folder, "by-name", "subjectAltName=DNS:localhost,DNS:127.0.0.1", &[]);
    let client = ["-addext", "extendedKeyUsage=clientAuth"];
    certificate(&folder, "client", NAMES, &client);
    let leaf = ["-addext", "basicConstraints=critical,CA:FALSE"];
    certificate(&folder, "client-leaf", NAMES, &[&client[..], &leaf].concat());
    for (name, host, problem) in [
        ("expired", "localhost", "has expired on "),
        ("early", "localhost", "is not valid before "),
        ("nameless", "localhost", "subjectAltName"),
        ("another", "localhost", "is not valid for this name, but for example.org, 192.0.2.1"),
        ("wildcard", "localhost", "is not valid for this name"),
        ("by-name", "127.0.0.1", "is not valid for this name"),
        ("client", "localhost", "is not meant for servers"),
        ("client-leaf", "localhost", "is not meant for servers"),
    ] {
        let server = TlsServer::start(&folder, name, &[]);
        let outcome = download(&place, &server.url(host), Some(&format!("{name}.pem")));
        outcome.failed_with(&[host, problem]);
        is_plain(&outcome);
        assert_eq!(server.connections.load(Ordering::SeqCst), 1, "{name}: {outcome:?}");
    }
}

#[test]
fn names_issuer_host_and_option_of_an_untrusted_certificate_and_does_not_retry() {
    let place = folder();
    let folder = place.path("");
    certificate(&folder, "Root of Tests", NAMES, &[]);
    certificate(&folder, "other", NAMES, &[]);
    let issued = ["-CA", "Root of Tests.pem", "-CAkey", "Root of Tests.key"];
    certificate(
        &folder,
        "leaf",
        NAMES,
        &[&issued[..], &["-addext", "basicConstraints=CA:FALSE"]].concat(),
    );
    for (name, ca_file) in [
        ("Root of Tests", None),
        ("Root of Tests", Some("other.pem")),
        ("leaf", None),
        ("leaf", Some("other.pem")),
    ] {
        let server = TlsServer::start(&folder, name, &[]);
        let outcome = download(&place, &server.url("localhost"), ca_file);
        outcome.failed_with(&["localhost", "\"Root of Tests\"", "is not trusted", "--ca-file"]);
        is_plain(&outcome);
        assert_eq!(server.connections.load(Ordering::SeqCst), 1, "{name}: {outcome:?}");
    }
}

#[test]
fn explains_why_there_is_no_tls_and_does_not_retry() {
    let place = folder();
    let folder = place.path("");
    certificate(&folder, "server", NAMES, &[]);
    let old = &["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"][..];
    for (options, problem) in [
        (old, "supports neither TLS 1.2 nor 1.3"),
        (&["-Verify", "1", "-tls1_3"], "requires a client certificate"),
        (&["-Verify", "1", "-tls1_2"], "client certificate"),
        (&["-tls1_2", "-cipher", "AES128-SHA"], "no algorithm that both accept"),
    ] {
        let server = TlsServer::start(&folder, "server", options);
        let outcome = download(&place, &server.url("localhost"), Some("server.pem"));
        outcome.failed_with(&["localhost", problem]);
        is_plain(&outcome);
        assert_eq!(server.connections.load(Ordering::SeqCst), 1, "{options:?}: {outcome:?}");
    }
    for plain in ["HTTP/1.1 400 Bad Request\r\n\r\n", "220 mail.example.org ready\r\n"] {
        let server = Server::sends(plain);
        let outcome = download(&place, &format!("https://{}/a.txt", server.address), None);
        outcome.failed_with(&["127.0.0.1", "does not answer with TLS"]);
        is_plain(&outcome);
    }
}
