//! Notifications to the service manager.

use std::io::Read;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use tempfile::TempDir;

use crate::common::{DEADLINE, Daemon, connect, says};

/// File name of the notification socket.
const SOCKET: &str = "notify.sock";

fn manager() -> (UnixDatagram, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join(SOCKET)).unwrap();
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    (manager, folder)
}

fn next(socket: &UnixDatagram) -> String {
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8(buffer[..length].to_vec()).unwrap()
}

#[test]
fn notifies_readiness_status_watchdog_and_stop() {
    let (manager, folder) = manager();
    let path = folder.path().join(SOCKET);
    let mut daemon = Daemon::start_with(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]",
        &[],
        |command| {
            command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "20000");
        },
    );
    let mut told: Vec<String> = Vec::new();
    while told.iter().filter(|state| *state == "WATCHDOG=1\n").count() < 3 {
        told.push(next(&manager));
    }
    let ready = "READY=1\nSTATUS=serving time.clock on 2 addresses\n";
    assert!(told.iter().any(|state| state == ready), "{told:?}");
    assert!(daemon.stop().success());
    loop {
        let state = next(&manager);
        if state.starts_with("STOPPING=1\nSTATUS=") {
            break;
        }
        assert_eq!(state, "WATCHDOG=1\n");
    }
}

#[test]
fn notifies_readiness_after_all_addresses_are_bound() {
    let (manager, folder) = manager();
    let path = folder.path().join(SOCKET);
    let daemon =
        Daemon::start_with("[time.clock]\nlisten = [\"unix:clock.sock\"]", &[], |command| {
            command.env("NOTIFY_SOCKET", &path);
        });
    assert!(next(&manager).starts_with("READY=1\n"));
    std::os::unix::net::UnixStream::connect(daemon.path("clock.sock")).unwrap();
}

#[test]
fn notifies_a_reload_and_its_outcome() {
    let (manager, folder) = manager();
    let path = folder.path().join(SOCKET);
    let clock = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
    let daemon = Daemon::start_with(clock, &[], |command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    assert_eq!(next(&manager), "READY=1\nSTATUS=serving time.clock on 1 address\n");
    // Longer than the manager accepts.
    let long = format!("{clock}{} = 1\n", "x".repeat(5000));
    for (config, status) in [
        (
            "[time.clock]\ncolour = 1\n",
            "READY=1\nSTATUS=serving time.clock on 1 address; reload failed, nothing was changed: ",
        ),
        (
            long.as_str(),
            "READY=1\nSTATUS=serving time.clock on 1 address; reload failed, nothing was changed: ",
        ),
        (
            "[time.other]\nlisten = [\"127.0.0.1:0\"]\n",
            "READY=1\nSTATUS=serving time.other on 1 address\n",
        ),
    ] {
        daemon.reload(config);
        assert!(next(&manager).starts_with("RELOADING=1\nMONOTONIC_USEC="));
        let told = next(&manager);
        assert!(told.starts_with(status) && told.len() < 1200, "{told}");
    }
}

#[test]
fn notifies_an_abstract_socket() {
    // The path of a new folder is unique among the tests.
    let folder = tempfile::tempdir().unwrap();
    let name = folder.path().to_str().unwrap();
    let address = SocketAddr::from_abstract_name(name).unwrap();
    let manager = UnixDatagram::bind_addr(&address).unwrap();
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    let _daemon = Daemon::start_with(CLOCK, &[], |command| {
        command.env("NOTIFY_SOCKET", format!("@{name}"));
    });
    assert_eq!(next(&manager), "READY=1\nSTATUS=serving time.clock on 1 address\n");
}

const CLOCK: &str = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";

const UNREAD: &str =
    "cannot notify the service manager (NOTIFY_SOCKET): it does not read its socket";

/// Starts a daemon whose service manager does not read.
fn unread(manager: &TempDir) -> Daemon {
    let daemon = Daemon::start_with(CLOCK, &[], |command| {
        command.env("NOTIFY_SOCKET", manager.path().join(SOCKET)).env("WATCHDOG_USEC", "2000");
    });
    daemon.wait_for_message(UNREAD);
    daemon
}

/// Connects so often that every event loop accepts a client.
fn assert_clients_are_served(daemon: &Daemon) {
    let clients: Vec<_> = (0..50).map(|_| connect(daemon.tcp("time.clock"))).collect();
    for mut client in clients {
        let mut reply = Vec::new();
        client.read_to_end(&mut reply).unwrap();
        assert_eq!(reply.len(), 27);
    }
}

#[test]
fn serves_reloads_and_stops_while_the_notify_socket_is_not_read() {
    let (_manager, folder) = manager();
    let mut daemon = unread(&folder);
    for number in 0..5 {
        assert_clients_are_served(&daemon);
        let config = format!("{CLOCK}[time.number{number}]\nlisten = [\"127.0.0.1:0\"]\n");
        assert!(says(&daemon.reload(&config), "reloaded: "));
    }
    assert_clients_are_served(&daemon);
    assert!(daemon.stop().success());
    let warnings = daemon.lines().into_iter().filter(|line| says(line, "cannot notify"));
    assert_eq!(warnings.count(), 1);
}

#[test]
fn sends_the_newest_state_when_the_notify_socket_is_read_again() {
    let (manager, folder) = manager();
    let mut daemon = unread(&folder);
    for number in 0..5 {
        let config = format!("{CLOCK}[time.number{number}]\nlisten = [\"127.0.0.1:0\"]\n");
        daemon.reload(&config);
    }
    let mut states = Vec::new();
    let newest = "READY=1\nSTATUS=serving time.clock, time.number4 on 2 addresses\n";
    while states.last().is_none_or(|state| state != newest) {
        states.push(next(&manager));
    }
    // Older states are stale; the manager expects the start of the last reload.
    assert!(!states.iter().any(|state| state.contains("time.number3")), "{states:?}");
    assert!(states[states.len() - 2].starts_with("RELOADING=1\n"), "{states:?}");
    daemon.wait_for_message("the service manager takes notifications again");
    while !next(&manager).starts_with("WATCHDOG=1") {}
    daemon.signal(rustix::process::Signal::TERM);
    while !next(&manager).starts_with("STOPPING=1\n") {}
    assert!(daemon.wait().success());
}
