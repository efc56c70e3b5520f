//! Starts the floors, handout and its peers on the core of the servers.

use std::env;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use serde_json::Value;
use tempfile::TempDir;

use crate::floors::Floor;
use crate::machine::Server;
use crate::{PATIENCE, Result, Run};

/// Log filter without connection lines; the addresses of services are still logged.
pub const QUIET: &str = "warn,handout::daemon=info";

/// Log filter with a line per connection.
pub const LOGGED: &str = "info";

/// Starts a bare loop that serves a file.
pub fn floor(run: &Run, floor: Floor, reply: &Path) -> Result<(Server, SocketAddr)> {
    let mut command = Command::new(env::current_exe()?);
    let name = floor.to_possible_value().ok_or("a floor has no name")?;
    command.args(["--floor", name.get_name()]).stdin(File::open(reply)?);
    tells_its_address(run, &mut command)
}

/// Starts the Python server, if Python is installed.
pub fn python(run: &Run, file: Option<&Path>) -> Option<(Server, SocketAddr)> {
    let mut command = Command::new("python3");
    command.args(["-c", include_str!("thread_per_client.py")]).args(file).stderr(Stdio::null());
    tells_its_address(run, &mut command)
        .inspect_err(|error| println!("\nPython is left out: {error}"))
        .ok()
}

/// Starts a program that prints its address first.
fn tells_its_address(run: &Run, command: &mut Command) -> Result<(Server, SocketAddr)> {
    let mut server = run.cores.as_server(|| Server::start(command.stdout(Stdio::piped())))??;
    let mut address = String::new();
    let output = server.0.stdout.take().ok_or("the program has no output")?;
    BufReader::new(output).read_line(&mut address)?;
    Ok((server, address.trim().parse()?))
}

/// A running handout that logs to a file.
pub struct Handout {
    pub server: Server,
    /// Time from exec to READY=1.
    pub ready_after: Duration,
    log: PathBuf,
    _folder: TempDir,
}

impl Handout {
    /// Starts handout on the core of the servers and waits until it is ready.
    pub fn start(run: &Run, level: &str, services: &str) -> Result<Self> {
        let folder = TempDir::new()?;
        let config = folder.path().join("handout.toml");
        fs::write(&config, format!("[log]\nlevel = \"{level}\"\nformat = \"json\"\n{services}"))?;
        run.cores.as_server(|| Self::start_with(&config, folder))?
    }

    /// Starts handout on the current cores.
    pub fn start_with(config: &Path, folder: TempDir) -> Result<Self> {
        let log = folder.path().join("log");
        let manager = folder.path().join("manager");
        let notified = UnixDatagram::bind(&manager)?;
        notified.set_read_timeout(Some(PATIENCE))?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_handout"));
        command.arg("serve").arg("--config").arg(config).env("NOTIFY_SOCKET", &manager);
        command.stderr(File::create(&log)?);
        let start = Instant::now();
        let server = Server::start(&mut command)?;
        let mut state = [0; 1024];
        loop {
            let length = notified.recv(&mut state).map_err(|error| {
                let log = fs::read_to_string(&log).unwrap_or_default();
                format!("handout did not become ready: {error}\n{log}")
            })?;
            if String::from_utf8_lossy(&state[..length]).contains("READY=1") {
                let ready_after = start.elapsed();
                return Ok(Self { server, ready_after, log, _folder: folder });
            }
        }
    }

    /// Returns the address of a service; log lines are written with a delay.
    pub fn address(&self, service: &str) -> Result<SocketAddr> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            let text = fs::read_to_string(&self.log)?;
            for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
                if let Some(address) =
                    line["address"].as_str().filter(|_| line["service"] == service)
                {
                    return Ok(address.trim_start_matches("udp:").parse()?);
                }
            }
            thread::sleep(Duration::from_millis(1));
        }
        Err(format!("handout logged no address of {service}").into())
    }

    /// Returns the process and the address of a service.
    pub fn contend(self, service: &str) -> Result<(Server, SocketAddr)> {
        let address = self.address(service)?;
        Ok((self.server, address))
    }
}

/// Starts nginx with these blocks, in which `ADDRESS` is replaced by a free one. Returns `None`
/// if nginx or a module is missing.
pub fn nginx(run: &Run, folder: &Path, serve: &str) -> Result<Option<(Server, SocketAddr)>> {
    let config = folder.join("nginx.conf");
    // nginx cannot choose a port itself.
    let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    let text = format!(
        "daemon off; master_process off; pid {}; error_log stderr; {}",
        folder.join("nginx.pid").display(),
        serve.replace("ADDRESS", &address.to_string()),
    );
    fs::write(&config, text)?;
    let mut command = Command::new("nginx");
    command.arg("-c").arg(config).stderr(Stdio::null());
    let mut server = match run.cores.as_server(|| Server::start(&mut command))? {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            println!("\nnginx is left out: it is not installed");
            return Ok(None);
        }
        server => server?,
    };
    let start = Instant::now();
    // Connections are refused until nginx listens.
    while TcpStream::connect(address).is_err() {
        if server.0.try_wait()?.is_some() || start.elapsed() > PATIENCE {
            println!("\nnginx is left out: it rejects its configuration");
            return Ok(None);
        }
    }
    Ok(Some((server, address)))
}
