//! `handout time`: any time service is asked, and its answer compared with this machine's clock.

use std::fs;
use std::io::Write;
use std::net::{SocketAddr, UdpSocket};
use std::thread::{self, JoinHandle};

use crate::common::{DEADLINE, Daemon, PROGRAM, run};
use crate::servers::{Outcome, Python, Server, bounded, nobody, with_mounts};

/// `handout time` in the zone of the daemon's that the tests start.
fn ask(server: impl ToString, arguments: &[&str]) -> Outcome {
    let mut command = bounded();
    command.arg("time").arg(server.to_string()).args(arguments).env("TZ", "UTC");
    Outcome::of(run(&mut command))
}

/// The offset, its bound and the round trip in seconds, behind the line with the time.
fn offset(outcome: &Outcome) -> [f64; 3] {
    let lines: Vec<_> = outcome.succeeded().text().lines().collect();
    assert_eq!(lines.len(), 2, "{outcome:?}");
    let read = || {
        let (offset, rest) = lines[1].strip_prefix("offset ")?.split_once(" s ± ")?;
        let (bound, round_trip) = rest.strip_suffix(" s")?.split_once(" s, round trip ")?;
        Some([offset.parse().ok()?, bound.parse().ok()?, round_trip.parse().ok()?])
    };
    read().unwrap_or_else(|| panic!("{outcome:?}"))
}

/// Checks that the bound of a service with this machine's clock contains zero.
fn is_right(outcome: &Outcome) {
    let [offset, bound, round_trip] = offset(outcome);
    assert!(offset.abs() <= bound, "{outcome:?}");
    assert!((0.0..60.0).contains(&round_trip), "{outcome:?}");
}

const FORMATS: [&str; 6] = ["python", "rfc3339", "daytime", "nist", "unix", "json"];

#[test]
fn every_text_format_of_the_daemon_is_understood_over_tcp_and_udp() {
    for zone in ["UTC", "Asia/Shanghai"] {
        let services = FORMATS.map(|format| {
            format!(
                "[time.{format}]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\n\
                 format = \"{format}\"\ntimezone = \"{zone}\"\n"
            )
        });
        let daemon = Daemon::start(&services.concat());
        for format in FORMATS {
            let service = format!("time.{format}");
            let arguments = ["--offset", "--timezone", zone];
            is_right(&ask(daemon.tcp(&service), &arguments));
            let arguments = ["--offset", "--timezone", zone, "--udp"];
            is_right(&ask(daemon.udp(&service), &arguments));
        }
    }
}

#[test]
fn rfc868_is_understood_over_tcp_and_udp() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\nformat = \"time\"",
    );
    let arguments = ["--rfc868", "--offset", "--udp"];
    for outcome in
        [ask(daemon.tcp("time.clock"), &arguments[..2]), ask(daemon.udp("time.clock"), &arguments)]
    {
        is_right(&outcome);
        // It is printed for people.
        let line = outcome.text().lines().next().unwrap();
        assert!(line.parse::<jiff::Timestamp>().is_ok(), "{line}");
    }
}

#[test]
fn without_offset_only_what_the_server_said_is_printed() {
    let server = Server::sends("2026-11-22 13:46:01.123456\n");
    let outcome = ask(server.address, &[]);
    assert_eq!(outcome.succeeded().text(), "2026-11-22 13:46:01.123456\n");
    assert_eq!(outcome.stderr, "");
}

#[test]
fn the_tutorial_s_server_is_understood_with_and_without_fraction() {
    for format in ["str(now)", "str(now.replace(microsecond=0))"] {
        let script = format!(
            "
import datetime, socket
s = socket.socket()
s.bind(('127.0.0.1', 0))
s.listen()
print(s.getsockname()[1], flush=True)
conn, address = s.accept()
now = datetime.datetime.now()
conn.send({format}.encode())
conn.close()
"
        );
        let (_python, address) = Python::server(&script);
        is_right(&ask(address, &["--offset", "--timezone", "Asia/Shanghai"]));
    }
}

