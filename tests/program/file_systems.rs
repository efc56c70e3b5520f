//! Saves files on exFAT and NTFS through FUSE, and on FAT if the kernel supports it. Requires root
//! and a loop device.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use tempfile::TempDir;

use crate::common::{Daemon, PROGRAM, decode, eventually, read_all, run, sample};
use crate::mounts::with_own_mounts;
use crate::servers::{Outcome, Place, Server, document};

/// A file system image mounted through a loop device until it is dropped.
struct Mounted<'a> {
    kind: Kind,
    device: String,
    place: &'a Path,
    _image: TempDir,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Exfat,
    Fat,
    Ntfs,
}

fn succeeds(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

impl<'a> Mounted<'a> {
    fn over(place: &'a Path, kind: Kind) -> Option<Self> {
        let image = tempfile::tempdir().unwrap();
        let path = image.path().join("image");
        fs::File::create(&path).unwrap().set_len(64 << 20).unwrap();
        let device = succeeds("losetup", &["--find", "--show", path.to_str().unwrap()])?;
        let mounted = Self { kind, device, place, _image: image };
        let make: (&str, &[&str]) = match kind {
            Kind::Exfat => ("mkfs.exfat", &[]),
            Kind::Fat => ("mkfs.vfat", &[]),
            Kind::Ntfs => ("mkfs.ntfs", &["--fast", "--force"]),
        };
        succeeds(make.0, &[make.1, &[&mounted.device]].concat())?;
        mounted.mount()?;
        Some(mounted)
    }

    fn mount(&self) -> Option<()> {
        let place = self.place.to_str().unwrap();
        let device = self.place.metadata().unwrap().dev();
        match self.kind {
            Kind::Exfat => succeeds("mount.exfat-fuse", &[&self.device, place])?,
            Kind::Fat => succeeds("mount", &["-t", "vfat", &self.device, place])?,
            Kind::Ntfs => succeeds("mount.ntfs-3g", &[&self.device, place])?,
        };
        eventually("the mount", || self.place.metadata().unwrap().dev() != device);
        Some(())
    }

    /// Remounts the image, which drops everything that was not written.
    #[cfg(feature = "gateway")]
    fn mount_again(&self) {
        succeeds("umount", &[self.place.to_str().unwrap()]).unwrap();
        // The FUSE server may still be writing.
        eventually("the second mount", || self.mount().is_some());
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.place).output();
        let _ = Command::new("losetup").args(["--detach", &self.device]).output();
    }
}

/// Runs a test on every file system that can be mounted.
fn on_each(test: impl Fn(Kind, &Path) + Send + Sync) {
    with_own_mounts(|| {
        for kind in [Kind::Exfat, Kind::Fat, Kind::Ntfs] {
            let place = Place::new();
            let path = place.path("").canonicalize().unwrap();
            match Mounted::over(&path, kind) {
                Some(_mounted) => test(kind, &path),
                None => eprintln!("SKIPPED: {kind:?} cannot be mounted here"),
            }
        }
    });
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.retain(|name| name != ".handout-mirror.json");
    names.sort();
    names
}

fn handout(folder: &Path, arguments: &[&str]) -> Outcome {
    Outcome::of(run(Command::new(PROGRAM).args(arguments).current_dir(folder)))
}

#[test]
fn fetch_saves_on_exfat_fat_and_ntfs() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir_all(folder.path().join("files/sub")).unwrap();
    for name in ["files/a.txt", "files/sub/b.txt"] {
        fs::write(folder.path().join(name), sample(71, 300_000)).unwrap();
    }
    let config = "[file.files]\nlisten = [\"127.0.0.1:0\"]\npath = \"files\"";
    let daemon = Daemon::start_in(folder, config, |_| {});
    let server = daemon.tcp("file.files").to_string();
    on_each(|kind, place| {
        let fetch = |more: &[&str]| handout(place, &[&["fetch", &server], more].concat());
        fetch(&["a.txt"]).succeeded();
        assert!(fs::read(place.join("a.txt")).unwrap() == sample(71, 300_000));
        fetch(&["a.txt"]).failed_with(&["is there already"]);
        fs::write(place.join("a.txt"), "old").unwrap();
        fetch(&["a.txt", "--force"]).succeeded();
        fetch(&["--all"]).succeeded();
        let outcome = fetch(&["--all", "-o", "."]);
        assert_eq!(outcome.succeeded().stderr.matches("unchanged").count(), 2, "{outcome:?}");
        assert!(fs::read(place.join("sub/b.txt")).unwrap() == sample(71, 300_000));
        assert!(!names(place).iter().any(|name| name.starts_with('.')), "{kind:?}");
    });
}

