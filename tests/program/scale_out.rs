//! Two replicas behind HAProxy: client addresses are preserved, and the loss of a replica affects
//! only the clients it was serving.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use command_fds::{CommandFdExt, FdMapping};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{
    Daemon, connect, connect_from, decode, eventually, http_get, read_all, run, sample, says,
};

/// More bytes than all buffers between a replica and a client hold.
const PICTURE: usize = 20_000_000;

fn shipped(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/config/scale-out")).join(name)
}

/// Starts a replica on an address, on free or previous ports.
fn replica(address: &str, ports: [u16; 3]) -> Daemon {
    let [clock, picture, metrics] = ports;
    let config = format!(
        "[limits]\nmax-per-client = 20\ndeny = [\"127.0.0.66\"]\n\
         [time.clock]\nlisten = [\"{address}:{clock}\"]\nproxy-protocol = [\"127.0.0.1\"]\n\
         [file.picture]\nlisten = [\"{address}:{picture}\"]\nproxy-protocol = [\"127.0.0.1\"]\n\
         path = \"picture.jpg\"\n\
         [metrics]\nlisten = [\"{address}:{metrics}\"]\n"
    );
    Daemon::start_with(&config, &[("picture.jpg", &sample(11, PICTURE))], |_| {})
}

fn ports(replica: &Daemon) -> [u16; 3] {
    ["time.clock", "file.picture", "metrics"].map(|service| replica.tcp(service).port())
}

/// HAProxy with the shipped configuration and the addresses of this test.
struct Balancer {
    process: Child,
    clock: SocketAddr,
    picture: SocketAddr,
    said: Arc<Mutex<String>>,
    _folder: TempDir,
}