#[test]
fn a_clock_that_is_wrong_has_its_offset() {
    for (ahead, sign) in [(3600, 1.0), (-86_400, -1.0)] {
        let server = Server::answers(move |mut stream| {
            let told = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(ahead);
            let _ = stream.write_all(told.to_string().as_bytes());
            crate::servers::end(stream);
        });
        let outcome = ask(server.address, &["--offset"]);
        let [offset, bound, _] = offset(&outcome);
        let ahead = f64::from(i32::try_from(ahead).unwrap());
        assert!((offset - ahead).abs() <= bound + 1e-9, "{outcome:?}");
        // The sign is always there.
        let signed = if sign > 0.0 { "offset +" } else { "offset -" };
        assert!(outcome.text().contains(signed), "{outcome:?}");
    }
}

#[test]
fn a_text_that_tells_no_time_is_printed_but_has_no_offset() {
    let server = Server::sends("about noon\n");
    assert_eq!(ask(server.address, &[]).succeeded().text(), "about noon\n");
    let outcome = ask(server.address, &["--offset"]);
    outcome.failed_with(&[&server.address.to_string(), "about noon", "unknown time format"]);
    // RFC 868 has four bytes, neither three nor five.
    for bytes in [&b"abc"[..], b"abcde"] {
        let server = Server::sends(bytes);
        ask(server.address, &["--rfc868"]).failed_with(&["unknown time format"]);
    }
}

#[test]
fn what_a_terminal_would_obey_is_printed_as_one_escaped_line() {
    let server = Server::sends(&b"12:00\x1b[31m\x07now\r\xff\xc2\x9b\xe2\x80\xaex\n"[..]);
    let outcome = ask(server.address, &[]);
    assert_eq!(outcome.succeeded().text(), "12:00\\u{1b}[31m\\u{7}now\\r\\xff\\u{9b}\\u{202e}x\n");
    let outcome = ask(server.address, &["--offset"]);
    outcome.failed_with(&["unknown time format"]);
    let stderr = outcome.stderr.strip_suffix('\n').unwrap();
    assert!(!stderr.contains(|c: char| c.is_control() || c == '\u{202e}'), "{outcome:?}");
    // Escaped once, not twice.
    assert!(stderr.contains("12:00\\u{1b}[31m\\u{7}"), "{outcome:?}");
}

#[test]
fn takes_a_complete_reply_from_a_server_that_leaves_the_close_to_the_client() {
    let four = Server::stalls_after(2_208_988_800_u32.to_be_bytes());
    let outcome = ask(four.address, &["--rfc868", "--timeout", "60s"]);
    assert_eq!(outcome.succeeded().text(), "1970-01-01T00:00:00Z\n");
    let nist = "61366 26-11-22 05:46:01 00 0 0   0.0 UTC(NIST) *";
    let json = "{\"time\":\"2026-11-22T05:46:01.123456Z\",\"unix\":1795326361.123456}";
    for (reply, line) in [
        ("2026-11-22 13:46:01.123456\n".to_owned(), "2026-11-22 13:46:01.123456"),
        (
            "Sunday, November 22, 2026 13:46:01-UTC\r\n".to_owned(),
            "Sunday, November 22, 2026 13:46:01-UTC",
        ),
        (format!("\n{nist} \n"), nist),
        (format!("\r\n\r\n{nist}\n"), nist),
        (format!("{json}\n"), json),
    ] {
        let server = Server::stalls_after(reply);
        let outcome = ask(server.address, &["--offset", "--timeout", "60s"]);
        assert_eq!(outcome.succeeded().text().lines().next(), Some(line), "{outcome:?}");
    }
}

#[test]
fn takes_the_first_line_of_several() {
    for more in [&b"second line\r\n"[..], &[b'x'; 100_000], b"\n\n\n"] {
        let server = Server::sends([&b"\r\n 2026-11-22 13:46:01\r\n"[..], more].concat());
        assert_eq!(ask(server.address, &[]).succeeded().text(), "2026-11-22 13:46:01\n");
    }
    for blank in ["\n", "\r\n \n"] {
        let server = Server::sends(blank);
        ask(server.address, &[]).failed_with(&["without telling the time"]);
    }
}

