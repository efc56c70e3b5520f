//! Machines that lack something: the daemon starts without it, or says what is missing.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, mount_bind, mount_remount};
use rustix::thread::UnshareFlags;

use crate::common::{Daemon, decode, read_all, refuse, run, sample};
use crate::mounts::{apart, empty, with_own_mounts};

/// A daemon on IPv4 that serves by every way that reads something.
fn daemon(zone: &str, prepare: impl FnOnce(&mut Command)) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    fs::write(folder.path().join("files/picture.jpg"), sample(8, 100_000)).unwrap();
    let config = format!(
        "[time.clock]\nlisten = [\"127.0.0.1:0\", \"udp:127.0.0.1:0\"]\nformat = \"rfc3339\"\n\
         timezone = \"{zone}\"\n\
         [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n\
         [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"files/picture.jpg\"\n\
         [metrics]\nlisten = [\"127.0.0.1:0\"]\n"
    );
    Daemon::start_in(folder, &config, prepare)
}

/// The end of the time, where its zone is.
fn assert_serves(daemon: &mut Daemon, offset: &str) {
    let time = String::from_utf8(read_all(daemon.tcp("time.clock"))).unwrap();
    assert!(time.ends_with(&format!("{offset}\n")), "{time}");
    assert!(decode(&read_all(daemon.tcp("file.picture"))).1 == sample(8, 100_000));
    let (_, health) = crate::common::http_get(daemon.tcp("metrics"), "/healthz");
    assert_eq!(health, "ok\n");
    assert!(daemon.stop().success());
}

#[test]
fn without_proc_sys_and_etc_it_serves() {
    with_own_mounts(|| {
        // The path of the program is found by name, not through /proc.
        for place in ["/sys", "/etc", "/proc"] {
            empty(place, c"");
        }
        assert_serves(&mut daemon("local", |_| {}), "Z");
    });
}

#[test]
fn without_a_database_of_time_zones_it_knows_them_all_the_same() {
    with_own_mounts(|| {
        if Path::new("/usr/share/zoneinfo").exists() {
            empty("/usr/share/zoneinfo", c"");
        }
        empty("/etc", c"");
        assert_serves(&mut daemon("Asia/Shanghai", |_| {}), "+08:00");
        let shanghai = |command: &mut Command| {
            command.env("TZ", "Asia/Shanghai");
        };
        assert_serves(&mut daemon("local", shanghai), "+08:00");
        // Who does not say where it is, is nowhere.
        let nowhere = |command: &mut Command| {
            command.env_remove("TZ");
        };
        assert_serves(&mut daemon("local", nowhere), "Z");
    });
}

#[test]
fn a_read_only_root_is_enough_unless_a_unix_socket_is_asked_for() {
    with_own_mounts(|| {
        let folder = tempfile::tempdir().unwrap();
        mount_bind(folder.path(), folder.path()).unwrap();
        let config = folder.path().join("handout.toml");
        fs::write(&config, "[time.clock]\nlisten = [\"unix:clock.sock\"]").unwrap();
        let read_only = MountFlags::BIND | MountFlags::RDONLY;
        mount_remount(folder.path(), read_only, "").unwrap();
        let refused = run(crate::common::program().args(["serve", "--config"]).arg(&config));
        let said = String::from_utf8(refused.stderr).unwrap();
        assert!(said.contains("cannot listen on unix:") && said.contains("Read-only"), "{said}");
        let mut daemon = daemon("UTC", |command| {
            mount_remount("/", read_only, "").unwrap();
            command.current_dir("/");
        });
        assert_serves(&mut daemon, "Z");
    });
}

#[test]
fn without_ipv6_what_is_on_ipv4_is_served() {
    apart(UnshareFlags::NEWNET, || {
        assert!(run(Command::new("ip").args(["link", "set", "lo", "up"])).status.success());
        let off = "/proc/sys/net/ipv6/conf/all/disable_ipv6";
        if Path::new(off).exists() {
            fs::write(off, "1").unwrap();
        }
        assert_serves(&mut daemon("UTC", |_| {}), "Z");
    });
}

#[test]
fn without_ipv6_an_address_of_it_is_a_fault_that_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("handout.toml");
    fs::write(&config, "[time.clock]\nlisten = [\"[::]:0\"]").unwrap();
    let mut command = crate::common::program();
    command.args(["serve", "--config"]).arg(&config);
    refuse(&mut command, "socket", "EAFNOSUPPORT", &folder.path().join("refusals"));
    let output = run(&mut command);
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(said.contains("time.clock") && said.contains("this machine has no IPv6"), "{said}");
}