impl Balancer {
    fn start(replicas: [&Daemon; 2]) -> Self {
        let mut config = fs::read_to_string(shipped("haproxy.cfg")).unwrap();
        let mut replace = |shipped: &str, here: String| {
            assert!(config.contains(shipped), "{shipped}: {config}");
            config = config.replace(shipped, &here);
        };
        for (replica, address) in replicas.into_iter().zip(["10.0.0.11", "10.0.0.12"]) {
            let health = replica.tcp("metrics").port();
            for (service, port) in [("time.clock", 6789), ("file.picture", 5566)] {
                let here = format!(" {} port {health}", replica.tcp(service));
                replace(&format!(" {address}:{port}"), here);
            }
        }
        // On inherited sockets with free ports.
        let sockets = [":6789", ":5566"].map(|address| {
            let socket = TcpListener::bind("127.0.0.1:0").unwrap();
            let number = if address == ":6789" { 3 } else { 4 };
            replace(&format!("bind {address}\n"), format!("bind fd@{number}\n"));
            socket
        });
        let [clock, picture] = [0, 1].map(|at| sockets[at].local_addr().unwrap());

        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("haproxy.cfg");
        fs::write(&path, config).unwrap();
        let mappings = sockets
            .into_iter()
            .zip(3..)
            .map(|(socket, child_fd)| FdMapping { parent_fd: socket.into(), child_fd });
        let mut command = Command::new("haproxy");
        command.arg("-db").arg("-f").arg(path).stdin(Stdio::null()).stderr(Stdio::piped());
        command.fd_mappings(mappings.collect()).unwrap();
        let mut process = command.spawn().unwrap();
        let mut stderr = process.stderr.take().unwrap();
        let said = Arc::<Mutex<String>>::default();
        let heard = Arc::clone(&said);
        thread::spawn(move || {
            let mut buffer = [0; 1000];
            while let Ok(length @ 1..) = stderr.read(&mut buffer) {
                heard.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..length]));
            }
        });
        Self { process, clock, picture, said, _folder: folder }
    }

    /// Waits until HAProxy reports every service of a replica as `UP` or `DOWN`.
    fn wait_for(&self, replica: &str, state: &str) {
        for service in ["clock", "picture"] {
            let words = format!("{service}/{replica} is {state}");
            eventually(&words, || self.said.lock().unwrap().contains(&words));
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The result of a client.
#[derive(Debug)]
struct Asked {
    began: Instant,
    failure: Option<String>,
}

/// Clients with different addresses that ask repeatedly until they are stopped.
struct Load {
    over: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Vec<Asked>>>,
}

impl Load {
    fn begin(balancer: &Balancer, document: &Arc<Vec<u8>>) -> Self {
        let over = Arc::<AtomicBool>::default();
        let client = |number: u8| {
            let (over, document) = (Arc::clone(&over), Arc::clone(document));
            let (clock, picture) = (balancer.clock, balancer.picture);
            let source = format!("127.0.0.{}", 100 + number);
            thread::spawn(move || {
                let mut asked = Vec::new();
                while !over.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let failure = match number {
                        0 => ask(&source, picture, |reply| reply == *document),
                        _ => ask(&source, clock, |reply| reply.len() == 27),
                    };
                    asked.push(Asked {
                        began,
                        failure: failure.err().map(|error| error.to_string()),
                    });
                }
                asked
            })
        };
        Self { clients: (0..5).map(client).collect(), over }
    }

    /// Stops the clients and returns their results.
    fn end(self) -> Vec<Asked> {
        self.over.store(true, Ordering::Relaxed);
        self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    }
}

fn ask(source: &str, address: SocketAddr, is_right: impl Fn(&[u8]) -> bool) -> io::Result<()> {
    let mut reply = Vec::new();
    connect_from(source, address).read_to_end(&mut reply)?;
    if is_right(&reply) {
        Ok(())
    } else {
        Err(io::Error::other(format!("a reply of {} bytes", reply.len())))
    }
}

/// Returns the number of connections that a replica completed.
fn served(replica: &Daemon) -> usize {
    replica.lines().iter().filter(|line| line["outcome"] == "complete").count()
}

/// Returns a client in the middle of a transfer, and its data so far.
fn begun(balancer: &Balancer) -> (TcpStream, Vec<u8>) {
    let mut stream = connect(balancer.picture);
    let mut document = vec![0; 1000];
    stream.read_exact(&mut document).unwrap();
    (stream, document)
}

#[test]
fn ships_a_valid_haproxy_configuration() {
    let output = run(Command::new("haproxy").args(["-c", "-f"]).arg(shipped("haproxy.cfg")));
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn applies_limits_to_clients_behind_haproxy() {
    let replicas = [replica("127.0.0.11", [0; 3]), replica("127.0.0.12", [0; 3])];
    let balancer = Balancer::start([&replicas[0], &replicas[1]]);
    for number in 0..10 {
        // With both versions of the protocol.
        let source = format!("127.0.0.{}", 7 + number);
        ask(&source, balancer.clock, |reply| reply.len() == 27).unwrap();
        let is_picture = |reply: &[u8]| decode(reply).1.len() == PICTURE;
        ask(&source, balancer.picture, is_picture).unwrap();
    }
    let lines = || replicas.iter().flat_map(|replica| replica.wait_for_connections(0));
    eventually("every line", || lines().count() == 20);
    for number in 0..10 {
        let peer = format!("127.0.0.{}:", 7 + number);
        let own = lines().filter(|line| line["peer"].as_str().unwrap().starts_with(&peer));
        let services: Vec<_> = own.map(|line| line["service"].clone()).collect();
        assert_eq!(services.len(), 2, "{peer}");
        assert!(services.contains(&"time.clock".into()), "{services:?}");
    }
    // The load is balanced.
    assert!(replicas.iter().all(|replica| served(replica) >= 1));

    assert!(ask("127.0.0.66", balancer.clock, |reply| reply.len() == 27).is_err());
    let refused = replicas.into_iter().any(|mut replica| {
        assert!(replica.stop().success());
        replica.lines().iter().any(|line| says(line, "1 not permitted"))
    });
    assert!(refused);
}

#[test]
fn loses_no_client_during_a_rolling_restart() {
    let one = replica("127.0.0.11", [0; 3]);
    let two = replica("127.0.0.12", [0; 3]);
    let document = Arc::new(direct(&one));
    let balancer = Balancer::start([&one, &two]);
    let load = Load::begin(&balancer, &document);
    let mut slow = [begun(&balancer), begun(&balancer)];
    let mut came_back = Vec::new();
    for (name, mut replica, address) in [("one", one, "127.0.0.11"), ("two", two, "127.0.0.12")] {
        eventually("clients of it", || served(&replica) > 20);
        replica.signal(Signal::TERM);
        replica.wait_for_message("stopping: ");
        // A draining replica reports it, then disappears.
        balancer.wait_for(name, "DOWN");
        if name == "one" {
            for (stream, document) in &mut slow {
                stream.read_to_end(document).unwrap();
            }
        }
        assert!(replica.wait().success());
        assert_eq!(replica.wait_for_message("stopped: ")["reset"], 0);
        let again = self::replica(address, ports(&replica));
        balancer.wait_for(name, "UP");
        eventually("clients of the one that came back", || served(&again) > 20);
        came_back.push(again);
    }
    let asked = load.end();
    assert!(asked.len() > 100, "{}", asked.len());
    let failed: Vec<_> = asked.iter().filter(|asked| asked.failure.is_some()).collect();
    assert!(failed.is_empty(), "{} of {}: {failed:?}", failed.len(), asked.len());
    for (_, received) in slow {
        assert!(received == *document);
    }
}

#[test]
fn loses_only_the_clients_of_a_killed_replica() {
    let mut replicas = [replica("127.0.0.11", [0; 3]), replica("127.0.0.12", [0; 3])];
    let document = Arc::new(direct(&replicas[0]));
    let balancer = Balancer::start([&replicas[0], &replicas[1]]);
    // One client per replica.
    let mut slow = [begun(&balancer), begun(&balancer)];
    let load = Load::begin(&balancer, &document);
    eventually("clients of both", || replicas.iter().all(|replica| served(replica) > 20));
    replicas[0].child.kill().unwrap();
    replicas[0].wait();
    // Until then, clients may have entered its accept queues.
    let gone = Instant::now();
    let before = served(&replicas[1]);
    balancer.wait_for("one", "DOWN");
    eventually("clients of the other", || served(&replicas[1]) > before + 100);

    let asked = load.end();
    let failed = || asked.iter().filter(|asked| asked.failure.is_some());
    assert!(failed().all(|asked| asked.began < gone), "{:?}", failed().collect::<Vec<_>>());
    let whole = slow.iter_mut().filter_map(|(stream, received)| {
        let ended = stream.read_to_end(received);
        (ended.is_ok() && *received == *document).then_some(())
    });
    assert_eq!(whole.count(), 1);
}

#[test]
fn sends_no_clients_to_an_unhealthy_replica() {
    let replicas = [replica("127.0.0.11", [0; 3]), replica("127.0.0.12", [0; 3])];
    let balancer = Balancer::start([&replicas[0], &replicas[1]]);
    let picture = replicas[0].path("picture.jpg");
    fs::rename(&picture, picture.with_extension("away")).unwrap();
    balancer.wait_for("one", "DOWN");
    assert!(http_get(replicas[0].tcp("metrics"), "/healthz").0.contains("503"));
    let before = replicas.each_ref().map(served);
    for _ in 0..10 {
        assert_eq!(read_all(balancer.clock).len(), 27);
    }
    eventually("all of them at the other", || served(&replicas[1]) == before[1] + 10);
    assert_eq!(served(&replicas[0]), before[0]);
    fs::rename(picture.with_extension("away"), &picture).unwrap();
    balancer.wait_for("one", "UP");
    eventually("its share", || {
        assert_eq!(read_all(balancer.clock).len(), 27);
        served(&replicas[0]) > before[0]
    });
}

/// Returns the objects of the Kubernetes manifest.
fn manifest() -> Vec<Value> {
    let script =
        "import json, sys, yaml; print(json.dumps(list(yaml.safe_load_all(open(sys.argv[1])))))";
    // Debian's Python has the module.
    let mut python = Command::new("/usr/bin/python3");
    let output = run(python.args(["-c", script]).arg(shipped("kubernetes.yaml")));
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn of_kind<'a>(manifest: &'a [Value], kind: &str) -> &'a Value {
    manifest.iter().find(|object| object["kind"] == kind).unwrap()
}

/// Writes files like the kubelet those of a ConfigMap: links to a folder that is replaced as a
/// whole.
fn lay(folder: &Path, version: &str, files: &Value) {
    fs::create_dir(folder.join(version)).unwrap();
    for (name, content) in files.as_object().unwrap() {
        fs::write(folder.join(version).join(name), content.as_str().unwrap()).unwrap();
        let _ = symlink(Path::new("..data").join(name), folder.join(name));
    }
    symlink(version, folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
}

#[test]
fn kubernetes_manifest_serves_its_probes_and_new_files() {
    let manifest = manifest();
    let mut files = of_kind(&manifest, "ConfigMap")["data"].clone();
    let pod = &of_kind(&manifest, "Deployment")["spec"]["template"]["spec"];
    let container = &pod["containers"][0];
    let config = files["handout.toml"].as_str().unwrap().to_owned();

    // Each port belongs to a service and is referenced by name.
    let ports = container["ports"].as_array().unwrap();
    for port in ports {
        assert!(config.contains(&format!("\"0.0.0.0:{}\"", port["containerPort"])), "{port}");
    }
    let names: Vec<_> = ports.iter().map(|port| &port["name"]).collect();
    for port in of_kind(&manifest, "Service")["spec"]["ports"].as_array().unwrap() {
        assert!(names.contains(&&port["targetPort"]), "{port}");
    }

    let folder = tempfile::tempdir().unwrap();
    let free = ports.iter().fold(config, |config, port| {
        config.replace(&format!("0.0.0.0:{}", port["containerPort"]), "127.0.0.1:0")
    });
    files["handout.toml"] = free.into();
    lay(folder.path(), "..1", &files);
    let daemon = Daemon::run(folder, |_| {});
    for probe in ["readinessProbe", "livenessProbe"] {
        let get = &container[probe]["httpGet"];
        assert!(names.contains(&&get["port"]));
        let (head, _) = http_get(daemon.tcp("metrics"), get["path"].as_str().unwrap());
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    }
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    let hello = || decode(&read_all(daemon.tcp("file.hello")));
    assert_eq!(hello(), ("hello.txt".to_owned(), b"Hello from handout.\n".to_vec()));
    files["hello.txt"] = "Hello again.".into();
    lay(daemon.folder.path(), "..2", &files);
    eventually("the new file", || hello().1 == b"Hello again.");

    // The kubelet waits for preStop and the configured grace.
    let stop = container["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
    assert!(pod["terminationGracePeriodSeconds"].as_u64().unwrap() > stop + 30);
    assert!(files["handout.toml"].as_str().unwrap().contains("grace = \"30s\""));
}

#[test]
fn kubernetes_manifest_matches_the_schemas() {
    if Command::new("kubernetes-validate").arg("--version").output().is_err() {
        println!("NOT CHECKED: there is no kubernetes-validate (pip install kubernetes-validate)");
        return;
    }
    let mut validate = Command::new("kubernetes-validate");
    let output = run(validate.arg("--strict").arg(shipped("kubernetes.yaml")));
    assert!(output.status.success(), "{output:?}");
}

/// Returns the document of a replica, which accepts PROXY headers from this test.
fn direct(replica: &Daemon) -> Vec<u8> {
    let mut stream = connect_from("127.0.0.1", replica.tcp("file.picture"));
    stream.write_all(b"PROXY UNKNOWN\r\n").unwrap();
    let mut document = Vec::new();
    stream.read_to_end(&mut document).unwrap();
    document
}
