//! Web servers: a real nginx with TLS from an authority that lives as long as the test, and one of
//! our own that does wrong what a test tells it.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use jiff::Timestamp;
use serde_json::{Value, json};
use socket2::{Domain, SockRef, Socket, Type};
use tempfile::TempDir;

use crate::common::{DEADLINE, eventually, run};
use crate::servers::{Server, end};

/// What a client asked for.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET` or `POST`.
    #[cfg_attr(not(feature = "gateway"), expect(dead_code, reason = "mirrors only GET"))]
    pub method: String,
    /// As it stands in the first line; a whole URL where the server is taken for a proxy.
    pub target: String,
    /// Names in small letters.
    headers: Vec<(String, String)>,
    /// What follows the headers.
    pub body: Vec<u8>,
    /// When it was there.
    pub at: Instant,
    /// Which request it is for this target, from 0.
    pub turn: usize,
}

impl Request {
    /// Nothing if the client has gone, or if it speaks something else.
    fn read(stream: &mut BufReader<TcpStream>) -> Option<Self> {
        let mut line = String::new();
        stream.read_line(&mut line).ok()?;
        let mut words = line.split_whitespace();
        let method = words.next()?.to_owned();
        if !["GET", "POST"].contains(&method.as_str()) {
            return None;
        }
        let target = words.next()?.to_owned();
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).ok()?;
            let Some((name, value)) = line.split_once(':') else { break };
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let (body, at) = (Vec::new(), Instant::now());
        let mut request = Self { method, target, headers, body, at, turn: 0 };
        let length = request.header("content-length").map_or(0, |length| length.parse().unwrap());
        request.body.resize(length, 0);
        stream.read_exact(&mut request.body).ok()?;
        Some(request)
    }

    /// A header, by its name in small letters.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    /// Where the rest begins that is asked for.
    pub fn range(&self) -> Option<usize> {
        let start = self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?;
        Some(start.parse().unwrap())
    }

    /// Everything that was sent, for looking for what must not be in it.
    pub fn text(&self) -> String {
        format!("{self:?}")
    }
}

/// What is answered, right or wrong.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// How long the body is said to be; nothing is said without it.
    length: Option<usize>,
    then: Then,
}

/// What follows the body.
#[derive(Debug, Clone)]
enum Then {
    /// The connection's clean end.
    End,
    /// Its end as an error.
    Reset,
    /// Nothing, for as long as the client waits.
    Stall,
    /// This, again and again, for as long as the client takes it.
    Repeat(Vec<u8>),
}

impl Reply {
    pub fn ok(body: impl Into<Vec<u8>>) -> Self {
        Self::status(200).with_body(body)
    }

    pub fn json(value: &Value) -> Self {
        Self::ok(value.to_string()).with("Content-Type", "application/json")
    }

    pub fn status(status: u16) -> Self {
        let (headers, body) = (Vec::new(), Vec::new());
        Self { status, headers, body, length: Some(0), then: Then::End }
    }

    pub fn redirect(to: &str) -> Self {
        Self::status(302).with("Location", to)
    }

    /// The rest of a file, from there on.
    pub fn rest(body: &[u8], from: usize) -> Self {
        let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
        Self::status(206).with_body(&body[from..]).with("Content-Range", &range)
    }

    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn with_body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self.length = Some(self.body.len());
        self
    }

    /// Says that the body has another length than it has.
    pub fn announcing(mut self, length: usize) -> Self {
        self.length = Some(length);
        self
    }

    /// Says nothing of the body's length: it is what comes until the end.
    pub fn unannounced(mut self) -> Self {
        self.length = None;
        self
    }

    /// Sends only so much of what was announced, and ends.
    pub fn cut_after(mut self, length: usize) -> Self {
        self.body.truncate(length);
        self
    }

    pub fn then_reset(mut self) -> Self {
        self.then = Then::Reset;
        self
    }

    pub fn then_stall(mut self) -> Self {
        self.then = Then::Stall;
        self
    }

    pub fn then_repeat(mut self, chunk: Vec<u8>) -> Self {
        self.then = Then::Repeat(chunk);
        self
    }

    fn send(&self, mut stream: TcpStream) -> io::Result<()> {
        let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        // These two have none (RFC 9110, 6.4.1).
        if let Some(length) = self.length.filter(|_| ![204, 304].contains(&self.status)) {
            head += &format!("Content-Length: {length}\r\n");
        }
        stream.write_all((head + "\r\n").as_bytes())?;
        stream.write_all(&self.body)?;
        match &self.then {
            Then::End => end(stream),
            Then::Reset => SockRef::from(&stream).set_linger(Some(Duration::ZERO))?,
            Then::Stall => drop(io::copy(&mut stream, &mut io::sink())),
            Then::Repeat(chunk) => while stream.write_all(chunk).is_ok() {},
        }
        Ok(())
    }
}

