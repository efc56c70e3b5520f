//! Saves files while system calls fail: the result is a complete file and exit code 0, or no file
//! and a message.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::thread;

use crate::common::{DEADLINE, Daemon, PROGRAM, run, sample};
use crate::servers::{Outcome, Place};

const OPEN: &str = "EBUSY EDQUOT EEXIST EFBIG EINVAL EISDIR ELOOP EMFILE ENAMETOOLONG ENFILE \
                    ENODEV ENOENT ENOMEM ENOSPC ENOTDIR ENXIO EOPNOTSUPP EOVERFLOW EPERM EROFS \
                    ETXTBSY EAGAIN";
const LINK: &str = "EACCES EDQUOT EINVAL EIO ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOSYS \
                    ENOTDIR EOPNOTSUPP EPERM EROFS EXDEV";
const RENAME: &str = "EACCES EBUSY EDQUOT EINVAL ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC \
                      ENOSYS ENOTDIR ENOTEMPTY EPERM EROFS EXDEV";
const STAT: &str = "EACCES ELOOP ENAMETOOLONG ENOMEM ENOTDIR EOVERFLOW";
const SYNC: &str = "EDQUOT EINTR EINVAL EIO ENOSPC EROFS";

/// System calls that fail together, and the result of each error.
struct Row {
    calls: &'static [&'static str],
    /// Files whose calls fail, relative to the folder; empty for all.
    paths: &'static [&'static str],
    saved: &'static str,
    refused: &'static str,
}

impl Row {
    /// Runs the command once per error. `INTO` in an argument is the folder; `old` is the content
    /// to replace.
    fn check(&self, arguments: &[&str], old: Option<&[u8]>) {
        for (errors, is_saved) in [(self.saved, true), (self.refused, false)] {
            for error in errors.split_whitespace() {
                self.check_error(error, is_saved, arguments, old);
            }
        }
    }

    fn check_error(&self, error: &str, is_saved: bool, arguments: &[&str], old: Option<&[u8]>) {
        let what = format!("{arguments:?}: {:?}: {error}", self.calls);
        let place = Place::new();
        if let Some(old) = old {
            fs::write(place.path("file"), old).unwrap();
        }
        let outcome = self.run(error, &place, arguments);
        let mut names = place.names();
        // `--update` keeps it.
        names.retain(|name| name != ".handout-mirror.json");
        if is_saved {
            assert_eq!(outcome.code, Some(0), "{what}: {outcome:?}");
            assert!(place.read("file") == content(), "{what}");
        } else {
            assert_eq!(outcome.code, Some(1), "{what}: {outcome:?}");
            assert!(outcome.stderr.contains("handout: "), "{what}: {outcome:?}");
            assert_eq!(fs::read(place.path("file")).ok().as_deref(), old, "{what}");
        }
        // Only a temporary file that cannot be removed, or that belongs to another process, may remain.
        let may_leave = self.calls.contains(&"unlinkat") || self.calls == ["flock"] && !is_saved;
        if !may_leave {
            let file = is_saved || old.is_some();
            assert_eq!(names, if file { &["file"][..] } else { &[] }, "{what}");
        }
    }

    fn run(&self, error: &str, place: &Place, arguments: &[&str]) -> Outcome {
        let into = place.path("").canonicalize().unwrap();
        let mut command = Command::new("timeout");
        command.arg(DEADLINE.as_secs().to_string());
        command.args(["strace", "-f", "-qq", "-e", "signal=none", "-o", "/dev/null"]);
        for path in self.paths {
            // strace compares paths literally.
            command.arg("-P").arg(into.join(path).components().collect::<PathBuf>());
            if *path != "." {
                command.arg("-P").arg(path);
            }
        }
        let calls =
            || self.calls.iter().map(|call| call.split_once(':').unwrap_or((call, "when=1+")));
        let names: Vec<_> = calls().map(|(name, _)| name).collect();
        command.arg(format!("--trace={}", names.join(",")));
        for (name, when) in calls() {
            command.arg(format!("--inject={name}:error={error}:{when}"));
        }
        let into = into.to_str().unwrap();
        command.arg(PROGRAM).args(arguments.iter().map(|argument| argument.replace("INTO", into)));
        Outcome::of(run(command.stdin(Stdio::null())))
    }
}

fn content() -> Vec<u8> {
    sample(61, 100_000)
}

/// Starts a daemon that pushes the file.
fn daemon() -> Daemon {
    let config = "[file.file]\nlisten = [\"127.0.0.1:0\"]\npath = \"file\"";
    Daemon::start_with(config, &[("file", &content())], |_| {})
}

fn check(rows: &[Row], arguments: &[&str], old: Option<&[u8]>) {
    // Two at a time, because each mostly waits for processes.
    let (one, other) = rows.split_at(rows.len() / 2);
    thread::scope(|scope| {
        scope.spawn(|| one.iter().for_each(|row| row.check(arguments, old)));
        other.iter().for_each(|row| row.check(arguments, old));
    });
}