#[test]
fn prints_an_offset_whose_bound_fits_the_resolution() {
    let server = Server::answers(|mut stream| {
        let seconds = jiff::Timestamp::now().as_second() + 2_208_988_800;
        let _ = stream.write_all(&u32::try_from(seconds).unwrap().to_be_bytes());
    });
    for _ in 0..5 {
        let outcome = ask(server.address, &["--offset", "--rfc868"]);
        is_right(&outcome);
        let [offset, bound, _] = offset(&outcome).map(|number| number.to_string());
        // One digit.
        assert!(offset.len() <= 4 && bound.len() <= 4, "{outcome:?}");
    }
}

#[test]
fn the_offset_over_tcp_is_within_half_the_round_trip() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]\nformat = \"unix\"");
    for _ in 0..30 {
        let outcome = ask(daemon.tcp("time.clock"), &["--offset"]);
        is_right(&outcome);
        let [offset, bound, round_trip] = offset(&outcome);
        assert!(offset.abs() <= round_trip / 2.0 + 1e-6, "{outcome:?}");
        assert!(bound <= round_trip / 2.0 + 3e-6, "{outcome:?}");
        assert!(!outcome.text().contains("-0.000000"), "{outcome:?}");
    }
}

#[test]
fn an_endless_reply_is_refused() {
    let server = Server::repeats("", vec![b'2'; 1 << 20], 1000);
    ask(server.address, &[]).failed_with(&["more than 4096 bytes"]);
    // Which is a limit that holds to the byte.
    let server = Server::sends(vec![b'2'; 4096]);
    assert_eq!(ask(server.address, &[]).succeeded().stdout.len(), 4097);
    let server = Server::sends(vec![b'2'; 4097]);
    ask(server.address, &[]).failed_with(&["more than 4096 bytes"]);
}

#[test]
fn refuses_lines_that_are_too_long() {
    for end in ["\n", "\r\n2026-11-22 13:46:01\n"] {
        let server = Server::sends(format!("\n{}{end}", "2".repeat(4097)));
        ask(server.address, &[]).failed_with(&["more than 4096 bytes"]);
        let server = Server::sends(format!("\n{}{end}", "2".repeat(4096)));
        assert_eq!(ask(server.address, &[]).succeeded().stdout.len(), 4097);
    }
}

#[test]
fn a_server_that_says_nothing_is_a_failure() {
    for server in [Server::sends(""), Server::sends_and_resets("")] {
        let outcome = ask(server.address, &[]);
        outcome.failed_with(&[&server.address.to_string()]);
        assert!(outcome.stdout.is_empty());
    }
}

#[test]
fn a_server_that_stalls_is_left_after_the_time_out() {
    for beginning in ["", "2026-11-22 13:4"] {
        let server = Server::stalls_after(beginning);
        let outcome = ask(server.address, &["--timeout", "300ms"]);
        outcome.failed_with(&[&server.address.to_string(), "no answer in time"]);
        assert!(outcome.stdout.is_empty());
    }
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap();
    let outcome = ask(address, &["--udp", "--timeout", "300ms"]);
    outcome.failed_with(&[&address.to_string(), "no answer in time"]);
}

/// Answers the datagrams behind so many that are lost.
fn answers_after(lost: usize, reply: &'static [u8]) -> (SocketAddr, JoinHandle<()>) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let address = socket.local_addr().unwrap();
    let answering = thread::spawn(move || {
        for _ in 0..lost {
            socket.recv_from(&mut [0; 100]).unwrap();
        }
        let (_, client) = socket.recv_from(&mut [0; 100]).unwrap();
        socket.send_to(reply, client).unwrap();
    });
    (address, answering)
}

#[test]
fn a_datagram_that_is_lost_is_sent_again() {
    let (address, answering) = answers_after(1, b"2026-11-22 13:46:01\n");
    let outcome = ask(address, &["--udp", "--timeout", "60s"]);
    assert_eq!(outcome.succeeded().text(), "2026-11-22 13:46:01\n");
    answering.join().unwrap();
}

#[test]
fn an_empty_datagram_is_no_time() {
    let (address, answering) = answers_after(0, b"");
    ask(address, &["--udp"]).failed_with(&["without telling the time"]);
    answering.join().unwrap();
}

