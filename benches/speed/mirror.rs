//! `handout download` beside aria2c and wget with the same nginx, and its memory with large files.
//!
//! Only handout syncs every file before it gets its name.

use std::fs::{self, File};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

use crate::contenders::nginx;
use crate::machine::{Server, Taken, finish};
use crate::rounds::median;
use crate::table::{Row, Unit};
use crate::{Result, Run, pseudo_random};

/// Number of files, and the size of each in bytes.
const FILES: (usize, usize) = (2000, 40);
const SIZE: usize = 50_000;

/// Size of the large files in bytes, and their number.
const LARGE: (usize, usize) = (1 << 30, 4 << 20);
const LARGE_FILES: usize = 4;

/// Target: memory for the large files, in bytes.
const MEMORY: f64 = (40 << 20) as f64;

/// Number of concurrent downloads.
const JOBS: &str = "8";

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let folder = TempDir::new()?;
    let files = Files::create(run, folder.path().join("root"))?;
    let mut rows = Vec::new();
    for scheme in [Scheme::Http, Scheme::Https] {
        let Some((_nginx, address)) = serve(run, folder.path(), scheme)? else { continue };
        let base = format!("{}://{address}", scheme.name());
        rows.extend(compare(run, &files, folder.path(), &base, scheme)?);
        if scheme == Scheme::Https {
            rows.push(memory(run, &files, folder.path(), &base)?);
        }
    }
    Ok(rows)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

impl Scheme {
    fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
}

/// The files served by nginx.
struct Files {
    root: PathBuf,
    count: usize,
    /// The concatenated content of all files.
    data: Vec<u8>,
}

impl Files {
    /// Creates numbered files, `list.json`, and large files named by letters.
    fn create(run: &Run, root: PathBuf) -> Result<Self> {
        fs::create_dir(&root)?;
        let count = run.choose(FILES.0, FILES.1);
        let data = pseudo_random(count * SIZE);
        for (number, content) in data.chunks(SIZE).enumerate() {
            fs::write(root.join(format!("{number}.bin")), content)?;
        }
        let list: Vec<_> = (0..count).map(|number| format!("\"{number}.bin\"")).collect();
        fs::write(root.join("list.json"), format!("[{}]", list.join(",")))?;
        let mut large = File::create(root.join("large"))?;
        let piece = pseudo_random(run.choose(LARGE.0, LARGE.1) / 64);
        for _ in 0..64 {
            large.write_all(&piece)?;
        }
        for number in 0..LARGE_FILES {
            symlink("large", root.join(format!("large-{number}")))?;
        }
        Ok(Self { root, count, data })
    }

    /// Compares the content of a folder and empties it.
    fn expect(&self, folder: &Path) -> Result<()> {
        for (number, content) in self.data.chunks(SIZE).enumerate() {
            if fs::read(folder.join(format!("{number}.bin")))? != content {
                return Err(format!("{number}.bin has other content").into());
            }
        }
        fs::remove_dir_all(folder)?;
        Ok(fs::create_dir(folder)?)
    }
}

/// Starts nginx with all files, if nginx and openssl are installed.
fn serve(run: &Run, folder: &Path, scheme: Scheme) -> Result<Option<(Server, SocketAddr)>> {
    let (root, temporary) = (folder.join("root"), folder.join("temporary"));
    let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}; ", temporary.display()))
        .concat();
    let tls = match scheme {
        Scheme::Http => String::new(),
        Scheme::Https if !certify(folder)? => {
            println!("\nhttps is left out: openssl is not installed");
            return Ok(None);
        }
        Scheme::Https => format!(
            "ssl_certificate {0}/leaf.pem; ssl_certificate_key {0}/leaf.key;",
            folder.display()
        ),
    };
    let listen = if scheme == Scheme::Https { "ADDRESS ssl" } else { "ADDRESS" };
    let serve = format!(
        "events {{}} http {{ access_log off; sendfile on; keepalive_requests 100000; {temporary}
         server {{ listen {listen}; {tls} root {}; }} }}",
        root.display()
    );
    nginx(run, folder, &serve)
}

/// Creates `ca.pem` and a certificate for 127.0.0.1 signed by it. Returns false without openssl.
fn certify(folder: &Path) -> Result<bool> {
    let config = "[req]\ndistinguished_name = name\nprompt = no\n[name]\nCN = bench\n\
                  [ca]\nbasicConstraints = critical, CA:TRUE\n\
                  [leaf]\nbasicConstraints = critical, CA:FALSE\nsubjectAltName = IP:127.0.0.1\n";
    fs::write(folder.join("openssl.cnf"), config)?;
    let by_authority = ["-CA", "ca.pem", "-CAkey", "ca.key"];
    for (name, signed) in [("ca", &[][..]), ("leaf", &by_authority)] {
        let mut command = Command::new("openssl");
        command.args([
            "req",
            "-x509",
            "-config",
            "openssl.cnf",
            "-extensions",
            name,
            "-newkey",
            "ec",
        ]);
        command.args(["-pkeyopt", "ec_paramgen_curve:P-256", "-noenc", "-days", "2"]);
        command.args(["-out", &format!("{name}.pem"), "-keyout", &format!("{name}.key")]);
        let command = command.args(signed).current_dir(folder);
        let Ok(made) = command.output() else { return Ok(false) };
        if !made.status.success() {
            return Err(String::from_utf8_lossy(&made.stderr).into());
        }
    }
    Ok(true)
}