/// A server that answers as a test says, and remembers what it was asked.
pub struct Web {
    server: Server,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Web {
    pub fn answers(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        Self::on(Ipv4Addr::LOCALHOST.into(), answer)
    }

    /// The same on an address of the test's choice.
    pub fn on(address: IpAddr, answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let requests = Arc::<Mutex<Vec<Request>>>::default();
        let remembered = Arc::clone(&requests);
        let server = Server::on(SocketAddr::new(address, 0), move |stream| {
            let mut reader = BufReader::new(stream.try_clone().unwrap());
            let Some(mut request) = Request::read(&mut reader) else { return };
            {
                let mut known = remembered.lock().unwrap();
                let same = |other: &&Request| other.target == request.target;
                request.turn = known.iter().filter(same).count();
                known.push(request.clone());
            }
            // A client that goes in the middle is a client's business.
            let _ = answer(&request).send(stream);
        });
        Self { server, requests }
    }

    /// The same answer to everything.
    pub fn always(reply: Reply) -> Self {
        Self::answers(move |_| reply.clone())
    }

    /// One that nobody should ask.
    pub fn forbidden(address: IpAddr) -> Self {
        Self::on(address, |_| Reply::ok("forbidden"))
    }

    /// A listing at `/list.json`, and whatever else.
    pub fn lists(
        listing: impl Fn(usize) -> Value + Send + Sync + 'static,
        answer: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::answers(move |request| match request.target.as_str() {
            "/list.json" => Reply::json(&listing(request.turn)),
            _ => answer(request),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    pub fn port(&self) -> u16 {
        self.server.address.port()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.server.address)
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    /// The requests so far for this path.
    pub fn requests_for(&self, target: &str) -> Vec<Request> {
        let mut requests = self.requests();
        requests.retain(|request| request.target == target);
        requests
    }
}

/// An authority that nobody trusts, and what it vouches for: `localhost` and 127.0.0.1.
pub struct Authority;

impl Authority {
    /// Writes `ca.pem`, `leaf.pem` and `leaf.key` into a folder.
    pub fn write(folder: &Path) {
        let config = "\
[req]
distinguished_name = name
prompt = no
[name]
CN = handout's test
[ca]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, digitalSignature
subjectAltName = DNS:localhost, IP:127.0.0.1
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
";
        fs::write(folder.join("openssl.cnf"), config).unwrap();
        let request = |extensions: &str, certificate: &str, key: &str, more: &[&str]| {
            let mut command = Command::new("openssl");
            command.args(["req", "-x509", "-config", "openssl.cnf", "-extensions", extensions]);
            command.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc"]);
            command.args(["-days", "2", "-out", certificate, "-keyout", key]).args(more);
            let output = run(command.current_dir(folder).stdin(Stdio::null()));
            assert!(output.status.success(), "{output:?}");
        };
        request("ca", "ca.pem", "ca.key", &[]);
        request("leaf", "leaf.pem", "leaf.key", &["-CA", "ca.pem", "-CAkey", "ca.key"]);
    }
}

/// A real nginx that serves a folder over TLS, and beside it in the clear; it is killed when it is
/// dropped.
pub struct Nginx {
    child: Child,
    folder: TempDir,
    pub address: SocketAddr,
    plain: SocketAddr,
    _ports: [Socket; 2],
}

impl Nginx {
    pub fn start() -> Self {
        Self::start_with("")
    }

    /// Starts it with more for its server, such as `etag off;`. `PLAIN` stands for its address in
    /// the clear, and `SECURE` for its port with TLS.
    pub fn start_with(more: &str) -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST, more)
    }

    /// The same on an address of the test's choice.
    pub fn start_on(address: Ipv4Addr, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::create_dir(path("root")).unwrap();
        Authority::write(folder.path());
        // It cannot choose a port by itself: sockets of ours, which never listen, keep these for it.
        let ports = [(); 2].map(|()| reserve(address));
        let [secure, plain] =
            ports.each_ref().map(|port| port.local_addr().unwrap().as_socket().unwrap());
        let temporary: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
            .map(|kind| format!("{kind}_temp_path {};\n", path("temporary")))
            .concat();
        let config = format!(
            "daemon off; master_process off; pid {pid}; error_log {errors} info;
            events {{ worker_connections 512; }}
            http {{
                log_format told escape=json '{{\"path\":\"$uri\",\"status\":$status,'
                    '\"sent\":$body_bytes_sent,\"range\":\"$http_range\",\"if_range\":\"$http_if_range\",'
                    '\"encoding\":\"$sent_http_content_encoding\",\"scheme\":\"$scheme\",\"connection\":$connection}}';
                access_log {access} told;
                {temporary}
                types {{ application/json json; image/png png; text/html html; }}
                keepalive_requests 10000;
                server {{
                    listen {secure} ssl reuseport; listen {plain} reuseport;
                    ssl_certificate {leaf}; ssl_certificate_key {key};
                    root {root};
                    {more}
                }}
            }}",
            pid = path("pid"),
            errors = path("error.log"),
            access = path("access.log"),
            leaf = path("leaf.pem"),
            key = path("leaf.key"),
            root = path("root"),
            more = more
                .replace("PLAIN", &plain.to_string())
                .replace("SECURE", &secure.port().to_string()),
        );
        fs::write(path("nginx.conf"), config).unwrap();
        let mut command = Command::new("nginx");
        command.args(["-p", &path(""), "-c", &path("nginx.conf")]);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let mut nginx = Self { child, folder, address: secure, plain, _ports: ports };
        eventually("nginx", || {
            let told = fs::read_to_string(nginx.inside("error.log")).unwrap_or_default();
            assert!(nginx.child.try_wait().unwrap().is_none(), "{told}");
            // It makes this file when it listens.
            nginx.inside("pid").exists()
        });
        nginx
    }

    fn inside(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A file that it serves.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("root").join(name)
    }

    /// Gives it a file, last modified at this second.
    pub fn has(&self, name: &str, content: &[u8], modified: u64) -> &Self {
        fs::write(self.path(name), content).unwrap();
        touch(&self.path(name), modified);
        self
    }

    /// Gives it `list.json`, which lists these files by URL relative to it.
    pub fn lists(&self, names: &[&str], modified: u64) -> &Self {
        let list: Vec<_> = names.iter().map(|name| json!({ "url": name })).collect();
        self.has("list.json", json!(list).to_string().as_bytes(), modified)
    }

    pub fn url(&self, path: &str) -> String {
        format!("https://{}/{path}", self.address)
    }

    pub fn plain_url(&self, path: &str) -> String {
        format!("http://{}/{path}", self.plain)
    }

    /// The certificate of the authority that vouches for it.
    pub fn authority(&self) -> String {
        self.inside("ca.pem").into_os_string().into_string().unwrap()
    }

    /// What it was asked so far: `path`, `status`, `sent`, `range`, `if_range`, `encoding`, `scheme`,
    /// `connection`.
    pub fn requests(&self) -> Vec<Value> {
        let log = fs::read_to_string(self.inside("access.log")).unwrap_or_default();
        // The last line may be half written.
        let whole = log.rfind('\n').map_or("", |end| &log[..end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits until it has told of so many requests, and returns those that follow these.
    pub fn requests_after(&self, known: usize, count: usize) -> Vec<Value> {
        eventually("nginx's log", || self.requests().len() >= known + count);
        self.requests().split_off(known)
    }
}

/// A port that nobody else gets, but who listens there with `SO_REUSEPORT`.
pub fn reserve(address: Ipv4Addr) -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.bind(&SocketAddr::from((address, 0)).into()).unwrap();
    socket
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Says when a file was last modified, in seconds since 1970.
pub fn touch(path: &Path, modified: u64) {
    let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(modified);
    fs::File::options().write(true).open(path).unwrap().set_modified(modified).unwrap();
}

/// When a file was last modified, in seconds since 1970.
pub fn modified(path: &Path) -> u64 {
    let modified = fs::metadata(path).unwrap().modified().unwrap();
    modified.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// A time as HTTP writes it, in seconds since 1970.
pub fn http_date(seconds: u64) -> String {
    let time = Timestamp::from_second(seconds.try_into().unwrap()).unwrap();
    time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

/// Whether a condition comes to hold before the deadline; for servers, which must not panic.
pub fn comes_to_hold(mut holds: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !holds() {
        if start.elapsed() > DEADLINE {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(2));
    }
    true
}
