//! The time service: every format, over TCP, UDP and Unix sockets.

use std::collections::HashSet;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, SystemTime};

use jiff::{SignedDuration, Timestamp};
use rustix::process::Signal;
use serde_json::Value;

use crate::common::{DEADLINE, Daemon, eventually, metric, read_all, refuse, replace, run, says};
use crate::mounts::{self, with_own_mounts};

fn now() -> Timestamp {
    Timestamp::try_from(SystemTime::now()).unwrap()
}

/// Asks a service with these keys, and checks that the time which `read` finds in the reply is
/// between before and after.
fn tells_the_time(keys: &str, resolution: SignedDuration, read: fn(&str) -> Timestamp) {
    let daemon = Daemon::start(&format!(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\n{keys}"
    ));
    let before = now();
    let over_tcp = read_all(daemon.tcp("time.clock"));
    let over_udp = ask_once(daemon.udp("time.clock"), b"").unwrap();
    let after = now();
    for reply in [over_tcp, over_udp] {
        let reply = String::from_utf8(reply).unwrap();
        let told = read(&reply);
        assert!(before - resolution <= told && told <= after, "{before} {reply:?} {after}");
    }
}

fn ask_once(address: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
    let wildcard: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    ask_from(wildcard, address, datagram)
}

fn ask_from(own: IpAddr, address: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind((own, 0)).unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send(datagram).unwrap();
    let mut reply = [0; 2048];
    let length = socket.recv(&mut reply).ok()?;
    Some(reply[..length].to_vec())
}

const MICROSECOND: SignedDuration = SignedDuration::from_micros(1);
const SECOND: SignedDuration = SignedDuration::from_secs(1);

#[test]
fn python_format_is_the_default_and_parses() {
    tells_the_time("timezone = \"UTC\"", MICROSECOND, |reply| {
        let text = reply.strip_suffix('\n').unwrap();
        assert_eq!(text.len(), 26);
        format!("{}Z", text.replace(' ', "T")).parse().unwrap()
    });
}

#[test]
fn rfc3339_has_the_offset_of_the_zone() {
    let keys = "format = \"rfc3339\"\ntimezone = \"Asia/Shanghai\"";
    tells_the_time(keys, MICROSECOND, |reply| {
        assert!(reply.ends_with("+08:00\n"));
        reply.trim().parse().unwrap()
    });
}

#[test]
fn without_newline_text_ends_with_its_last_digit() {
    tells_the_time("format = \"unix\"\nnewline = false", MICROSECOND, |reply| {
        assert!(!reply.ends_with('\n'));
        let (seconds, micros) = reply.split_once('.').unwrap();
        assert_eq!(micros.len(), 6);
        let micros = seconds.parse::<i64>().unwrap() * 1_000_000 + micros.parse::<i64>().unwrap();
        Timestamp::from_microsecond(micros).unwrap()
    });
}

#[test]
fn daytime_ends_with_cr_lf() {
    tells_the_time("format = \"daytime\"\ntimezone = \"UTC\"", SECOND, |reply| {
        let text = reply.strip_suffix("-UTC\r\n").unwrap();
        let civil = jiff::civil::DateTime::strptime("%A, %B %d, %Y %H:%M:%S", text).unwrap();
        civil.to_zoned(jiff::tz::TimeZone::UTC).unwrap().timestamp()
    });
}

#[test]
fn nist_is_the_line_of_its_servers() {
    tells_the_time("format = \"nist\"\ntimezone = \"Asia/Shanghai\"", SECOND, |reply| {
        let line = reply.strip_prefix('\n').unwrap().strip_suffix(" * \n").unwrap();
        let fields: Vec<_> = line.split_whitespace().collect();
        let [day, date, time, saving, leap, health, advance, label] = fields[..] else {
            panic!("{reply:?}")
        };
        assert_eq!((saving.len(), leap.len(), advance, label), (2, 1, "0.0", "UTC(NIST)"));
        assert!(["0", "1", "3"].contains(&health));
        let told: Timestamp = format!("20{date}T{time}Z").parse().unwrap();
        assert_eq!(day.parse::<i64>().unwrap(), 40_587 + told.as_second() / 86_400);
        told
    });
}

#[test]
fn json_says_how_far_the_clock_is_to_be_trusted() {
    tells_the_time("format = \"json\"", MICROSECOND, |reply| {
        let value: serde_json::Value = serde_json::from_str(reply).unwrap();
        assert!(value["synchronized"].is_boolean());
        assert!(value["max-error-us"].is_i64());
        assert!(value["unix"].is_f64());
        value["time"].as_str().unwrap().parse().unwrap()
    });
}

