//! A real mail server, which stores what it takes, and says what Python's `email` reads in it.

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

/// The user that it knows.
pub const USER: &str = "sender@example.org";

/// The password, with all that means something somewhere.
pub const PASSWORD: &str = "hush-&{to}=%41\"+ä";

/// Debian's own, which has the package python3-aiosmtpd.
const PYTHON: &str = "/usr/bin/python3";

/// A mail server, which is killed when it is dropped. Its port stays its own.
pub struct Postbox {
    child: Option<Child>,
    folder: TempDir,
    options: Value,
    pub address: SocketAddr,
    _port: Socket,
}

impl Postbox {
    /// With `tls`, `starttls` or `none`, for the one user that it knows.
    pub fn start(security: &str) -> Self {
        let mut postbox = Self::down(security);
        postbox.up();
        postbox
    }

    /// The same on an address of the test's choice.
    pub fn start_on(host: Ipv4Addr, security: &str) -> Self {
        let mut postbox = Self::down_on(host, security);
        postbox.up();
        postbox
    }

    /// The same, which shows the certificate of the authority as its own.
    pub fn start_as_authority(security: &str) -> Self {
        let mut postbox = Self::down(security);
        let path = |name| json!(postbox.inside(name).display().to_string());
        let (certificate, key) = (path("ca.pem"), path("ca.key"));
        postbox.options["certificate"] = certificate;
        postbox.options["key"] = key;
        postbox.up();
        postbox
    }

    /// The same, which does not offer this mechanism of AUTH.
    pub fn start_without(mechanism: &str, security: &str) -> Self {
        let mut postbox = Self::down(security);
        postbox.options["without"] = json!([mechanism]);
        postbox.up();
        postbox
    }

    /// One that does not run yet: connections to it are refused.
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

    /// Runs it.
    pub fn up(&mut self) {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/program/postbox.py");
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

    /// The certificate of the authority that vouches for it.
    pub fn authority(&self) -> String {
        self.inside("ca.pem").display().to_string()
    }

    /// The file that the right password is in.
    pub fn password_file(&self) -> String {
        self.inside("password").display().to_string()
    }

    /// From now on it is `busy`, `mute`, `cut` or `small`: see the program.
    pub fn order(&self, what: &str) {
        fs::write(self.inside("mails").join(what), "").unwrap();
    }

    /// It is no more.
    pub fn withdraw(&self, what: &str) {
        fs::remove_file(self.inside("mails").join(what)).unwrap();
    }

    /// The keys of a mail channel that uses it, but for what says who is who.
    pub fn keys(&self) -> String {
        let (address, security) = (self.address, self.options["security"].as_str().unwrap());
        format!(
            "server = \"{address}\"\nsecurity = \"{security}\"\nca-file = \"{}\"\n\
             username = \"{USER}\"\npassword-file = \"{}\"\n",
            self.authority(),
            self.password_file()
        )
    }

    /// The table of a channel `mail.ops` that uses it, with more keys.
    pub fn channel(&self, more: &str) -> String {
        format!(
            "[mail.ops]\n{}from = \"handout <sender@example.org>\"\n\
             to = [\"ops@example.org\"]\n{more}\n",
            self.keys()
        )
    }

    /// Every mail so far, in the order in which they came.
    pub fn mails(&self) -> Vec<Value> {
        self.mails_from(0)
    }

    /// Those of this number, from 0, and later ones.
    pub fn mails_from(&self, first: usize) -> Vec<Value> {
        let read = |number| fs::read(self.inside("mails").join(format!("{number:04}.json"))).ok();
        let mails = (first..).map_while(read);
        mails.map(|mail| serde_json::from_slice(&mail).unwrap()).collect()
    }

    /// A mail as it came, from 0.
    pub fn raw(&self, number: usize) -> Vec<u8> {
        fs::read(self.inside("mails").join(format!("{number:04}.eml"))).unwrap()
    }

    /// Waits for the mail of this number, from 0.
    pub fn wait_for(&self, number: usize) -> Value {
        eventually("a mail", || self.mails().len() > number);
        self.mails().swap_remove(number)
    }
}

impl Drop for Postbox {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
