//! `handout reload`: requested over the control socket, with the outcome as its exit code.

use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::Instant;

use rustix::fs::{CWD, FileType, OFlags, mknodat};
use rustix::process::{Signal, geteuid};
use tempfile::TempDir;

use crate::common::{
    DEADLINE, Daemon, configure, eventually, metric, program, run, says, wait_for_exit,
};

const CLOCK: &str = "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n";
const METRICS: &str = "[metrics]\nlisten = [\"127.0.0.1:0\"]\n";

/// File name of the control socket.
const SOCKET: &str = "control";

const CONFIG: &str = "handout.toml";

/// Starts a daemon whose runtime directory is its folder.
fn start(config: &str) -> Daemon {
    start_in(tempfile::tempdir().unwrap(), config)
}

fn start_in(folder: TempDir, config: &str) -> Daemon {
    let runtime = folder.path().to_owned();
    Daemon::start_in(folder, config, |command| {
        command.env("RUNTIME_DIRECTORY", runtime);
    })
}

fn reload_command(socket: &Path) -> Command {
    let mut command = program();
    command.args(["reload", "--socket"]).arg(socket);
    command
}

fn reload(daemon: &Daemon) -> Output {
    run(&mut reload_command(&daemon.path(SOCKET)))
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn reloads(daemon: &Daemon, outcome: &str) -> f64 {
    metric(daemon.tcp("metrics"), &format!("handout_reloads_total{{outcome=\"{outcome}\"}}"))
}

/// Replaces the configuration by a FIFO, so that a reload lasts until something is written there.
fn hold_reloads(daemon: &Daemon) {
    let path = daemon.path(CONFIG);
    fs::remove_file(&path).unwrap();
    mknodat(CWD, &path, FileType::Fifo, 0o600.into(), 0).unwrap();
}

/// Waits until the daemon reads its configuration, and provides this one.
fn release_reload(daemon: &Daemon, config: &str) {
    eventually("a reload", || try_to_release_reload(daemon, config));
}

/// Provides this configuration if the daemon is reading one.
fn try_to_release_reload(daemon: &Daemon, config: &str) -> bool {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    let opened = OpenOptions::new().write(true).custom_flags(flags).open(daemon.path(CONFIG));
    opened.is_ok_and(|mut fifo| fifo.write_all(config.as_bytes()).is_ok())
}

/// Starts a reload and waits until the daemon is reading its configuration.
fn begin_reload(daemon: &Daemon) -> Child {
    let mut command = reload_command(&daemon.path(SOCKET));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let folder = format!("/proc/{}/task", daemon.child.id());
    eventually("a thread that waits for the FIFO", || {
        fs::read_dir(&folder).unwrap().any(|task| {
            let wchan = fs::read_to_string(task.unwrap().path().join("syscall"));
            // openat(2) on x86-64 and on AArch64; no other one blocks.
            wchan.is_ok_and(|call| call.starts_with("257 ") || call.starts_with("56 "))
        })
    });
    child
}

#[test]
fn prints_the_summary_of_a_reload_and_exits_with_0() {
    let daemon = start(CLOCK);
    configure(&daemon.path(CONFIG), &format!("{CLOCK}[time.more]\nlisten = [\"unix:m\"]\n"));
    let output = reload(&daemon);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.starts_with("reloaded: ") && said.contains("time.more"), "{said}");
    daemon.wait_for_message("reloaded: ");
    UnixStream::connect(daemon.path("m")).unwrap();
    let output = run(reload_command(&daemon.path(SOCKET)).arg("--quiet"));
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
}