#[test]
fn fetch_saves_all_or_nothing_when_a_call_fails() {
    let daemon = daemon();
    let server = daemon.tcp("file.file").to_string();
    let row = |calls, paths, saved, refused| Row { calls, paths, saved, refused };
    let rows = [
        // The folder.
        row(&["openat:when=1"], &["."], "EACCES EINTR", OPEN),
        // The unnamed file.
        row(&["openat:when=2"], &["."], OPEN, ""),
        row(&["openat:when=2+"], &["."], "", OPEN),
        row(&["linkat"], &[], LINK, "EEXIST"),
        row(&["linkat", "renameat2"], &[], LINK, ""),
        row(&["linkat", "renameat2", "renameat"], &[], "", RENAME),
        row(&["newfstatat"], &["."], "ENOENT", STAT),
        row(&["fsync:when=1"], &[], "EINTR EINVAL ENOSYS EROFS", "EDQUOT EIO ENOSPC"),
        row(&["fsync:when=2"], &[], SYNC, ""),
        row(&["fchmod,fchmodat,fallocate,flock,utimensat,ftruncate"], &[], "EPERM", ""),
    ];
    check(&rows, &["fetch", &server, "-o", "INTO/file"], None);
    let rows = [
        row(&["linkat"], &[], LINK, ""),
        row(&["renameat"], &[], "", RENAME),
        row(&["fsync:when=2"], &[], SYNC, ""),
        row(&["fsync:when=1"], &[], "", "EDQUOT EIO ENOSPC"),
    ];
    check(&rows, &["fetch", &server, "-o", "INTO/file", "--force"], Some(b"old"));
}

#[cfg(feature = "gateway")]
#[test]
fn download_saves_all_or_nothing_when_a_call_fails() {
    use crate::web::{Reply, Web, http_date};

    const UNLINK: &str = "EACCES EBUSY EIO EISDIR ELOOP ENAMETOOLONG ENOENT ENOMEM ENOTDIR EPERM";
    // The beginning of the SHA-256 digest of `file`.
    const PART: &[&str] = &[".handout-3b9c358f36f0a31b6ad3e14f309c7cf1.part"];
    let time = http_date(1_700_000_000);
    let web = Web::always(Reply::ok(content()).with("Last-Modified", &time));
    let row = |calls, paths, saved, refused| Row { calls, paths, saved, refused };
    let rows = [
        row(&["openat:when=1"], PART, "EINTR", OPEN),
        row(&["flock"], &[], "EINTR EINVAL ENOLCK ENOSYS EOPNOTSUPP", "EAGAIN"),
        row(&["write"], PART, "", "EAGAIN EDQUOT EFBIG EINVAL EIO ENOSPC EPERM EPIPE"),
        row(&["write:when=1"], PART, "EINTR", ""),
        row(&["fstat:when=1"], PART, "", "EIO ENOMEM EOVERFLOW"),
        row(&["fstat:when=2"], PART, "", "EIO"),
        row(&["fstat:when=3"], PART, "", "EIO"),
        row(&["newfstatat"], PART, "", STAT),
        row(&["newfstatat:when=1"], PART, "ENOENT", ""),
        row(&["newfstatat:when=1"], &["."], "ENOENT", STAT),
        row(&["newfstatat:when=2"], &["."], "ENOENT", STAT),
        row(&["utimensat"], &[], "EACCES EINVAL EIO ENOENT ENOSYS EOPNOTSUPP EPERM EROFS", ""),
        row(&["fsync"], PART, "EINVAL ENOSYS EROFS", "EDQUOT EIO ENOSPC"),
        row(&["fsync"], &["."], SYNC, ""),
        row(&["renameat2"], &[], RENAME, "EEXIST"),
        row(&["renameat2", "linkat"], &[], LINK, "EEXIST"),
        row(&["renameat2", "linkat", "renameat"], &[], "", RENAME),
        row(&["renameat2", "unlinkat"], &[], UNLINK, ""),
        row(&["getdents64"], &["."], "EINVAL ENOENT ENOTDIR", ""),
        row(&["fchmod,fchmodat,fallocate,ftruncate"], &[], "EPERM", ""),
    ];
    let url = web.url("file");
    check(&rows, &["download", &url, "--retries", "0", "-o", "INTO"], None);
    // A file is saved even if the manifest of `--update` is not.
    let rows = [
        row(&["renameat:when=1"], &["."], "", RENAME),
        row(&["renameat:when=2"], &["."], RENAME, ""),
        row(&["fsync:when=1"], PART, "", "EDQUOT EIO ENOSPC"),
        row(&["flock"], &[], "ENOLCK ENOSYS", "EAGAIN"),
    ];
    check(&rows, &["download", &url, "--retries", "0", "--update", "-o", "INTO"], Some(b"old"));
    let rows = [row(
        &["mkdir"],
        &[],
        "",
        "EACCES EDQUOT ELOOP EMLINK ENAMETOOLONG ENOENT ENOSPC ENOTDIR EPERM EROFS",
    )];
    check(&rows, &["download", &url, "--retries", "0", "-o", "INTO/new"], None);
}
