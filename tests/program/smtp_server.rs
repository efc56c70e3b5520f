//! A real mail server (aiosmtpd), which stores each mail raw and as parsed by Python's `email`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use socket2::Socket;
use tempfile::TempDir;

use crate::common::eventually;
use crate::web::{Authority, reserve};

/// The only user of the server.
pub const USER: &str = "sender@example.org";

/// A password with characters that are special in forms, URLs, JSON and HTML.
pub const PASSWORD: &str = "hush-&{to}=%41\"+ä";

/// Debian's Python, for the package python3-aiosmtpd.
const PYTHON: &str = "/usr/bin/python3";

/// A running server, killed on drop. Its port remains reserved.
pub struct SmtpServer {
    child: Option<Child>,
    folder: TempDir,
    options: Value,
    pub address: SocketAddr,
    _port: Socket,
}

impl SmtpServer {
    /// Starts a server with `tls`, `starttls` or `none`.
    pub fn start(security: &str) -> Self {
        let mut server = Self::down(security);
        server.up();
        server
    }

    pub fn start_on(host: Ipv4Addr, security: &str) -> Self {
        let mut server = Self::down_on(host, security);
        server.up();
        server
    }

    /// Starts a server that presents the certificate of the authority.
    pub fn start_as_authority(security: &str) -> Self {
        let mut server = Self::down(security);
        let path = |name| json!(server.inside(name).display().to_string());
        let (certificate, key) = (path("ca.pem"), path("ca.key"));
        server.options["certificate"] = certificate;
        server.options["key"] = key;
        server.up();
        server
    }

    /// Starts a server without this AUTH mechanism.
    pub fn start_without(mechanism: &str, security: &str) -> Self {
        let mut server = Self::down(security);
        server.options["without"] = json!([mechanism]);
        server.up();
        server
    }

    /// Reserves the port without starting the server: connections are refused.
    pub fn down(security: &str) -> Self {
        Self::down_on(Ipv4Addr::LOCALHOST, security)
    }

    fn down_on(host: Ipv4Addr, security: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Authority::write(folder.path());
        fs::create_dir(folder.path().join("mails")).unwrap();
        fs::write(folder.path().join("password"), format!("{PASSWORD}\n")).unwrap();
        let port = reserve(host);
        let address = port.local_addr().unwrap().as_socket().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let options = json!({
            "folder": path("mails"),
            "security": security,
            "host": host.to_string(),
            "port": address.port(),
            "certificate": path("leaf.pem"),
            "key": path("leaf.key"),
            "login": [USER, PASSWORD],
            "without": [],
        });
        Self { child: None, folder, options, address, _port: port }
    }

    pub fn up(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/program/smtp_server.py");
        let mut command = Command::new(PYTHON);
        command.args(["-W", "ignore", script, &self.options.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        let mut port = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut port).unwrap();
        self.child = Some(child);
        assert_eq!(port.trim(), self.address.port().to_string(), "is python3-aiosmtpd installed?");
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Returns the path of the certificate of the authority.
    pub fn authority(&self) -> String {
        self.inside("ca.pem").display().to_string()
    }

    /// Returns the path of the file with the correct password.
    pub fn password_file(&self) -> String {
        self.inside("password").display().to_string()
    }

    /// Enables `busy`, `mute`, `cut` or `small`: see the Python program.
    pub fn order(&self, what: &str) {
        fs::write(self.inside("mails").join(what), "").unwrap();
    }

    /// Disables a mode of [`Self::order`].
    pub fn withdraw(&self, what: &str) {
        fs::remove_file(self.inside("mails").join(what)).unwrap();
    }

    /// Returns the keys of a mail channel for this server, without `from` and `to`.
    pub fn keys(&self) -> String {
        let (address, security) = (self.address, self.options["security"].as_str().unwrap());
        format!(
            "server = \"{address}\"\nsecurity = \"{security}\"\nca-file = \"{}\"\n\
             username = \"{USER}\"\npassword-file = \"{}\"\n",
            self.authority(),
            self.password_file()
        )
    }

    /// Returns the table `mail.ops` for this server, with more keys.
    pub fn channel(&self, more: &str) -> String {
        format!(
            "[mail.ops]\n{}from = \"handout <sender@example.org>\"\n\
             to = [\"ops@example.org\"]\n{more}\n",
            self.keys()
        )
    }

    /// Returns all mails in order of arrival.
    pub fn mails(&self) -> Vec<Value> {
        self.mails_from(0)
    }

    /// Returns the mails from this number on, counted from 0.
    pub fn mails_from(&self, first: usize) -> Vec<Value> {
        let read = |number| fs::read(self.inside("mails").join(format!("{number:04}.json"))).ok();
        let mails = (first..).map_while(read);
        mails.map(|mail| serde_json::from_slice(&mail).unwrap()).collect()
    }

    /// Returns the raw mail of this number, from 0.
    pub fn raw(&self, number: usize) -> Vec<u8> {
        fs::read(self.inside("mails").join(format!("{number:04}.eml"))).unwrap()
    }

    /// Waits for the mail of this number, from 0.
    pub fn wait_for(&self, number: usize) -> Value {
        eventually("a mail", || self.mails().len() > number);
        self.mails().swap_remove(number)
    }
}

impl Drop for SmtpServer {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