/// A client and its cost in each round.
struct Client {
    name: &'static str,
    command: Command,
    taken: Vec<Taken>,
}

impl Client {
    fn new(name: &'static str, command: Command) -> Self {
        Self { name, command, taken: Vec::new() }
    }

    fn median(&self, number: fn(&Taken) -> f64) -> f64 {
        median(self.taken.iter().map(number).collect())
    }

    fn wall(&self) -> f64 {
        self.median(|taken| taken.wall.as_secs_f64())
    }

    fn processor(&self) -> f64 {
        self.median(|taken| taken.processor.as_secs_f64())
    }
}

/// Returns all clients, handout first; each fetches everything into `into`.
fn clients(files: &Files, folder: &Path, base: &str, into: &Path) -> Result<Vec<Client>> {
    let authority = folder.join("ca.pem");
    let urls = folder.join("urls");
    let list: Vec<_> = (0..files.count).map(|number| format!("{base}/{number}.bin\n")).collect();
    fs::write(&urls, list.concat())?;
    let with_authority = |command: &mut Command, option: &str| {
        if base.starts_with("https") {
            command.arg(option).arg(&authority);
        }
    };

    let mut handout = Command::new(env!("CARGO_BIN_EXE_handout"));
    handout.args(["download", &format!("{base}/list.json"), "--list", "", "--url", ""]);
    handout.args(["--quiet", "--jobs", JOBS, "-o"]).arg(into);
    with_authority(&mut handout, "--ca-file");

    let mut aria2c = Command::new("aria2c");
    aria2c.args(["--no-conf", "--quiet", "--file-allocation=none", "-j", JOBS, "-i"]).arg(&urls);
    aria2c.arg("-d").arg(into).stdout(Stdio::null());
    if base.starts_with("https") {
        aria2c.arg(format!("--ca-certificate={}", authority.display()));
    }

    let mut wget = Command::new("wget");
    wget.args(["--no-config", "--quiet", "-i"]).arg(&urls).arg("-P").arg(into);
    with_authority(&mut wget, "--ca-certificate");

    Ok(vec![
        Client::new("handout download", handout),
        Client::new("aria2c -j 8", aria2c),
        Client::new("wget -i", wget),
    ])
}

fn compare(
    run: &Run,
    files: &Files,
    folder: &Path,
    base: &str,
    scheme: Scheme,
) -> Result<Vec<Row>> {
    let into = folder.join("into");
    fs::create_dir_all(&into)?;
    let scheme = scheme.name();
    let mut clients = clients(files, folder, base, &into)?;
    // Clients that are missing or fail are left out.
    for _ in 0..run.choose(5, 1) {
        let mut able = Vec::new();
        for mut client in clients {
            match finish(&mut client.command) {
                Ok(taken) => {
                    files.expect(&into)?;
                    client.taken.push(taken);
                    able.push(client);
                }
                Err(error) if client.name.starts_with("handout") => return Err(error),
                Err(error) => println!("\n{} is left out: {error}", client.name),
            }
        }
        clients = able;
    }
    let title = format!("{} files of {} kB by {scheme}", files.count, SIZE / 1000);
    println!("\n{title:<32} {:>10} {:>12} {:>12}", "seconds", "processor", "peak");
    for client in &clients {
        let peak = Unit::Mebibytes.show(client.median(|taken| taken.peak));
        let (wall, processor) = (client.wall(), client.processor());
        println!("{:<32} {wall:>10.2} {processor:>12.2} {peak:>12}", client.name);
    }
    let mut rows = Vec::new();
    if let Some((handout, others)) = clients.split_first() {
        for other in others {
            let what = format!("2000 files by {scheme}");
            let beside = (other.name, other.wall());
            rows.push(Row::new(&what, Unit::Seconds, handout.wall(), beside, 1.0));
            let what = format!("2000 files by {scheme}, processor");
            let beside = (other.name, other.processor());
            rows.push(Row::new(&what, Unit::Seconds, handout.processor(), beside, 1.0));
        }
    }
    Ok(rows)
}

/// Returns the peak memory of handout with several large files.
fn memory(run: &Run, files: &Files, folder: &Path, base: &str) -> Result<Row> {
    let into = folder.join("into");
    let mut handout = Command::new(env!("CARGO_BIN_EXE_handout"));
    handout.args(["download", "--quiet", "--max-size", "2GiB", "--jobs", JOBS, "-o"]).arg(&into);
    handout.arg("--ca-file").arg(folder.join("ca.pem"));
    handout.args((0..LARGE_FILES).map(|number| format!("{base}/large-{number}")));
    let taken = finish(&mut handout)?;
    let size = fs::metadata(files.root.join("large"))?.len();
    for number in 0..LARGE_FILES {
        if fs::metadata(into.join(format!("large-{number}")))?.len() != size {
            return Err("a large file has another size".into());
        }
    }
    fs::remove_dir_all(into)?;
    let title =
        format!("{LARGE_FILES} files of {} MiB by https", run.choose(LARGE.0, LARGE.1) >> 20);
    let (wall, processor) = (taken.wall.as_secs_f64(), taken.processor.as_secs_f64());
    let peak = Unit::Mebibytes.show(taken.peak);
    println!("\n{title:<32} {:>10} {:>12} {:>12}", "seconds", "processor", "peak");
    println!("{:<32} {wall:>10.2} {processor:>12.2} {peak:>12}", "handout download");
    Ok(Row::limit("4 files of 1 GiB by https, memory", Unit::Mebibytes, taken.peak, MEMORY))
}
