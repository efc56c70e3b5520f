//! PROXY headers: accepted from configured load balancers only.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::time::Instant;

use proxy_header::{ProxiedAddress, ProxyHeader, Tlv};
use rustix::process::Signal;

use crate::common::{
    DEADLINE, Daemon, connect, connect_from, eventually, metric, read_all, send_and_half_close,
};

/// The address of the balancer; other clients connect from 127.0.0.1.
const BALANCER: &str = "127.0.0.2";

const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\x00\x00\x00";
const OF_A_UNIX_SOCKET: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x31\x00\xd8";

fn header(client: &str) -> ProxyHeader<'static> {
    let client: SocketAddr = client.parse().unwrap();
    let ours: IpAddr =
        if client.is_ipv4() { [127, 0, 0, 1].into() } else { Ipv6Addr::LOCALHOST.into() };
    ProxyHeader::with_address(ProxiedAddress::stream(client, SocketAddr::new(ours, 6789)))
}

fn v1(client: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    header(client).encode_v1(&mut bytes).unwrap();
    bytes
}

fn v2(client: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    header(client).encode_v2(&mut bytes).unwrap();
    bytes
}

fn config(keys: &str) -> String {
    let keys = format!("listen = [\"127.0.0.1:0\"]\n{keys}\n");
    format!(
        "[daemon]\ngrace = \"1h\"\n[metrics]\nlisten = [\"127.0.0.1:0\"]\n\
         [time.clock]\n{keys}[file.files]\n{keys}path = \"files\"\n"
    )
}

/// Starts a time service and a folder that accept headers from the balancer; `keys` are added to both.
fn daemon(keys: &str) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    for name in ["a.txt", "b.txt"] {
        fs::write(folder.path().join("files").join(name), name).unwrap();
    }
    let config = config(&format!("proxy-protocol = [\"{BALANCER}\"]\n{keys}"));
    Daemon::start_in(folder, &config, |_| {})
}

/// Connects from the balancer and sends `bytes`.
fn begin(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = connect_from(BALANCER, address);
    stream.set_nodelay(true).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

/// Requests the time behind the balancer; `None` if the connection is reset.
fn time(daemon: &Daemon, header: &[u8]) -> Option<String> {
    let mut reply = String::new();
    match begin(daemon.tcp("time.clock"), header).read_to_string(&mut reply) {
        Ok(_) => Some(reply),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            assert_eq!(reply, "");
            None
        }
    }
}

fn is_reset(mut stream: TcpStream) -> bool {
    let read = stream.read(&mut [0; 100]);
    read.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
}

fn refused(daemon: &Daemon, service: &str, reason: &str) -> f64 {
    let name = format!("handout_refused_total{{service=\"{service}\",reason=\"{reason}\"}}");
    metric(daemon.tcp("metrics"), &name)
}

fn active(daemon: &Daemon, service: &str) -> f64 {
    let name = format!("handout_connections_active{{service=\"{service}\"}}");
    metric(daemon.tcp("metrics"), &name)
}

