//! Clients keep their own addresses behind a balancer that is believed, and nobody else is believed.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::time::Instant;

use proxy_header::{ProxiedAddress, ProxyHeader, Tlv};
use rustix::process::Signal;

use crate::common::{
    DEADLINE, Daemon, connect, connect_from, eventually, metric, read_all, send_and_half_close,
};

/// The balancer. Whoever does not say so connects from 127.0.0.1.
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

/// A time service and a folder that believe the balancer, with these keys as well.
fn daemon(keys: &str) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    for name in ["a.txt", "b.txt"] {
        fs::write(folder.path().join("files").join(name), name).unwrap();
    }
    let config = config(&format!("proxy-protocol = [\"{BALANCER}\"]\n{keys}"));
    Daemon::start_in(folder, &config, |_| {})
}

/// The balancer begins a connection with these bytes.
fn begin(address: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = connect_from(BALANCER, address);
    stream.set_nodelay(true).unwrap();
    stream.write_all(bytes).unwrap();
    stream
}

/// What the client behind the balancer gets of the time service; nothing is a reset.
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

/// What a folder says of these requests in its replies: the names, in order.
fn names(replies: &str) -> Vec<String> {
    let replies = replies.lines().map(|line| serde_json::from_str(line).unwrap());
    replies.map(|reply: serde_json::Value| reply["filename"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_client_behind_a_balancer_is_logged_by_its_own_address() {
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
fn a_balancer_that_speaks_for_itself_is_a_client_as_any_other() {
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
    // So the access lists are about itself.
    let daemon = self::daemon("deny = [\"127.0.0.2\"]");
    assert_eq!(time(&daemon, LOCAL), None);
    assert_eq!(time(&daemon, &v2("192.0.2.7:4321")).unwrap().len(), 27);
    assert!(refused(&daemon, "time.clock", "access") >= 1.0);
}

#[test]
fn requests_in_one_packet_with_the_header_are_answered_in_order() {
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
fn a_header_that_comes_byte_by_byte_is_one() {
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
fn what_does_not_begin_with_a_header_is_reset_counted_and_summed_up() {
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
    // Half of one, and none, and then the end.
    for part in [&v2("192.0.2.7:4321")[..20], &v1("192.0.2.7:4321")[..30], b""] {
        let stream = begin(address, part);
        stream.shutdown(Shutdown::Write).unwrap();
        assert!(is_reset(stream), "{part:?}");
    }
    assert_eq!(refused(&daemon, "time.clock", "proxy-protocol"), 9.0);
    assert_eq!(active(&daemon, "time.clock"), 0.0);
    assert_eq!(time(&daemon, &v1("192.0.2.7:4321")).unwrap().len(), 27);
    assert!(daemon.stop().success());
    assert_eq!(daemon.wait_for_message("no PROXY header")["headless"], 9);
    // One line for all of them, and one for the client.
    assert_eq!(daemon.wait_for_connections(1).len(), 1);
}

#[test]
fn a_header_from_anybody_else_is_a_request_and_believed_by_nobody() {
    let daemon = daemon("deny = [\"192.0.2.7\"]");
    // Who has a header sends it first: here it is the name of a file that there is not.
    let mut stream = connect(daemon.tcp("file.files"));
    send_and_half_close(&mut stream, &[&v1("192.0.2.7:4321")[..], b"a.txt\n"].concat());
    let mut replies = String::new();
    stream.read_to_string(&mut replies).unwrap();
    assert_eq!(names(&replies), ["PROXY TCP4 192.0.2.7 127.0.0.1 4321 6789", "a.txt"]);
    // And nobody has to have one.
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    for line in daemon.wait_for_connections(2) {
        assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
    }
}

#[test]
fn limits_and_access_lists_are_about_the_client_and_not_about_the_balancer() {
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
    for crowded in ["192.0.2.7:3", "[2001:db8::3]:1"] {
        assert_eq!(ask(crowded).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    for denied in ["192.0.2.66:1", "198.51.100.1:1"] {
        assert_eq!(ask(denied).unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert_eq!(refused(&daemon, "file.files", "max-per-client"), 2.0);
    assert_eq!(refused(&daemon, "file.files", "access"), 2.0);
    assert_eq!(active(&daemon, "file.files"), 5.0);
    // Nothing stays taken.
    drop(held);
    eventually("the end of all", || active(&daemon, "file.files") == 0.0);
    let _again = [ask("192.0.2.7:1").unwrap(), ask("192.0.2.7:2").unwrap()];
}

#[test]
fn a_balancer_that_says_nothing_holds_a_place_for_the_idle_time_out() {
    let daemon = daemon("idle-timeout = \"300ms\"\nmax-connections = 2");
    let address = daemon.tcp("time.clock");
    let header = v1("192.0.2.7:4321");
    let silent = [begin(address, b""), begin(address, &header[..20])];
    eventually("both places taken", || active(&daemon, "time.clock") == 2.0);
    let began = Instant::now();
    // The client who waits behind them is served.
    assert_eq!(time(&daemon, &header).unwrap().len(), 27);
    assert!(began.elapsed() < DEADLINE / 2);
    assert!(silent.into_iter().all(is_reset));
    assert_eq!(refused(&daemon, "time.clock", "proxy-protocol"), 2.0);
}

#[test]
fn a_header_that_comes_drop_by_drop_does_not_stretch_the_idle_time_out() {
    let daemon = daemon("idle-timeout = \"500ms\"");
    let mut stream = begin(daemon.tcp("time.clock"), b"");
    let began = Instant::now();
    // One byte after the other, for longer than that if nobody ends it.
    let reset = v1("192.0.2.7:4321").chunks(1).any(|byte| {
        std::thread::park_timeout(DEADLINE / 600);
        stream.write_all(byte).is_err()
    });
    assert!(reset && began.elapsed() < DEADLINE / 2);
}

#[test]
fn a_connection_whose_header_is_still_to_come_when_the_daemon_stops_is_served() {
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
fn a_header_that_never_comes_does_not_outlast_the_grace() {
    let mut daemon = daemon("idle-timeout = \"1h\"");
    // One service is there to the end, the other goes before.
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
fn a_reload_changes_who_is_believed_from_the_next_connection_on() {
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

    // What was the balancer is a client now, and another has to say whom it speaks for.
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
fn a_balancer_may_be_reached_by_ipv6_and_on_a_socket_for_all_addresses() {
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
    // It is about TCP: whoever may enter the folder is the service's own, and datagrams have none.
    let mut reply = String::new();
    let mut by_unix = std::os::unix::net::UnixStream::connect(daemon.path("clock.sock")).unwrap();
    by_unix.read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    let asker = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    asker.send_to(b"time?", daemon.udp("time.all")).unwrap();
    assert_eq!(asker.recv(&mut [0; 100]).unwrap(), 27);
}