#[test]
fn prints_every_fault_of_a_rejected_reload_and_exits_with_78() {
    let daemon = start(CLOCK);
    configure(&daemon.path(CONFIG), &format!("{CLOCK}colour = 1\njunk = 2\n"));
    let output = reload(&daemon);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    let said = stderr(&output);
    assert!(said.contains("time.clock.colour: ") && said.contains("time.clock.junk: "), "{said}");
    assert!(said.contains("reload failed: the daemon keeps its old configuration"), "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn cuts_very_long_faults() {
    let daemon = start(CLOCK);
    let long = "x".repeat(10_000);
    let keys: String = (0..90).map(|number| format!("k{number} = 1\n")).collect();
    configure(&daemon.path(CONFIG), &format!("[time.{long}]\n{keys}"));
    let output = reload(&daemon);
    assert_eq!(output.status.code(), Some(78));
    assert!(output.stderr.len() < 2 << 20, "{}", output.stderr.len());
}

#[test]
fn agrees_in_exit_code_metrics_log_and_status_on_every_kind_of_fault() {
    let folder = tempfile::tempdir().unwrap();
    let manager = UnixDatagram::bind(folder.path().join("notify")).unwrap();
    manager.set_read_timeout(Some(DEADLINE)).unwrap();
    let (runtime, notify) = (folder.path().to_owned(), folder.path().join("notify"));
    let good = format!("{CLOCK}{METRICS}");
    let daemon = Daemon::start_in(folder, &good, |command| {
        command.env("RUNTIME_DIRECTORY", &runtime).env("NOTIFY_SOCKET", &notify);
    });
    let status = || {
        let mut buffer = [0; 4096];
        let text = manager.recv(&mut buffer).map(|length| buffer[..length].to_vec()).unwrap();
        String::from_utf8(text).unwrap()
    };
    while !status().starts_with("READY=1\n") {}
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let faults = [
        (format!("{good}[time.x]\nlistne = [\"127.0.0.1:0\"]\n"), "listne"),
        (format!("{good}[time.x]\nlisten = [\"{address}\"]\n"), "another program listens there"),
        (format!("{good}[file.x]\nlisten = [\"127.0.0.1:0\"]\npath = \"none\"\n"), "none"),
        ("no TOML".to_owned(), "not TOML"),
        (String::new(), "no service"),
    ];
    for (number, (config, words)) in (1_u32..).zip(faults) {
        configure(&daemon.path(CONFIG), &config);
        let output = reload(&daemon);
        assert_eq!(output.status.code(), Some(78), "{words}: {output:?}");
        assert!(stderr(&output).contains(words), "{words}: {output:?}");
        assert!((reloads(&daemon, "failed") - f64::from(number)).abs() < 0.5);
        let successful = metric(daemon.tcp("metrics"), "handout_config_last_reload_successful");
        assert!(successful < 0.5, "{words}");
        daemon.wait_for("the fault", |line| says(line, "reload failed") && says(line, words));
        assert!(status().starts_with("RELOADING=1\n"));
        let told = status();
        assert!(told.contains("reload failed") && told.contains(words), "{words}: {told}");

        configure(&daemon.path(CONFIG), &good);
        assert!(reload(&daemon).status.success());
        assert!((reloads(&daemon, "done") - f64::from(number)).abs() < 0.5);
        let successful = metric(daemon.tcp("metrics"), "handout_config_last_reload_successful");
        assert!(successful > 0.5, "{words}");
        assert!(status().starts_with("RELOADING=1\n"));
        assert!(!status().contains("failed"));
    }
}

#[cfg(feature = "gateway")]
#[test]
fn mails_the_operator_if_a_credential_cannot_be_read_at_a_reload() {
    let smtp_server = crate::smtp_server::SmtpServer::start("tls");
    let folder = tempfile::tempdir().unwrap();
    let (runtime, credentials) = (folder.path().to_owned(), folder.path().join("credentials"));
    fs::create_dir(&credentials).unwrap();
    fs::write(credentials.join("token"), "secret").unwrap();
    let config = format!(
        "{CLOCK}{METRICS}[mirror.m]\nurls = [\"http://127.0.0.1:9/\"]\ninto = \"m\"\n\
         bearer-token-file = \"token\"\n{}\n[alert]\nto = [\"mail.ops\"]\nwait = \"100ms\"\n\
         on = [\"reload-failed\"]\n",
        smtp_server.channel("")
    );
    let daemon = Daemon::start_in(folder, &config, |command| {
        command.env("RUNTIME_DIRECTORY", runtime).env("CREDENTIALS_DIRECTORY", &credentials);
    });
    assert!(reload(&daemon).status.success());
    fs::remove_file(credentials.join("token")).unwrap();
    let output = reload(&daemon);
    assert_eq!(output.status.code(), Some(78), "{output:?}");
    assert!(stderr(&output).contains("mirror.m.bearer-token-file"), "{output:?}");
    assert!(reloads(&daemon, "failed") > 0.5);
    let mail = smtp_server.wait_for(0);
    assert!(mail["text"].as_str().unwrap().contains("bearer-token-file"), "{mail}");
}

#[test]
fn exits_with_1_and_a_remedy_without_a_daemon() {
    let folder = tempfile::tempdir().unwrap();
    // The socket file of a killed daemon.
    drop(UnixListener::bind(folder.path().join("stale")).unwrap());
    fs::write(folder.path().join("file"), "").unwrap();
    for name in ["none", "stale", "file", "none/none"] {
        let output = run(&mut reload_command(&folder.path().join(name)));
        assert_eq!(output.status.code(), Some(1), "{name}: {output:?}");
        let said = stderr(&output);
        assert!(said.starts_with("handout: cannot reach the daemon at "), "{name}: {said}");
        assert!(said.contains("--socket") && said.lines().count() == 1, "{name}: {said}");
    }
}

#[test]
fn gives_up_after_the_timeout_if_the_daemon_does_not_reply() {
    let folder = tempfile::tempdir().unwrap();
    let silent = UnixListener::bind(folder.path().join("silent")).unwrap();
    let mut command = reload_command(&folder.path().join("silent"));
    let output = run(command.args(["--timeout", "200ms"]));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("did not reply within 0.2 s"), "{output:?}");
    // A daemon that exits instead of a reply.
    let ends = thread::spawn(move || {
        let _first = silent.accept().unwrap();
        drop(silent.accept().unwrap());
    });
    let output = run(&mut reload_command(&folder.path().join("silent")));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("without a reply"), "{output:?}");
    ends.join().unwrap();
}