#[test]
fn where_the_clock_s_state_may_not_be_read_the_log_says_so_once_for_each_service() {
    let service = |name: &str, format: &str| {
        format!("[time.{name}]\nlisten = [\"127.0.0.1:0\"]\nformat = \"{format}\"\n")
    };
    let config = service("json", "json") + &service("nist", "nist") + &service("plain", "python");
    let refusals = tempfile::NamedTempFile::new().unwrap();
    let daemon = Daemon::start_with(&config, &[], |command| {
        refuse(command, "adjtimex,clock_adjtime", "EPERM", refusals.path());
    });
    let warned = || {
        let lines = daemon.lines().into_iter().filter(|line| says(line, "see clock-state.conf"));
        let services = lines.map(|line| {
            assert_eq!(line["level"], "WARN");
            line["service"].as_str().unwrap().to_owned()
        });
        services.collect::<Vec<_>>()
    };
    assert_eq!(warned(), ["time.json", "time.nist"]);
    for _ in 0..2 {
        let told: serde_json::Value =
            serde_json::from_slice(&read_all(daemon.tcp("time.json"))).unwrap();
        assert_eq!(told["synchronized"], false);
        assert!(told["max-error-us"].is_null());
        let told = String::from_utf8(read_all(daemon.tcp("time.nist"))).unwrap();
        assert_eq!(told.split_whitespace().nth(5), Some("3"), "{told}");
        read_all(daemon.tcp("time.plain"));
    }
    // A reload says it of what it adds or changes.
    let more = config.replace("python", "json") + &service("more", "nist");
    assert!(says(&daemon.reload(&more), "reloaded: "));
    let mut warned = warned();
    warned[2..].sort();
    assert_eq!(warned, ["time.json", "time.nist", "time.more", "time.plain"]);
}

#[test]
fn a_pattern_is_strftime() {
    tells_the_time("format = \"%s seconds\"", SECOND, |reply| {
        let seconds = reply.strip_suffix(" seconds\n").unwrap();
        Timestamp::from_second(seconds.parse().unwrap()).unwrap()
    });
}

#[test]
fn rfc868_is_four_bytes_and_nothing_else() {
    let daemon = Daemon::start(
        "[time.clock]\nformat = \"time\"\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]",
    );
    let seconds = || now().as_second() + 2_208_988_800;
    let before = seconds();
    let replies =
        [read_all(daemon.tcp("time.clock")), ask_once(daemon.udp("time.clock"), b"").unwrap()];
    for reply in replies {
        let told = i64::from(u32::from_be_bytes(reply.try_into().unwrap()));
        assert!((before..=seconds()).contains(&told));
    }
}

#[test]
fn the_zone_of_the_machine_is_what_tz_says() {
    let daemon = Daemon::start_with(
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"%:z %Q\"",
        &[],
        |command| {
            command.env("TZ", "Asia/Kathmandu");
        },
    );
    assert_eq!(read_all(daemon.tcp("time.clock")), b"+05:45 Asia/Kathmandu\n");
}

/// What a service with `format = "%:z"` says of its zone.
fn offset_told(daemon: &Daemon) -> String {
    String::from_utf8(read_all(daemon.tcp("time.clock"))).unwrap().trim().to_owned()
}

fn zone_file(name: &str) -> Vec<u8> {
    fs::read(Path::new("/usr/share/zoneinfo").join(name)).unwrap()
}

/// Replaces a symbolic link as timedatectl does.
fn replace_link(target: &str, link: &Path) {
    let beside = link.with_extension("new");
    symlink(target, &beside).unwrap();
    fs::rename(beside, link).unwrap();
}

