//! What the service manager is told.

use std::os::unix::net::UnixDatagram;

use tempfile::TempDir;

use crate::common::{DEADLINE, Daemon};

/// The name of the socket on which the manager listens.
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
fn ready_status_watchdog_and_stopping_are_told() {
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
fn ready_comes_after_every_address_is_bound() {
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
fn a_reload_and_what_came_of_it_are_told() {
    let (manager, folder) = manager();
    let path = folder.path().join(SOCKET);
    let clock = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
    let daemon = Daemon::start_with(clock, &[], |command| {
        command.env("NOTIFY_SOCKET", &path);
    });
    assert_eq!(next(&manager), "READY=1\nSTATUS=serving time.clock on 1 address\n");
    // Longer than what the manager takes.
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