#[test]
fn names_a_socket_of_another_program_without_parser_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other\u{1b}[2J");
    let other = UnixListener::bind(&path).unwrap();
    for reply in ["hello\n", "{\"outcome\":\"done\"}\n", "\0", "{"] {
        let output = thread::scope(|scope| {
            scope.spawn(|| {
                let (mut client, _) = other.accept().unwrap();
                // After the request was read, the close is no reset.
                assert!(client.read(&mut [0; 100]).unwrap() > 0);
                client.write_all(reply.as_bytes()).unwrap();
            });
            run(&mut reload_command(&path))
        });
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        let expected = format!(
            "handout: unexpected reply at {}/other\\u{{1b}}[2J: name the daemon's control socket \
             by --socket\n",
            folder.path().display()
        );
        assert_eq!(stderr(&output), expected);
    }
}

#[test]
fn creates_a_private_socket_and_removes_it_at_the_end() {
    let mut daemon = start(CLOCK);
    let path = daemon.path(SOCKET);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(daemon.stop().success());
    assert!(!path.exists());
}

#[test]
fn refuses_other_users_even_if_the_mode_lets_them_connect() {
    // Only root can become another user.
    if !geteuid().is_root() {
        return;
    }
    let daemon = start(CLOCK);
    let open = fs::Permissions::from_mode(0o777);
    fs::set_permissions(daemon.folder.path(), open.clone()).unwrap();
    fs::set_permissions(daemon.path(SOCKET), open).unwrap();
    let address = format!("UNIX-CONNECT:{}", daemon.path(SOCKET).display());
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.args(["socat", "-t60", "SYSTEM:echo reload; cat >&2", &address]);
    let output = run(command.stdin(Stdio::null()));
    let said = stderr(&output);
    assert!(said.contains("\"refused\"") && said.contains("only root"), "{said}");
    assert!(!daemon.lines().iter().any(|line| says(line, "reload")));
}

#[test]
fn refuses_any_other_request() {
    let daemon = start(CLOCK);
    for request in ["\n", "stop\n", "reload now\n", "reload", &"x".repeat(5000), "\u{fffd}\n"] {
        let mut stream = UnixStream::connect(daemon.path(SOCKET)).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        // The daemon may have closed the connection already.
        let _ = stream.write_all(request.as_bytes());
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut reply = String::new();
        let read = stream.read_to_string(&mut reply);
        // The end of the stream ends a line, too.
        let outcome = if request == "reload" { "reloaded" } else { "refused" };
        let cut_off = request.len() > 100 && read.is_err();
        assert!(cut_off || reply.contains(outcome), "{request:?}: {reply} {read:?}");
    }
}