#[test]
fn follows_the_zone_of_the_machine_within_a_minute_and_at_once_on_reload() {
    with_own_mounts(|| {
        mounts::empty("/etc", c"mode=755");
        let localtime = Path::new("/etc/localtime");
        replace_link("../usr/share/zoneinfo/Asia/Shanghai", localtime);
        let config = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"%:z\"\n";
        let daemon = Daemon::start_with(config, &[], |command| {
            command.env_remove("TZ");
        });
        let named = Daemon::start_with(config, &[], |command| {
            command.env("TZ", "Asia/Kathmandu");
        });
        assert_eq!(offset_told(&daemon), "+08:00");
        replace_link("/usr/share/zoneinfo/Asia/Tokyo", localtime);
        eventually("another link", || offset_told(&daemon) == "+09:00");
        assert_eq!(offset_told(&named), "+05:45");
        daemon.wait_for_message("\"local\" is now Asia/Tokyo");
        // A file instead of a link, as of containers, and another with the same name.
        for (zone, offset) in [("Asia/Kathmandu", "+05:45"), ("Asia/Kolkata", "+05:30")] {
            replace(localtime, &zone_file(zone));
            eventually("another file", || offset_told(&daemon) == offset);
        }
        // Absent or malformed: the last one stays, and the log says it once.
        fs::remove_file(localtime).unwrap();
        daemon.wait_for_message("cannot be read");
        assert_eq!(offset_told(&daemon), "+05:30");
        replace(localtime, b"no zone");
        assert!(says(&daemon.reload(config), "reload failed"));
        assert_eq!(offset_told(&daemon), "+05:30");
        replace_link("/usr/share/zoneinfo/Asia/Shanghai", localtime);
        assert!(says(&daemon.reload(config), "reloaded: "));
        assert_eq!(offset_told(&daemon), "+08:00");
        let warnings = |line: &&Value| line["level"] == "WARN" && says(line, "time zone");
        assert_eq!(daemon.lines().iter().filter(warnings).count(), 1);
    });
}

#[test]
fn does_not_warn_on_a_machine_without_a_zone() {
    with_own_mounts(|| {
        mounts::empty("/etc", c"mode=755");
        let database = tempfile::tempdir().unwrap();
        let file = database.path().join("Other");
        fs::write(&file, zone_file("UTC")).unwrap();
        let config = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"%:z\"\n\
                      [time.other]\nlisten = [\"127.0.0.1:0\"]\nformat = \"%:z\"\n\
                      timezone = \"Other\"\n";
        let daemon = Daemon::start_with(config, &[], |command| {
            command.env_remove("TZ").env("TZDIR", database.path());
        });
        // Both services check their zones at the same intervals, first at the start.
        for (zone, offset) in [("Asia/Tokyo", "+09:00"), ("Asia/Kolkata", "+05:30")] {
            replace(&file, &zone_file(zone));
            let expected = format!("{offset}\n").into_bytes();
            eventually("the other zone", || read_all(daemon.tcp("time.other")) == expected);
        }
        assert_eq!(offset_told(&daemon), "+00:00");
        let warnings = daemon.lines().into_iter().filter(|line| line["level"] == "WARN");
        assert_eq!(warnings.collect::<Vec<_>>(), [Value::Null; 0]);
        replace(Path::new("/etc/localtime"), &zone_file("Asia/Tokyo"));
        eventually("a zone", || offset_told(&daemon) == "+09:00");
    });
}

#[test]
fn follows_an_update_of_the_zone_database_within_a_minute_and_at_once_on_reload() {
    let database = tempfile::tempdir().unwrap();
    let file = database.path().join("Asia/Shanghai");
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, zone_file("Asia/Shanghai")).unwrap();
    let config = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"%:z\"\n\
                  timezone = \"asia/shanghai\"\n";
    let daemon = Daemon::start_with(config, &[], |command| {
        command.env("TZDIR", database.path());
    });
    assert_eq!(offset_told(&daemon), "+08:00");
    replace(&file, &zone_file("Asia/Tokyo"));
    eventually("the update", || offset_told(&daemon) == "+09:00");
    replace(&file, &zone_file("Asia/Kathmandu"));
    assert!(says(&daemon.reload(config), "reloaded: "));
    assert_eq!(offset_told(&daemon), "+05:45");
}

#[test]
fn all_ipv4_and_all_ipv6_addresses_go_together_on_one_port() {
    // A free port is found for one; the other must be able to have the same.
    let first = Daemon::start("[time.clock]\nlisten = [\"0.0.0.0:0\"]");
    let port = first.tcp("time.clock").port();
    drop(first);
    let daemon = Daemon::start(&format!(
        "[time.clock]\nlisten = [\"0.0.0.0:{port}\", \"[::]:{port}\", \"udp:0.0.0.0:{port}\", \
         \"udp:[::]:{port}\"]"
    ));
    for host in ["127.0.0.1", "127.0.0.2", "::1"] {
        let address = SocketAddr::new(host.parse().unwrap(), port);
        assert_eq!(read_all(address).len(), 27);
        // A connected socket takes no answer from another address than the one that it asked.
        assert_eq!(ask_once(address, b"\n").unwrap().len(), 27);
    }
    let lines = daemon.wait_for_connections(3);
    let peers: HashSet<_> = lines.iter().map(|line| line["peer"].to_string()).collect();
    assert!(peers.iter().any(|peer| peer.contains("[::1]")), "{peers:?}");
}

