//! File systems that hang, as a network file system does without its server: only their own clients
//! wait.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::common::{
    Daemon, connect, decode, eventually, http_get, program, read_all, run, sample, says,
};
use crate::mounts::with_own_mounts;
use crate::strace::Strace;

/// A FUSE file system that answers no request until it is dropped.
struct HungFs<'a> {
    place: &'a Path,
    /// Receives the requests, which are not read.
    _server: File,
}

impl<'a> HungFs<'a> {
    fn over(place: &'a Path) -> Self {
        let server = File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        mount("hung", place, "fuse", MountFlags::empty(), &*data).unwrap();
        Self { place, _server: server }
    }
}

impl Drop for HungFs<'_> {
    fn drop(&mut self) {
        unmount(self.place, UnmountFlags::DETACH).unwrap();
    }
}

const CONFIG: &str = "[daemon]\ngrace = \"1s\"\n\
    [time.clock]\nlisten = [\"127.0.0.1:0\"]\n\
    [file.picture]\nlisten = [\"127.0.0.1:0\"]\npath = \"picture.jpg\"\n\
    [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n\
    [file.hung]\nlisten = [\"127.0.0.1:0\"]\npath = \"hung\"\n\
    [file.one]\nlisten = [\"127.0.0.1:0\"]\npath = \"hung/file\"\n\
    [metrics]\nlisten = [\"127.0.0.1:0\"]\n";

fn daemon() -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    for name in ["files/part", "hung"] {
        fs::create_dir_all(folder.path().join(name)).unwrap();
    }
    for name in ["picture.jpg", "files/file", "files/part/file", "hung/file"] {
        fs::write(folder.path().join(name), sample(4, 1000)).unwrap();
    }
    Daemon::start_in(folder, CONFIG, |_| {})
}

fn ask(daemon: &Daemon, service: &str, lines: &str) -> TcpStream {
    let mut stream = connect(daemon.tcp(service));
    stream.write_all(lines.as_bytes()).unwrap();
    stream
}

fn assert_served(daemon: &Daemon, service: &str) {
    let mut reply = String::new();
    BufReader::new(ask(daemon, service, "file\n")).read_line(&mut reply).unwrap();
    assert!(reply.contains("\"sha256\""), "{reply}");
}

fn assert_that_others_are_served(daemon: &Daemon) {
    assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
    assert_served(daemon, "file.files");
    assert!(decode(&read_all(daemon.tcp("file.picture"))).1 == sample(4, 1000));
    // Served from memory.
    assert!(decode(&read_all(daemon.tcp("file.one"))).1 == sample(4, 1000));
}

#[test]
fn delays_only_the_clients_of_a_hung_file_system() {
    with_own_mounts(|| {
        let mut daemon = daemon();
        let place = daemon.path("hung");
        let hung = HungFs::over(&place);
        // Far more requests than threads, for one name and for many.
        let waiting: Vec<_> = (0..600)
            .map(|number| ask(&daemon, "file.hung", &format!("file-{}\n", number % 300)))
            .collect();
        daemon.wait_for_message("file.hung: the folder cannot be read: its file system does not");
        daemon.wait_for_message("file.one: ");
        assert_that_others_are_served(&daemon);
        assert!(http_get(daemon.tcp("metrics"), "/healthz").1.contains("does not answer"));
        // A replaced file is noticed.
        crate::common::replace(&daemon.path("picture.jpg"), &sample(5, 1000));
        eventually("the new version", || {
            decode(&read_all(daemon.tcp("file.picture"))).1 == sample(5, 1000)
        });
        // Both services have their own threads.
        let threads = fs::read_dir(format!("/proc/{}/task", daemon.child.id())).unwrap().count();
        assert!(threads < 100, "{threads}");

        // A reload changes another service.
        let line = daemon.reload(&CONFIG.replace("[time.clock]", "[time.clock]\nnewline = false"));
        assert!(says(&line, "reloaded: ") && line["changed"] == 1, "{line}");
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 26);

        // The folder is served again when its file system answers.
        drop(hung);
        for mut stream in waiting {
            let mut reply = [0; 9];
            stream.read_exact(&mut reply).unwrap();
            assert_eq!(&reply, b"{\"error\":");
        }
        daemon.wait_for_message("file.hung: the folder is back");
        assert_served(&daemon, "file.hung");
        assert!(daemon.stop().success());
    });
}