#[test]
fn reports_names_that_the_file_system_rejects() {
    on_each(|kind, place| {
        if kind == Kind::Ntfs {
            return;
        }
        for name in ["a:b", "what?", "a|b", "a<b"] {
            let server = Server::sends(document(name, b"alpha"));
            let outcome = handout(place, &["fetch", &server.address.to_string()]);
            outcome.failed_with(&[name, "the file system does not accept this name"]);
        }
        assert!(names(place).iter().all(|name| !name.starts_with('.')), "{:?}", names(place));
    });
}

#[test]
fn keeps_files_whose_names_differ_in_case_apart() {
    on_each(|kind, place| {
        let upper = Server::sends(document("A.txt", b"upper"));
        let lower = Server::sends(document("a.txt", b"lower"));
        handout(place, &["fetch", &upper.address.to_string()]).succeeded();
        let outcome = handout(place, &["fetch", &lower.address.to_string()]);
        if kind == Kind::Ntfs {
            outcome.succeeded();
        } else {
            outcome.failed_with(&["a.txt", "is there already"]);
        }
        assert_eq!(fs::read(place.join("A.txt")).unwrap(), b"upper");
    });
}

#[cfg(feature = "gateway")]
#[test]
fn download_saves_each_file_once_on_exfat_fat_and_ntfs() {
    use crate::web::{Reply, Web, http_date};

    // An odd second, which FAT cannot store.
    let time = http_date(1_700_000_001);
    let web = Web::answers(move |request| match request.header("if-modified-since") {
        Some(since) if since == time => Reply::status(304),
        _ => Reply::ok(sample(72, 500_000)).with("Last-Modified", &time),
    });
    with_own_mounts(|| {
        for kind in [Kind::Exfat, Kind::Fat, Kind::Ntfs] {
            let place = Place::new();
            let path = place.path("").canonicalize().unwrap();
            let Some(mounted) = Mounted::over(&path, kind) else {
                eprintln!("SKIPPED: {kind:?} cannot be mounted here");
                continue;
            };
            let url = web.url("file");
            let into = path.to_str().unwrap();
            let download = |more: &[&str]| {
                handout(Path::new("/"), &[&["download", &url, "-o", into], more].concat())
            };
            download(&[]).succeeded();
            download(&[]).failed_with(&["exists already"]);
            download(&["--force"]).succeeded();
            download(&["--update"]).succeeded();
            for _ in 0..2 {
                mounted.mount_again();
                let outcome = download(&["--update"]);
                let stderr = &outcome.succeeded().stderr;
                assert!(stderr.contains("1 unchanged, 0 failed, 0 B"), "{kind:?}: {outcome:?}");
            }
            assert_eq!(names(&path), ["file"], "{kind:?}");
            assert!(fs::read(path.join("file")).unwrap() == sample(72, 500_000));
        }
    });
}

#[cfg(feature = "gateway")]
#[test]
fn refuses_entries_with_equivalent_names() {
    use crate::web::{Reply, Web};

    let web = Web::answers(|request| Reply::ok(request.target.clone()));
    on_each(|kind, place| {
        for policy in ["--force", "--update"] {
            let urls = [web.url("File.txt"), web.url("file.txt"), web.url("other")];
            let [upper, lower, other] = urls.each_ref().map(String::as_str);
            let outcome = handout(place, &["download", upper, lower, other, policy]);
            if kind == Kind::Ntfs {
                outcome.succeeded();
            } else {
                let words = "the file system does not distinguish this name from \"File.txt\"";
                outcome.failed_with(&["file.txt", words]);
            }
            assert_eq!(fs::read(place.join("File.txt")).unwrap(), b"/File.txt");
            assert_eq!(fs::read(place.join("other")).unwrap(), b"/other");
        }
    });
}