/// The file names in the replies of a folder.
fn names(replies: &str) -> Vec<String> {
    let replies = replies.lines().map(|line| serde_json::from_str(line).unwrap());
    replies.map(|reply: serde_json::Value| reply["filename"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn logs_the_address_of_the_client_behind_a_balancer() {
    let daemon = daemon("");
    let with_field = {
        let field = Tlv::Custom(0xea, vec![7; 100].into());
        let header =
            ProxyHeader::with_tlvs(header("192.0.2.8:1").proxied_address().cloned(), [field]);
        let mut bytes = Vec::new();
        header.encode_v2(&mut bytes).unwrap();
        bytes
    };
    let told = [
        (v1("192.0.2.7:4321"), "192.0.2.7:4321"),
        (v2("192.0.2.7:4322"), "192.0.2.7:4322"),
        (v1("[2001:db8::7]:4321"), "[2001:db8::7]:4321"),
        (v2("[2001:db8::7]:4322"), "[2001:db8::7]:4322"),
        (v2("[::ffff:192.0.2.7]:4323"), "192.0.2.7:4323"),
        (with_field, "192.0.2.8:1"),
    ];
    for (number, (header, client)) in told.iter().enumerate() {
        assert_eq!(time(&daemon, header).unwrap().len(), 27);
        let line = &daemon.wait_for_connections(number + 1)[number];
        assert_eq!(line["peer"], *client);
        assert_eq!((&line["outcome"], &line["bytes"]), (&"complete".into(), &27.into()));
    }
}

#[test]
fn treats_a_balancer_without_a_client_as_a_client() {
    let daemon = daemon("");
    let unix = [OF_A_UNIX_SOCKET, &[0; 216]].concat();
    let own: [&[u8]; 4] =
        [b"PROXY UNKNOWN\r\n", b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", LOCAL, &unix];
    for header in own {
        assert_eq!(time(&daemon, header).unwrap().len(), 27);
    }
    for line in daemon.wait_for_connections(own.len()) {
        assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.2:"), "{line}");
    }
    // Access lists then apply to the balancer.
    let daemon = self::daemon("deny = [\"127.0.0.2\"]");
    assert_eq!(time(&daemon, LOCAL), None);
    assert_eq!(time(&daemon, &v2("192.0.2.7:4321")).unwrap().len(), 27);
    assert!(refused(&daemon, "time.clock", "access") >= 1.0);
}

#[test]
fn answers_requests_in_the_packet_of_the_header() {
    let daemon = daemon("");
    for header in [v1("192.0.2.7:4321"), v2("192.0.2.7:4321"), b"PROXY UNKNOWN\r\n".to_vec()] {
        let mut stream = connect_from(BALANCER, daemon.tcp("file.files"));
        send_and_half_close(&mut stream, &[&header[..], b"a.txt\nb.txt\na.txt"].concat());
        let mut replies = String::new();
        stream.read_to_string(&mut replies).unwrap();
        assert_eq!(names(&replies), ["a.txt", "b.txt", "a.txt"]);
    }
}

#[test]
fn reads_headers_that_arrive_byte_by_byte() {
    let daemon = daemon("");
    for header in [v1("192.0.2.7:4321"), v2("192.0.2.7:4321")] {
        let mut stream = begin(daemon.tcp("file.files"), &[]);
        for byte in [&header[..], b"a.txt\n"].concat() {
            stream.write_all(&[byte]).unwrap();
            std::thread::yield_now();
        }
        stream.shutdown(Shutdown::Write).unwrap();
        let mut replies = String::new();
        stream.read_to_string(&mut replies).unwrap();
        assert_eq!(names(&replies), ["a.txt"]);
    }
    for line in daemon.wait_for_connections(2) {
        assert_eq!(line["peer"], "192.0.2.7:4321");
    }
}

#[test]
fn resets_and_counts_connections_without_a_header() {
    let mut daemon = daemon("");
    let address = daemon.tcp("time.clock");
    let long = format!("PROXY UNKNOWN{}\r\n", " ".repeat(200));
    let too_much = [&LOCAL[..14], &[0x02, 0x09]].concat();
    let wrong: [&[u8]; 6] = [
        b"a.txt\n",
        b"\x16\x03\x01",
        long.as_bytes(),
        &too_much,
        b"PROXY TCP4 192.0.2.7 127.0.0.1 4321\r\n",
        b"PROXY TCP4 192.0.2.7 127.0.0.1 4321 6789\n",
    ];
    for wrong in wrong {
        assert!(is_reset(begin(address, wrong)), "{wrong:?}");
    }
    // Incomplete headers and none, followed by the end of the input.
    for part in [&v2("192.0.2.7:4321")[..20], &v1("192.0.2.7:4321")[..30], b""] {
        let stream = begin(address, part);
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(is_reset(stream), "{part:?}");
    }
    assert_eq!(refused(&daemon, "time.clock", "proxy-protocol"), 9.0);
    assert_eq!(active(&daemon, "time.clock"), 0.0);
    assert_eq!(time(&daemon, &v1("192.0.2.7:4321")).unwrap().len(), 27);
    assert!(daemon.stop().success());
    assert_eq!(daemon.wait_for_message("no PROXY header")["missing_proxy_header"], 9);
    // Rejected connections are summarized in one line.
    assert_eq!(daemon.wait_for_connections(1).len(), 1);
}

#[test]
fn treats_headers_of_other_clients_as_requests() {
    let daemon = daemon("deny = [\"192.0.2.7\"]");
    // The folder takes the header for the name of a missing file.
    let mut stream = connect(daemon.tcp("file.files"));
    send_and_half_close(&mut stream, &[&v1("192.0.2.7:4321")[..], b"a.txt\n"].concat());
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    assert_eq!(names(&replies), ["PROXY TCP4 192.0.2.7 127.0.0.1 4321 6789", "a.txt"]);
    // Other clients need no header.
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    for line in daemon.wait_for_connections(2) {
        assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    }
}

#[test]
fn applies_limits_and_access_lists_to_the_client_behind_a_balancer() {
    let daemon = daemon(
        "allow = [\"192.0.2.0/24\", \"2001:db8::/32\"]\ndeny = [\"192.0.2.66\"]\nmax-per-client = 2",
    );
    let address = daemon.tcp("file.files");
    let ask = |client: &str| {
        let mut stream = begin(address, &[&v2(client)[..], b"a.txt\n"].concat());
        stream.read_exact(&mut [0; 10]).map(|()| stream)
    };
    let mut held = Vec::new();
    for client in ["192.0.2.7:1", "192.0.2.7:2", "192.0.2.8:1", "[2001:db8::1]:1"] {
        held.push(ask(client).unwrap());
    }
    // Another host of the same /64 is the same client; the port does not matter.
    held.push(ask("[2001:db8::2]:1").unwrap());
    for excess in ["192.0.2.7:3", "[2001:db8::3]:1"] {
        assert_eq!(ask(excess).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    for denied in ["192.0.2.66:1", "198.51.100.1:1"] {
        assert_eq!(ask(denied).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(refused(&daemon, "file.files", "max-per-client"), 2.0);
    assert_eq!(refused(&daemon, "file.files", "access"), 2.0);
    assert_eq!(active(&daemon, "file.files"), 5.0);
    // All permits are returned.
    drop(held);
    eventually("the end of all", || active(&daemon, "file.files") == 0.0);
    let _again = [ask("192.0.2.7:1").unwrap(), ask("192.0.2.7:2").unwrap()];
}

#[test]
fn resets_silent_balancers_after_idle_timeout() {
    let daemon = daemon("idle-timeout = \"300ms\"\nmax-connections = 2");
    let address = daemon.tcp("time.clock");
    let header = v1("192.0.2.7:4321");
    let silent = [begin(address, b""), begin(address, &header[..20])];
    eventually("both connections", || active(&daemon, "time.clock") == 2.0);
    let began = Instant::now();
    // A waiting client is served afterwards.
    assert_eq!(time(&daemon, &header).unwrap().len(), 27);
    assert!(began.elapsed() < DEADLINE / 2);
    assert!(silent.into_iter().all(is_reset));
    assert_eq!(refused(&daemon, "time.clock", "proxy-protocol"), 2.0);
}

#[test]
fn does_not_extend_idle_timeout_for_slow_headers() {
    let daemon = daemon("idle-timeout = \"500ms\"");
    let mut stream = begin(daemon.tcp("time.clock"), b"");
    let began = Instant::now();
    // The whole header would take far longer than the time-out.
    let reset = v1("192.0.2.7:4321").chunks(1).any(|byte| {
        std::thread::park_timeout(DEADLINE / 600);
        stream.write_all(byte).is_err()
    });
    assert!(reset && began.elapsed() < DEADLINE / 2);
}

#[test]
fn serves_connections_whose_header_arrives_during_the_drain() {
    let mut daemon = daemon("");
    let header = v1("192.0.2.7:4321");
    let mut stream = begin(daemon.tcp("time.clock"), &header[..9]);
    eventually("the connection", || active(&daemon, "time.clock") == 1.0);
    daemon.signal(Signal::TERM);
    daemon.wait_for_message("stopping: ");
    stream.write_all(&header[9..]).unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    drop(stream);
    assert!(daemon.wait().success());
    assert_eq!(daemon.wait_for_message("stopped: ")["reset"], 0);
}

#[test]
fn resets_connections_without_a_header_after_the_grace() {
    let mut daemon = daemon("idle-timeout = \"1h\"");
    // The reload removes one service; the other serves until the daemon stops.
    let [clock, files] =
        ["time.clock", "file.files"].map(|service| begin(daemon.tcp(service), b"PROXY"));
    for service in ["time.clock", "file.files"] {
        eventually("the connection", || active(&daemon, service) == 1.0);
    }
    let only_clock = "[daemon]\ngrace = \"200ms\"\n[metrics]\nlisten = [\"127.0.0.1:0\"]\n\
                      [time.clock]\nlisten = [\"127.0.0.1:0\"]\nidle-timeout = \"1h\"\n\
                      proxy-protocol = [\"127.0.0.2\"]";
    daemon.reload(only_clock);
    assert!(is_reset(files));
    assert!(daemon.stop().success());
    assert!(is_reset(clock));
    assert_eq!(daemon.wait_for_message("stopped: ")["reset"], 1);
}

#[test]
fn applies_changed_balancers_to_new_connections() {
    let daemon = daemon("");
    let address = daemon.tcp("time.clock");
    let header = v1("192.0.2.7:4321");
    let mut before = begin(address, &header[..9]);
    eventually("the connection", || active(&daemon, "time.clock") == 1.0);
    daemon.reload(&config("proxy-protocol = [\"127.0.0.3\"]"));
    before.write_all(&header[9..]).unwrap();
    let mut reply = String::new();
    before.read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    assert_eq!(daemon.tcp("time.clock"), address);

    // The former balancer is an ordinary client, and the new one must send a header.
    connect_from(BALANCER, address).read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 54);
    let mut other = connect_from("127.0.0.3", address);
    other.write_all(b"none").unwrap();
    assert!(is_reset(other));
    daemon.reload(&config(""));
    connect_from("127.0.0.3", address).read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 81);
}

#[test]
fn accepts_headers_over_ipv6_and_on_wildcard_sockets() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"[::1]:0\"]\nproxy-protocol = [\"::1\"]\n\
         [time.all]\nlisten = [\"0.0.0.0:0\", \"unix:clock.sock\", \"udp:127.0.0.1:0\"]\n\
         proxy-protocol = [\"127.0.0.0/8\"]",
    );
    let ask = |mut stream: TcpStream| {
        stream.write_all(&v2("192.0.2.7:4321")).unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).unwrap();
        assert_eq!(reply.len(), 27);
    };
    ask(connect(daemon.tcp("time.clock")));
    let port = daemon.tcp("time.all").port();
    ask(connect_from(BALANCER, SocketAddr::from(([127, 0, 0, 1], port))));
    for line in daemon.wait_for_connections(2) {
        assert_eq!(line["peer"], "192.0.2.7:4321");
    }
    // Unix sockets and datagrams need no header.
    let mut reply = String::new();
    let mut by_unix = std::os::unix::net::UnixStream::connect(daemon.path("clock.sock")).unwrap();
    by_unix.read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    let asker = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    asker.send_to(b"time?", daemon.udp("time.all")).unwrap();
    assert_eq!(asker.recv(&mut [0; 100]).unwrap(), 27);
}