#[test]
fn serves_the_other_files_of_a_folder_with_a_hung_subfolder() {
    with_own_mounts(|| {
        let daemon = daemon();
        let place = daemon.path("files/part");
        let _hung = HungFs::over(&place);
        let _waiting: Vec<_> =
            (0..500).map(|_| ask(&daemon, "file.files", "part/file\n")).collect();
        for _ in 0..20 {
            assert_that_others_are_served(&daemon);
        }
    });
}

#[test]
fn releases_the_permits_of_clients_that_left_a_hung_file() {
    with_own_mounts(|| {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("files/part")).unwrap();
        fs::write(folder.path().join("files/file"), sample(4, 1000)).unwrap();
        let config = "[file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\n\
                      max-connections = 20\nidle-timeout = \"500ms\"\n";
        let daemon = Daemon::start_in(folder, config, |_| {});
        let place = daemon.path("files/part");
        let _hung = HungFs::over(&place);
        for round in 1..=3 {
            let asked: Vec<_> =
                (0..20).map(|_| ask(&daemon, "file.files", "part/file\n")).collect();
            drop(asked);
            // All permits are free again, although the file system has not answered.
            assert_served(&daemon, "file.files");
            let ended = daemon.wait_for_connections(21 * round);
            let failed = ended.iter().filter(|line| line["outcome"] == "failed").count();
            assert!(failed >= 20 * round, "{ended:?}");
        }
    });
}

#[test]
fn exits_with_1_and_not_78_if_a_path_hangs() {
    with_own_mounts(|| {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("hung")).unwrap();
        let path = folder.path().join("handout.toml");
        fs::write(&path, "[file.hung]\npath = \"hung\"\n").unwrap();
        let place = folder.path().join("hung");
        let _hung = HungFs::over(&place);
        let ask = |command: &str| {
            let said = run(program().args([command, "--config"]).arg(&path));
            let words = String::from_utf8(said.stderr).unwrap();
            assert!(words.contains("file.hung.path: \"hung\": cannot be opened: its file system"));
            said.status.code()
        };
        // Both commands wait as long as a mount may take.
        let (checked, served) = std::thread::scope(|scope| {
            let served = scope.spawn(|| ask("serve"));
            (ask("check"), served.join().unwrap())
        });
        // After 78, systemd would not restart the daemon.
        assert_eq!((checked, served), (Some(1), Some(1)));
    });
}

#[test]
fn stops_in_spite_of_hung_threads() {
    with_own_mounts(|| {
        let mut daemon = daemon();
        let place = daemon.path("hung");
        let _hung = HungFs::over(&place);
        let _waiting: Vec<_> =
            (0..50).map(|number| ask(&daemon, "file.hung", &format!("{number}\n"))).collect();
        assert_that_others_are_served(&daemon);
        let start = Instant::now();
        assert!(daemon.stop().success());
        // The grace, and some delay of a busy machine.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
        let line = daemon.wait_for_message("stopped: ");
        assert!(line["reset"].as_u64().unwrap() > 0, "{line}");
    });
}

#[test]
fn delays_only_the_clients_of_a_file_that_hangs_while_it_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("files")).unwrap();
    fs::write(folder.path().join("files/file"), sample(4, 1000)).unwrap();
    fs::write(folder.path().join("large"), sample(6, 1_500_000)).unwrap();
    let daemon = Daemon::start_in(
        folder,
        "[time.clock]\nlisten = [\"127.0.0.1:0\"]\n\
         [file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"\ncache-limit = \"1KiB\"\n\
         [file.large]\nlisten = [\"127.0.0.1:0\"]\npath = \"large\"\ncache-limit = \"1MiB\"\n",
        |_| {},
    );
    // The file is not in the page cache, and the disk does not answer.
    let large = daemon.path("large");
    let strace = Strace::attach(
        &daemon,
        [
            "--trace=preadv2,pread64",
            "--inject=preadv2:error=EAGAIN",
            "--inject=pread64:delay_enter=60s",
            "-P",
            large.to_str().unwrap(),
        ],
    );
    let waiting: Vec<_> = (0..100).map(|_| connect(daemon.tcp("file.large"))).collect();
    eventually("all threads of a file to wait", || strace.seen().matches("pread64").count() >= 8);
    for _ in 0..20 {
        assert_eq!(read_all(daemon.tcp("time.clock")).len(), 27);
        assert_served(&daemon, "file.files");
    }
    strace.detach();
    for mut stream in waiting {
        let mut document = Vec::new();
        stream.read_to_end(&mut document).unwrap();
        assert!(decode(&document).1 == sample(6, 1_500_000));
    }
}