#[test]
fn a_closed_udp_port_fails_at_once() {
    let address = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    // Long before the time-out, whose end would be another message.
    ask(address, &["--udp", "--timeout", "50s"]).failed_with(&[&address.to_string(), "refused"]);
}

#[test]
fn a_closed_tcp_port_is_named_with_the_cause() {
    let address = nobody();
    ask(address, &[]).failed_with(&["cannot connect", &address.to_string(), "refused"]);
}

#[test]
fn a_host_that_is_unknown_is_named() {
    let outcome = ask("no-such-host.invalid", &["--timeout", "30s"]);
    outcome.failed_with(&["no-such-host.invalid"]);
}

#[test]
fn ipv6_addresses_stand_in_brackets() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"[::1]:0\", \"udp:[::1]:0\"]");
    let (tcp, udp) = (daemon.tcp("time.clock"), daemon.udp("time.clock"));
    assert!(tcp.is_ipv6() && udp.is_ipv6());
    is_right(&ask(format!("[::1]:{}", tcp.port()), &["--offset"]));
    is_right(&ask(format!("[::1]:{}", udp.port()), &["--offset", "--udp"]));
}

#[test]
fn a_name_with_several_addresses_is_tried_at_each_of_them() {
    let folder = tempfile::tempdir().unwrap();
    let hosts = folder.path().join("hosts");
    fs::write(&hosts, "127.0.0.1 several.test\n::1 several.test\n").unwrap();
    let script = "mount --bind \"$0\" /etc/hosts || exit 99
        exec timeout 60 \"$1\" time \"$2\" --offset --timezone UTC $3";
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let daemon =
            Daemon::start(&format!("[time.clock]\nlisten = [\"{address}\", \"udp:{address}\"]"));
        for (port, udp) in
            [(daemon.tcp("time.clock").port(), ""), (daemon.udp("time.clock").port(), "--udp")]
        {
            let server = format!("several.test:{port}");
            let arguments = [hosts.as_os_str(), PROGRAM.as_ref(), server.as_ref(), udp.as_ref()];
            let Some(output) = with_mounts(script, &arguments) else { return };
            is_right(&Outcome::of(output));
        }
    }
    // With none of them listening, each is named.
    let server = format!("several.test:{}", nobody().port());
    let arguments = [hosts.as_os_str(), PROGRAM.as_ref(), server.as_ref(), "".as_ref()];
    let Some(output) = with_mounts(script, &arguments) else { return };
    Outcome::of(output).failed_with(&["127.0.0.1:", "[::1]:", "refused"]);
}

#[test]
fn a_machine_that_does_not_know_its_zone_is_told_the_time_all_the_same() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]");
    let ask = |arguments: &[&str]| {
        let mut command = bounded();
        command.arg("time").arg(daemon.tcp("time.clock").to_string()).args(arguments);
        Outcome::of(run(command.env("TZ", ":/nowhere/zone")))
    };
    assert_eq!(ask(&[]).succeeded().text().len(), 27);
    ask(&["--offset"]).failed_with(&["the zone of this machine", "UTC"]);
    is_right(&ask(&["--offset", "--timezone", "UTC"]));
}

#[test]
fn a_name_that_cannot_be_looked_up_is_named_with_its_cause_once() {
    let outcome = Outcome::of(run(bounded().args(["time", "no-such-host.invalid"])));
    outcome.failed_with(&["cannot look up no-such-host.invalid: "]);
    assert_eq!(outcome.stderr.matches("failed to lookup").count(), 1, "{outcome:?}");
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    for arguments in [
        &[][..],
        &["127.0.0.1:0"],
        &["127.0.0.1:port"],
        &["[::1"],
        &["http://127.0.0.1"],
        &["127.0.0.1", "other"],
        &["127.0.0.1", "--timeout", "0s"],
        &["127.0.0.1", "--timeout", "10"],
        &["127.0.0.1", "--timezone", "Nowhere/Land"],
        &["127.0.0.1", "--unknown"],
    ] {
        let outcome = Outcome::of(run(bounded().arg("time").args(arguments)));
        assert_eq!(outcome.code, Some(2), "{arguments:?}: {outcome:?}");
        assert!(!outcome.stderr.is_empty());
    }
}
