//! System calls per connection, a measure of performance that does not depend on the machine.
//!
//! An increase needs a justification; after a decrease, lower the bounds.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::SocketAddr;

use crate::common::{Daemon, connect, eventually, read_all, sample};
use crate::strace::Strace;

/// Connections per measurement.
const CONNECTIONS: usize = 100;

/// System calls of the daemon per client, by name, while clients connect one after the other.
fn calls(daemon: &Daemon, address: SocketAddr, length: usize) -> BTreeMap<String, f64> {
    calls_of(daemon, || assert_eq!(read_all(address).len(), length))
}

/// Like [`calls`], for clients that run `ask`.
fn calls_of(daemon: &Daemon, ask: impl Fn()) -> BTreeMap<String, f64> {
    let strace = Strace::attach(daemon, [] as [&str; 0]);
    for _ in 0..CONNECTIONS {
        ask();
    }
    eventually("the end of every connection", || count(&strace.seen(), "close") >= CONNECTIONS);
    let text = strace.detach();
    let mut calls = BTreeMap::new();
    for name in text.lines().filter_map(name_of_call) {
        *calls.entry(name.to_owned()).or_insert(0) += 1;
    }
    calls.into_iter().map(|(name, count)| (name, f64::from(count) / CONNECTIONS as f64)).collect()
}

/// The name of the call in a line such as `1234  accept4(9, …`.
fn name_of_call(line: &str) -> Option<&str> {
    let (name, _) = line.split_once(' ')?.1.trim_start().split_once('(')?;
    name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_').then_some(name)
}

fn count(text: &str, name: &str) -> usize {
    text.lines().filter(|line| name_of_call(line) == Some(name)).count()
}

/// Checks that each call stays below its bound per connection, and all unlisted calls together below
/// `others`. Calls that wait depend on the load of the machine and have a generous bound.
fn at_most(calls: &BTreeMap<String, f64>, bounds: &[(&str, f64)], others: f64) {
    let waiting = ["epoll_wait", "epoll_pwait", "futex", "write", "sched_yield", "restart_syscall"];
    let mut rest = 0.0;
    // Debug builds of std check with fcntl that a descriptor is open before they close it.
    for (name, number) in calls.iter().filter(|(name, _)| *name != "fcntl") {
        match bounds.iter().find(|(bounded, _)| bounded == name) {
            Some((_, bound)) => assert!(number <= bound, "{number} {name}: {calls:?}"),
            None if waiting.contains(&name.as_str()) => assert!(*number <= 6.0, "{calls:?}"),
            None => rest += number,
        }
    }
    assert!(rest <= others, "{rest} others: {calls:?}");
}

/// Calls of every connection: accept, half-close and close, without a registration with epoll.
const OF_EACH: [(&str, f64); 7] = [
    ("accept4", 1.1),
    // Checks of the accept queue, and of all lingering connections together.
    ("ppoll", 4.0),
    ("shutdown", 1.1),
    ("recvfrom", 0.2),
    ("ioctl", 1.1),
    ("close", 1.1),
    ("epoll_ctl", 0.2),
];

#[test]
fn serves_the_time_with_one_write_and_no_registration() {
    let daemon = Daemon::start(
        "[log]\nformat = \"json\"\nlevel = \"warn,handout::daemon=info,handout::daemon::manager=info\"\n\
         [time.clock]\nlisten = [\"127.0.0.1:0\"]\n",
    );
    let calls = calls(&daemon, daemon.tcp("time.clock"), 27);
    at_most(&calls, &[&OF_EACH[..], &[("sendto", 1.1)]].concat(), 0.2);
}

#[test]
fn serves_small_files_with_the_calls_of_the_time() {
    let daemon = Daemon::start_with(
        "[log]\nformat = \"json\"\nlevel = \"warn,handout::daemon=info,handout::daemon::manager=info\"\n\
         [file.small]\nlisten = [\"127.0.0.1:0\"]\npath = \"small.bin\"\n",
        &[("small.bin", &sample(17, 3_000))],
        |_| {},
    );
    let address = daemon.tcp("file.small");
    let length = read_all(address).len();
    let calls = calls(&daemon, address, length);
    // The file is checked for changes at intervals.
    at_most(&calls, &[&OF_EACH[..], &[("sendto", 1.1), ("statx", 0.5)]].concat(), 0.2);
}

#[test]
fn logs_with_one_write_per_line() {
    let daemon = Daemon::start("[time.clock]\nlisten = [\"127.0.0.1:0\"]\n");
    let calls = calls(&daemon, daemon.tcp("time.clock"), 27);
    at_most(&calls, &[&OF_EACH[..], &[("sendto", 1.1)]].concat(), 0.2);
}

#[test]
fn reads_proxy_headers_with_two_reads() {
    let daemon = Daemon::start(
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\nproxy-protocol = [\"127.0.0.1\"]\n",
    );
    let address = daemon.tcp("time.clock");
    let calls = calls_of(&daemon, || {
        let mut stream = connect(address);
        stream.write_all(b"PROXY TCP4 192.0.2.7 127.0.0.1 4321 6789\r\n").unwrap();
        assert_eq!(stream.read_to_end(&mut Vec::new()).unwrap(), 27);
    });
    // A header received after accept takes a failed read and a registration.
    let waited_for = [("sendto", 1.1), ("recvfrom", 4.2), ("epoll_ctl", 2.2)];
    let of_each = OF_EACH.into_iter().filter(|(call, _)| !["recvfrom", "epoll_ctl"].contains(call));
    at_most(&calls, &of_each.chain(waited_for).collect::<Vec<_>>(), 0.2);
}