#[cfg(feature = "gateway")]
#[test]
fn mirrors_and_alert_queues_work_on_exfat_fat_and_ntfs() {
    use crate::web::{Reply, Web};

    let web = Web::always(Reply::ok("alpha"));
    on_each(|kind, place| {
        fs::create_dir(place.join("state")).unwrap();
        fs::create_dir(place.join("files")).unwrap();
        let path = place.display();
        let config = format!(
            "[mirror.m]\ninto = \"{path}/files\"\nurls = [\"{}\"]\n\
             [file.file]\nlisten = [\"127.0.0.1:0\"]\npath = \"{path}/files/a.txt\"\n\
             [mail.ops]\nserver = \"127.0.0.1:1\"\nfrom = \"a@example.org\"\nto = [\"b@example.org\"]\n\
             [alert]\nto = [\"mail.ops\"]\nstate = \"{path}/state\"\nwait = \"50ms\"\n",
            web.url("a.txt")
        );
        fs::write(place.join("files/a.txt"), "old").unwrap();
        let mut daemon = Daemon::start(&config);
        eventually("the mirrored file", || {
            decode(&read_all(daemon.tcp("file.file"))).1 == b"alpha"
        });
        fs::remove_file(place.join("files/a.txt")).unwrap();
        eventually("the alert in the queue", || {
            let queue = fs::read_to_string(place.join("state/.handout-alerts.json"));
            queue.is_ok_and(|queue| queue.contains("file.file"))
        });
        // The daemon may be writing the queue until it ends.
        assert!(daemon.stop().success());
        assert_eq!(names(&place.join("state")), [".handout-alerts.json"], "{kind:?}");
    });
}

/// Targets of `-o` other than regular files.
fn special_files(folder: &Path) -> Vec<(PathBuf, FileType)> {
    let mode = Mode::RUSR | Mode::WUSR;
    let device = makedev(1, 3);
    let mut special = Vec::new();
    for (name, kind) in [("null", FileType::CharacterDevice), ("fifo", FileType::Fifo)] {
        // Only root can create devices.
        if mknodat(CWD, folder.join(name), kind, mode, device).is_ok() {
            special.push((folder.join(name), kind));
        }
        symlink(name, folder.join(format!("to-{name}"))).unwrap();
    }
    special
}

#[test]
fn output_option_writes_to_devices_and_fifos() {
    let server = Server::sends(document("null", b"alpha"));
    let address = server.address.to_string();
    let place = Place::new();
    special_files(&place.path(""));
    for force in [&[][..], &["--force"]] {
        for name in ["null", "to-null", "/dev/null"] {
            if place.path(name).exists() {
                place.fetch(server.address, [&["-o", name][..], force].concat()).succeeded();
            }
        }
        for name in ["fifo", "to-fifo"] {
            let fifo = place.path(name);
            let read = std::thread::spawn(move || fs::read(fifo).unwrap());
            place.fetch(server.address, [&["-o", name][..], force].concat()).succeeded();
            assert_eq!(read.join().unwrap(), b"alpha");
        }
        // A server cannot choose a device.
        if place.path("null").exists() {
            place.fetch(server.address, force).failed_with(&["null", "never replaced"]);
        }
    }
    let full = place.fetch(server.address, ["-o", "/dev/full"]);
    full.failed_with(&["/dev/full", "No space left on device"]);
    let kind = |name: &str| fs::symlink_metadata(place.path(name)).unwrap().file_type();
    assert!(kind("fifo").is_fifo() && kind("to-fifo").is_symlink() && kind("to-null").is_symlink());
    assert!(!place.path("null").exists() || kind("null").is_char_device());
    let outcome = handout(&place.path(""), &["fetch", &address, "-o", "/dev/stdout"]);
    assert_eq!(outcome.succeeded().stdout, b"alpha");
}