#[test]
fn a_datagram_that_could_be_part_of_a_loop_is_not_answered() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"udp:127.0.0.1:0\"]\n[time.other]\nlisten = [\"udp:127.0.0.1:0\"]",
    );
    let (address, other) = (daemon.udp("time.clock"), daemon.udp("time.other"));
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    // Another service of ours on another address, with the port that ours has.
    let twin = UdpSocket::bind(("127.0.0.2", other.port())).unwrap();
    twin.set_nonblocking(true).unwrap();
    twin.send_to(b"time?", address).unwrap();
    // What a reply looks like.
    asker.send_to(b"2026-11-22 13:46:01.123456\n", address).unwrap();
    asker.send_to(b"{\"time\":\"2026-11-22T13:46:01.123456+08:00\",\"unix\":1795326361.123456,\"synchronized\":true,\"max-error-us\":1234}\n", address).unwrap();
    // The service answers in order: once this is answered, the others were not.
    asker.send_to(b"time?", address).unwrap();
    let mut reply = [0; 64];
    let (length, from) = asker.recv_from(&mut reply).unwrap();
    assert_eq!((length, from), (27, address));
    asker.set_nonblocking(true).unwrap();
    assert!(asker.recv_from(&mut reply).is_err());
    assert!(twin.recv_from(&mut reply).is_err());

    drop(daemon_stopped_with_counts(daemon, 1, 3));
}

#[test]
fn the_rate_of_datagrams_is_that_of_the_service_and_not_of_each_socket() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"udp:127.0.0.1:0\", \"udp:127.0.0.2:0\"]\nmax-datagrams = 1\n\
         [metrics]\nlisten = [\"127.0.0.1:0\"]",
    );
    let lines = daemon.lines();
    let addresses: Vec<SocketAddr> = lines
        .iter()
        .filter_map(|line| line["address"].as_str()?.strip_prefix("udp:")?.parse().ok())
        .collect();
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    for address in &addresses {
        asker.send_to(b"time?", address).unwrap();
    }
    asker.recv(&mut [0; 64]).unwrap();
    // Each socket has an event loop of its own: what one has answered says nothing of the other.
    let dropped = "handout_datagrams_total{service=\"time.clock\",outcome=\"rate\"}";
    let metrics = daemon.tcp("metrics");
    eventually("the other datagram", || metric(metrics, dropped) == 1.0);
    drop(daemon_stopped_with_counts(daemon, 1, 1));
}

/// Stops the daemon, which then sums up what it has counted.
/// What a service answers to a datagram, if anything, which is known by its answer to the next.
fn answer_to(address: SocketAddr, datagram: &[u8]) -> Option<Vec<u8>> {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.connect(address).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    socket.send(datagram).unwrap();
    // Another sender, whom the service answers in its turn.
    ask_once(address, b"").unwrap();
    socket.set_nonblocking(true).unwrap();
    let mut reply = [0; 2048];
    let length = socket.recv(&mut reply).ok()?;
    Some(reply[..length].to_vec())
}

#[test]
fn services_whose_patterns_do_not_know_each_other_do_not_answer_each_other_for_ever() {
    let patterns = ["%H:%M:%S", "%A", "on %Y-%m-%d at %H h", "time"];
    let services = patterns.iter().enumerate().map(|(index, pattern)| {
        format!("[time.t{index}]\nlisten = [\"udp:127.0.0.1:0\"]\nformat = \"{pattern}\"\n")
    });
    let daemon = Daemon::start(&services.collect::<String>());
    let addresses: Vec<_> =
        (0..patterns.len()).map(|index| daemon.udp(&format!("time.t{index}"))).collect();
    for one in &addresses {
        for other in &addresses {
            // As if the one had asked the other: by the test's own sockets, as other ports than
            // this daemon's would be those of another daemon.
            let mut datagram = answer_to(*one, b"").unwrap();
            let mut answers = 0;
            for asked in [other, one].into_iter().cycle() {
                let Some(answer) = answer_to(*asked, &datagram) else { break };
                datagram = answer;
                answers += 1;
                assert!(answers <= 2, "{}", datagram.escape_ascii());
            }
        }
        assert!(answer_to(*one, b"time?").is_some());
    }
}

