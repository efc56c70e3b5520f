//! The clients that people have get the right bytes: nc, telnet, ncat, socat, busybox, bash, curl,
//! Python, rdate.

use std::net::SocketAddr;
use std::process::{Command, Stdio};

use crate::common::{Daemon, decode, run, sample};

/// A daemon with one service of each kind; the picture is as large as a real one.
fn daemon() -> (Daemon, Vec<u8>) {
    let picture = sample(1, 186_068);
    let daemon = Daemon::start_with(
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"%Y year\"\n\
         [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"guido.jpg\"",
        &[("guido.jpg", &picture)],
        |_| {},
    );
    (daemon, picture)
}

/// Runs a client, bounded in time, and gives what it printed.
fn printed(client: &str, arguments: &[&str], stdin: Stdio) -> Vec<u8> {
    let mut command = Command::new("timeout");
    let output = run(command.arg("60").arg(client).args(arguments).stdin(stdin));
    assert!(
        !output.stdout.is_empty(),
        "{client} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Both services, as a client prints them that is given these arguments for an address.
fn gets_both(client: &str, arguments: impl Fn(SocketAddr) -> Vec<String>, stdin: fn() -> Stdio) {
    let (daemon, picture) = daemon();
    let ask = |service| {
        let arguments = arguments(daemon.tcp(service));
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        printed(client, &arguments, stdin())
    };
    let time = String::from_utf8(ask("time.clock")).unwrap();
    let year = jiff::Zoned::now().with_time_zone(jiff::tz::TimeZone::UTC).year();
    assert_eq!(time, format!("{year} year\n"));
    assert_eq!(decode(&ask("file.picture")), ("guido.jpg".to_owned(), picture));
    let outcomes: Vec<_> =
        daemon.wait_for_connections(2).iter().map(|line| line["outcome"].clone()).collect();
    assert_eq!(outcomes, ["complete", "complete"]);
}

fn host_and_port(address: SocketAddr) -> Vec<String> {
    vec![address.ip().to_string(), address.port().to_string()]
}

fn after(first: &'static [&'static str]) -> impl Fn(SocketAddr) -> Vec<String> {
    move |address| {
        let first = first.iter().map(ToString::to_string);
        first.chain(host_and_port(address)).collect()
    }
}

/// An input that has a line in it, as when somebody pressed Enter.
fn a_line() -> Stdio {
    let mut echo = Command::new("echo").stdout(Stdio::piped()).spawn().unwrap();
    let output = echo.stdout.take().unwrap();
    echo.wait().unwrap();
    output.into()
}

#[test]
fn netcat_openbsd_without_input() {
    gets_both("nc.openbsd", after(&["-d"]), Stdio::null);
}

#[test]
fn netcat_openbsd_that_half_closes_after_a_line() {
    gets_both("nc.openbsd", after(&["-N"]), a_line);
}

#[test]
fn ncat_that_only_receives() {
    gets_both("ncat", after(&["--recv-only"]), Stdio::null);
}

#[test]
fn ncat_after_a_line() {
    gets_both("ncat", after(&[]), a_line);
}

#[test]
fn socat() {
    gets_both(
        "socat",
        |address| vec!["-u".into(), format!("TCP:{address}"), "-".into()],
        Stdio::null,
    );
}

#[test]
fn busybox_nc() {
    gets_both("busybox", after(&["nc"]), Stdio::null);
}

#[test]
fn a_shell_with_dev_tcp() {
    let script = |address: SocketAddr| {
        vec!["-c".into(), format!("cat < /dev/tcp/{}/{}", address.ip(), address.port())]
    };
    gets_both("bash", script, Stdio::null);
}

#[test]
fn curl_with_telnet() {
    gets_both("curl", |address| vec!["-sS".into(), format!("telnet://{address}")], Stdio::null);
}

#[test]
fn telnet_prints_the_reply_between_its_own_lines() {
    let (daemon, picture) = daemon();
    for service in ["time.clock", "file.picture"] {
        // The shell keeps telnet's input open until the connection is closed: at the end of its
        // input, telnet would leave at once. Its output goes to a file, because telnet sets its
        // standard output to non-blocking and discards what a full pipe does not take at the end.
        let address = daemon.tcp(service);
        let script = format!(
            "mkfifo \"$0/{service}\"; exec 3<>\"$0/{service}\"; \
             telnet {} {} <&3 >\"$0/printed\"; cat \"$0/printed\"",
            address.ip(),
            address.port()
        );
        let folder = daemon.folder.path().to_str().unwrap();
        let output = printed("bash", &["-c", &script, folder], Stdio::null());
        let output = String::from_utf8(output).unwrap().replace('\r', "");
        let reply = output.lines().find(|line| line.ends_with(" year") || line.starts_with('{'));
        let reply = reply.unwrap_or_else(|| panic!("{output}"));
        let outcomes = daemon.wait_for_connections(1);
        assert!(outcomes.iter().all(|line| line["outcome"] == "complete"), "{outcomes:#?}");
        if service == "file.picture" {
            assert_eq!(decode(reply.as_bytes()).1, picture);
        }
    }
}

#[test]
fn python_with_the_standard_library() {
    let (daemon, picture) = daemon();
    let script = "
import base64, json, socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as s:
    data = b''.join(iter(lambda: s.recv(4096), b''))
document = json.loads(data)
assert list(document) == ['filename', 'filedata'], list(document)
assert document['filename'] == 'guido.jpg'
sys.stdout.buffer.write(base64.b64decode(document['filedata'], validate=True))
";
    let address = daemon.tcp("file.picture");
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    assert_eq!(printed("python3", &["-c", script, &host, &port], Stdio::null()), picture);
}

#[test]
fn the_tutorial_s_client_saves_the_file_under_the_name_in_the_document() {
    let (daemon, picture) = daemon();
    let folder = tempfile::tempdir().unwrap();
    let script = "
import base64, json, os, socket, sys
os.chdir(sys.argv[3])
s = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
s.connect((sys.argv[1], int(sys.argv[2])))
data = b''
while True:
    part = s.recv(1024)
    if not part:
        break
    data += part
s.close()
document = json.loads(data.decode())
with open(document['filename'], 'wb') as f:
    f.write(base64.b64decode(document['filedata'].encode()))
print(document['filename'])
";
    let address = daemon.tcp("file.picture");
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    let into = folder.path().to_str().unwrap();
    let name = printed("python3", &["-c", script, &host, &port, into], Stdio::null());
    assert_eq!(name, b"guido.jpg\n");
    assert!(std::fs::read(folder.path().join("guido.jpg")).unwrap() == picture);
}

#[test]
fn python_reads_the_time_as_its_own() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    let script = "
import datetime, socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as s:
    text = b''.join(iter(lambda: s.recv(4096), b'')).decode()
told = datetime.datetime.fromisoformat(text.rstrip('\\n'))
assert abs(told - datetime.datetime.utcnow()) < datetime.timedelta(minutes=2), text
print('right')
";
    let address = daemon.tcp("time.clock");
    let (host, port) = (address.ip().to_string(), address.port().to_string());
    assert_eq!(printed("python3", &["-c", script, &host, &port], Stdio::null()), b"right\n");
}

#[test]
fn rdate_over_tcp_and_udp() {
    let daemon = Daemon::start(
        "[time.clock]\nformat = \"time\"\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]",
    );
    let tcp = daemon.tcp("time.clock").port().to_string();
    let udp = daemon.udp("time.clock").port().to_string();
    let year = jiff::Zoned::now().year().to_string();
    for arguments in [&["-p", "-o", &tcp, "127.0.0.1"][..], &["-p", "-u", "-o", &udp, "127.0.0.1"]]
    {
        let output = String::from_utf8(printed("rdate", arguments, Stdio::null())).unwrap();
        assert!(output.contains(&year), "{output}");
    }
}