#[test]
fn output_option_refuses_sockets() {
    let server = Server::sends(document("socket", b"alpha"));
    let place = Place::new();
    let _socket = UnixListener::bind(place.path("socket")).unwrap();
    symlink("socket", place.path("link")).unwrap();
    for force in [&[][..], &["--force"]] {
        for name in ["socket", "link"] {
            let arguments = [&["-o", name][..], force].concat();
            place.fetch(server.address, arguments).failed_with(&[name, "is a socket"]);
        }
        place.fetch(server.address, force).failed_with(&["socket", "never replaced"]);
    }
    assert!(fs::symlink_metadata(place.path("socket")).unwrap().file_type().is_socket());
    assert_eq!(place.names(), ["link", "socket"]);
}

#[test]
fn output_option_replaces_links_only_with_force() {
    let server = Server::sends(document("a", b"alpha"));
    let place = Place::new();
    fs::write(place.path("target"), "mine").unwrap();
    symlink("target", place.path("link")).unwrap();
    place.fetch(server.address, ["-o", "link"]).failed_with(&["is there already"]);
    place.fetch(server.address, ["-o", "link", "--force"]).succeeded();
    assert_eq!((place.read("target"), place.read("link")), (b"mine".to_vec(), b"alpha".to_vec()));
}

#[test]
fn waits_for_the_reader_of_a_fifo_within_timeout() {
    let server = Server::sends(document("a", b"alpha"));
    let place = Place::new();
    special_files(&place.path(""));
    let outcome = place.fetch(server.address, ["-o", "fifo", "--timeout", "300ms"]);
    outcome.failed_with(&["fifo", "no process reads it"]);
}

#[cfg(feature = "gateway")]
#[test]
fn download_never_replaces_devices_fifos_and_sockets() {
    use crate::web::{Reply, Web};

    let web = Web::always(Reply::ok("alpha"));
    let place = Place::new();
    special_files(&place.path(""));
    let _socket = UnixListener::bind(place.path("socket")).unwrap();
    let before = place.names();
    for name in &before {
        for policy in [&[][..], &["--force"], &["--update"]] {
            let url = web.url(name);
            let outcome = handout(&place.path(""), &[&["download", &url], policy].concat());
            outcome.failed_with(&[name, "only regular files are replaced"]);
        }
    }
    let mut after = place.names();
    after.retain(|name| name != ".handout-mirror.json");
    assert_eq!(after, before);
    let outcome = handout(&place.path(""), &["download", &web.url("a"), "-o", "/dev/null"]);
    outcome.failed_with(&["/dev/null", "not a directory"]);
}

#[test]
fn refuses_a_server_supplied_dash() {
    let server = Server::sends(document("-", b"alpha"));
    let place = Place::new();
    let outcome = place.fetch(server.address, [""; 0]);
    assert!(outcome.failed_with(&["it stands for standard output", "-o FILE"]).stdout.is_empty());
    place.fetch(server.address, ["-o", "file"]).succeeded();
    assert_eq!(place.names(), ["file"]);
}

#[test]
fn serves_files_that_report_no_size() {
    let config = "[file.one]\nlisten = [\"127.0.0.1:0\"]\npath = \"/proc/version\"\n\
                  [file.sys]\nlisten = [\"127.0.0.1:0\"]\npath = \"/sys/kernel/mm/transparent_hugepage/enabled\"\n\
                  [file.all]\nlisten = [\"127.0.0.1:0\"]\npath = \"/proc/sys/kernel\"\n";
    let sys = Path::new("/sys/kernel/mm/transparent_hugepage/enabled");
    let config = if sys.exists() {
        config.to_owned()
    } else {
        config.replace(sys.to_str().unwrap(), "/proc/version")
    };
    let daemon = Daemon::start(&config);
    let version = fs::read("/proc/version").unwrap();
    assert_eq!(decode(&read_all(daemon.tcp("file.one"))).1, version);
    if sys.exists() {
        assert_eq!(decode(&read_all(daemon.tcp("file.sys"))).1, fs::read(sys).unwrap());
    }
    let place = Place::new();
    place.fetch(daemon.tcp("file.all"), ["ostype"]).succeeded();
    assert_eq!(place.read("ostype"), fs::read("/proc/sys/kernel/ostype").unwrap());
}