fn daemon_stopped_with_counts(mut daemon: Daemon, answered: u64, dropped: u64) -> Daemon {
    assert!(daemon.stop().success());
    let line = daemon.wait_for_message("datagrams answered");
    assert_eq!(
        (line["answered"].as_u64(), line["dropped"].as_u64()),
        (Some(answered), Some(dropped))
    );
    daemon
}

#[test]
fn a_client_that_asks_too_often_is_answered_less() {
    let daemon =
        Daemon::start("[time.clock]\nlisten = [\"udp:127.0.0.1:0\"]\nmax-datagrams-per-client = 1");
    let asker = UdpSocket::bind("127.0.0.1:0").unwrap();
    asker.connect(daemon.udp("time.clock")).unwrap();
    asker.set_read_timeout(Some(DEADLINE)).unwrap();
    for _ in 0..400 {
        asker.send(b"time?").unwrap();
    }
    let mut reply = [0; 64];
    asker.recv(&mut reply).unwrap();
    let mut daemon = daemon;
    // Datagrams that wait in its queue when it stops are not counted.
    assert!(daemon.stop().success());
    let line = daemon.wait_for_message("datagrams answered");
    let counted = |name: &str| line[name].as_u64().unwrap();
    assert!(counted("dropped") > counted("answered"), "{line}");
}

#[test]
fn a_unix_socket_is_open_to_all_and_gone_after_the_stop() {
    let mut daemon = Daemon::start("[time.clock]\nlisten = [\"unix:clock.sock\"]");
    let path = daemon.path("clock.sock");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    let mut reply = String::new();
    UnixStream::connect(&path).unwrap().read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);
    let line = daemon.wait_for_connections(1).remove(0);
    assert_eq!(line["peer"], format!("unix:uid={}", rustix::process::getuid().as_raw()));
    assert_eq!(line["outcome"], "complete");
    assert!(daemon.stop().success());
    assert!(!path.exists());
}

#[test]
fn a_stale_unix_socket_is_replaced_and_a_live_one_is_not() {
    let config = "[time.clock]\nlisten = [\"unix:clock.sock\"]";
    let mut daemon = Daemon::start(config);
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert!(daemon.path("clock.sock").exists());

    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let second = Daemon::start_in(folder, config, |_| {});
    let mut reply = String::new();
    UnixStream::connect(second.path("clock.sock")).unwrap().read_to_string(&mut reply).unwrap();
    assert_eq!(reply.len(), 27);

    let mut third = crate::common::program();
    let third = run(third.args(["serve", "--config"]).arg(second.path("handout.toml")));
    assert_eq!(third.status.code(), Some(1));
    let message = String::from_utf8(third.stderr).unwrap();
    assert!(message.contains("cannot listen on unix:"), "{message}");
    assert!(message.contains("another program listens there"), "{message}");
    assert!(UnixStream::connect(second.path("clock.sock")).is_ok());
}

#[test]
fn a_unix_socket_that_somebody_else_put_there_stays_at_the_stop() {
    let mut daemon = Daemon::start("[time.clock]\nlisten = [\"unix:clock.sock\"]");
    let path = daemon.path("clock.sock");
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    assert!(daemon.stop().success());
    assert!(path.exists());
}

#[test]
fn a_file_that_is_no_socket_is_not_replaced_by_one() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("clock.sock"), "precious").unwrap();
    let config = folder.path().join("handout.toml");
    std::fs::write(&config, "[time.clock]\nlisten = [\"unix:clock.sock\"]").unwrap();
    let output = run(crate::common::program().args(["serve", "--config"]).arg(config));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(std::fs::read(folder.path().join("clock.sock")).unwrap(), b"precious");
}

#[test]
fn a_flood_of_datagrams_leaves_the_other_services_alone() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\n");
    let flooder = UdpSocket::bind("127.0.0.1:0").unwrap();
    flooder.connect(daemon.udp("time.clock")).unwrap();
    let start = std::time::Instant::now();
    let mut asked = 0;
    while asked < 20 || start.elapsed() < Duration::from_millis(300) {
        for _ in 0..100 {
            let _ = flooder.send(b"flood");
        }
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
        asked += 1;
    }
    // Another client is answered as ever.
    let another = Ipv4Addr::new(127, 0, 0, 2).into();
    assert_eq!(ask_from(another, daemon.udp("time.clock"), b"").unwrap().len(), 27);
}