#[test]
fn delays_neither_reloads_nor_the_stop_for_silent_clients() {
    let mut daemon = start(CLOCK);
    let silent: Vec<_> =
        (0..20).map(|_| UnixStream::connect(daemon.path(SOCKET)).unwrap()).collect();
    daemon.reload(CLOCK);
    // The request waits behind the silent clients, which time out.
    let mut command = reload_command(&daemon.path(SOCKET));
    let mut waiting = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    assert!(wait_for_exit(&mut waiting).success());
    drop(silent);
    let mut silent = UnixStream::connect(daemon.path(SOCKET)).unwrap();
    let stopping = Instant::now();
    assert!(daemon.stop().success());
    assert!(stopping.elapsed() < DEADLINE / 2);
    silent.set_read_timeout(Some(DEADLINE)).unwrap();
    let end = silent.read(&mut [0; 16]);
    assert!(
        end.as_ref().is_ok_and(|length| *length == 0)
            || end.is_err_and(|error| error.kind() == ErrorKind::ConnectionReset)
    );
}

#[test]
fn answers_requests_during_a_reload_with_the_outcome_of_a_later_one() {
    let daemon = start(&format!("{CLOCK}{METRICS}"));
    hold_reloads(&daemon);
    let first = begin_reload(&daemon);
    // Later requests must read the file again.
    let spawn = |_| {
        let mut command = reload_command(&daemon.path(SOCKET));
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let mut others: Vec<_> = (0..5).map(spawn).collect();
    eventually("the connections of all", || {
        let sockets = fs::read_to_string("/proc/net/unix").unwrap();
        let path = daemon.path(SOCKET);
        let ours = sockets.lines().filter(|line| line.ends_with(path.to_str().unwrap()));
        // The listener and six connections.
        ours.count() == 7
    });
    release_reload(&daemon, &format!("{CLOCK}{METRICS}junk = 1\n"));
    assert_eq!(first.wait_with_output().unwrap().status.code(), Some(78));
    eventually("the others", || {
        try_to_release_reload(&daemon, &format!("{CLOCK}{METRICS}"));
        others.iter_mut().all(|other| other.try_wait().unwrap().is_some())
    });
    for other in others {
        let output = other.wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    assert!((reloads(&daemon, "failed") - 1.0).abs() < 0.5);
}

#[test]
fn informs_the_client_of_a_stop_during_its_reload_without_delay() {
    let mut daemon = start(CLOCK);
    hold_reloads(&daemon);
    let client = begin_reload(&daemon);
    daemon.signal(Signal::TERM);
    let output = client.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = stderr(&output);
    assert!(said.contains("the daemon is stopping") || said.contains("without a reply"), "{said}");
    assert!(daemon.wait().success());
}

#[test]
fn continues_the_reload_of_a_killed_client() {
    let daemon = start(CLOCK);
    hold_reloads(&daemon);
    let mut client = begin_reload(&daemon);
    client.kill().unwrap();
    client.wait().unwrap();
    release_reload(&daemon, &format!("[log]\nformat = \"json\"\n{CLOCK}"));
    daemon.wait_for_message("reloaded: ");
    fs::remove_file(daemon.path(CONFIG)).unwrap();
    configure(&daemon.path(CONFIG), CLOCK);
    assert!(reload(&daemon).status.success());
}

#[test]
fn replaces_the_socket_of_a_killed_daemon() {
    let mut daemon = start(CLOCK);
    daemon.signal(Signal::KILL);
    daemon.wait();
    assert!(daemon.path(SOCKET).exists());
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let next = start_in(folder, CLOCK);
    assert!(reload(&next).status.success());
}

#[test]
fn leaves_sockets_of_other_daemons_and_other_files_alone() {
    let first = start(CLOCK);
    let runtime = first.folder.path().to_owned();
    let second = Daemon::start_with(CLOCK, &[], |command| {
        command.env("RUNTIME_DIRECTORY", &runtime);
    });
    second.wait_for_message("cannot open the control socket ");
    drop(second);
    assert!(reload(&first).status.success());
    first.wait_for_message("reloaded: ");

    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join(SOCKET), "a file").unwrap();
    let third = start_in(folder, CLOCK);
    third.wait_for_message("cannot open the control socket ");
    assert_eq!(fs::read(third.path(SOCKET)).unwrap(), b"a file");
}

#[test]
fn binds_the_path_that_an_argument_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("mine");
    let daemon = Daemon::start_with(CLOCK, &[], |command| {
        command.arg("--control").arg(&path);
    });
    assert!(run(&mut reload_command(&path)).status.success());
    daemon.wait_for_message("reloaded: ");
    // The path must be usable.
    let output = run(program()
        .args(["serve", "--time", "127.0.0.1:0", "--control"])
        .arg(folder.path().join("none/control")));
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(stderr(&output).contains("cannot open the control socket "), "{output:?}");
}
