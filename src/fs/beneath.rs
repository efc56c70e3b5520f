//! Opens paths that must stay beneath a folder, despite links and renames.
//!
//! openat2(2) with `RESOLVE_BENEATH` does this from Linux 5.6 on, unless a seccomp filter refuses
//! it, as systemd's `RestrictSUIDSGID=` does. [`walk`] is the equivalent.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2, readlinkat};
use rustix::io::Errno;

/// Maximum number of attempts that races with renames may fail.
const ATTEMPTS: usize = 16;

/// Maximum number of links followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// Maximum depth of a walk: each folder on the way holds a descriptor.
const MAX_DEPTH: usize = 128;

/// Opens `path` relative to `root`. Absolute paths and absolute links count as leading out.
///
/// # Errors
/// [`Errno::XDEV`] if the path leads out, otherwise those of openat2(2).
pub(crate) fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    match ask_kernel(root.as_fd(), path, flags) {
        // Filters refuse with ENOSYS or EPERM; EAGAIN means that renames never ceased.
        Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN) => walk(root.as_fd(), path, flags),
        opened => opened,
    }
}

fn ask_kernel(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let mut attempts = 0;
    loop {
        let opened = openat2(root, path, flags, Mode::empty(), resolve);
        attempts += 1;
        if !matches!(opened, Err(Errno::AGAIN)) || attempts == ATTEMPTS {
            return opened;
        }
    }
}

/// Opens each folder from the one before and never through a link, which is read instead. `..`
/// returns to the previous folder, even if the current one was moved, so renames cannot lead above
/// `root`.
fn walk(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut entered: Vec<OwnedFd> = Vec::new();
    // A stack: the next name is the last element.
    let mut ahead = Vec::new();
    push_names(path.as_os_str().as_bytes(), &mut ahead)?;
    let (mut links, mut attempts) = (0, 0);
    while let Some(name) = ahead.pop() {
        let here = entered.last().map_or(root, AsFd::as_fd);
        let is_last = ahead.is_empty();
        match name.as_slice() {
            // Two adjacent separators enclose an empty name.
            b"" | b"." if is_last => return openat(here, c".", flags, Mode::empty()),
            b"" | b"." => check_searchable(here)?,
            b".." => {
                check_searchable(here)?;
                entered.pop().ok_or(Errno::XDEV)?;
                if is_last {
                    ahead.push(b".".to_vec());
                }
            }
            name_here => {
                let follows = !is_last || !flags.contains(OFlags::NOFOLLOW);
                let check = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let found = openat(here, name_here, check, Mode::empty())?;
                match FileType::from_raw_mode(fstat(&found)?.st_mode) {
                    FileType::Symlink if follows => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(Errno::LOOP);
                        }
                        // Reads the opened link, not one that has replaced it.
                        push_names(readlinkat(&found, c"", Vec::new())?.as_bytes(), &mut ahead)?;
                    }
                    FileType::Directory if !is_last => {
                        if entered.len() == MAX_DEPTH {
                            return Err(Errno::NAMETOOLONG);
                        }
                        entered.push(found);
                    }
                    _ if !is_last => return Err(Errno::NOTDIR),
                    // The file that was checked, not one that has replaced it.
                    _ if flags == OFlags::PATH | OFlags::CLOEXEC => return Ok(found),
                    _ => match openat(here, name_here, flags | OFlags::NOFOLLOW, Mode::empty()) {
                        // Replaced by a link since it was checked.
                        Err(Errno::LOOP) if follows && attempts < ATTEMPTS => {
                            attempts += 1;
                            ahead.push(name);
                        }
                        opened => return opened,
                    },
                }
            }
        }
    }
    Err(Errno::NOENT)
}

/// Pushes the names of a path so that the first is popped next.
fn push_names(path: &[u8], ahead: &mut Vec<Vec<u8>>) -> Result<(), Errno> {
    match path.first() {
        None => Err(Errno::NOENT),
        Some(b'/') => Err(Errno::XDEV),
        Some(_) => {
            ahead.extend(path.rsplit(|&byte| byte == b'/').map(<[u8]>::to_vec));
            Ok(())
        }
    }
}

/// Fails without permission to search the folder, which the kernel also requires for `..`.
fn check_searchable(folder: BorrowedFd<'_>) -> Result<(), Errno> {
    openat(folder, c".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::{Duration, Instant};

    use proptest::prelude::*;
    use rustix::fs::{CWD, FileType, RenameFlags, fchmod, mknodat, renameat_with};
    use tempfile::TempDir;

    /// Flags to check a file, to open it, and to list a folder.
    const USES: [OFlags; 3] = [
        OFlags::PATH,
        OFlags::NONBLOCK.union(OFlags::NOCTTY),
        OFlags::DIRECTORY.union(OFlags::NOFOLLOW),
    ];

    /// A folder `root` with a file, and a file of the same name beside it.
    fn root() -> (TempDir, OwnedFd) {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("root/a/b")).unwrap();
        fs::write(folder.path().join("file"), "outside").unwrap();
        fs::write(folder.path().join("root/file"), "inside").unwrap();
        fs::write(folder.path().join("root/a/file"), "inside").unwrap();
        let root = fs::File::open(folder.path().join("root")).unwrap().into();
        (folder, root)
    }

    /// Returns the device and inode numbers.
    fn identity(opened: Result<OwnedFd, Errno>) -> Result<(u64, u64), Errno> {
        let stat = fstat(opened?)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    fn assert_same_as_kernel(root: &OwnedFd, path: &str) {
        for flags in USES.map(|flags| flags | OFlags::CLOEXEC) {
            let walked = identity(walk(root.as_fd(), Path::new(path), flags));
            // Renames by other tests make the kernel give up.
            let mut asked = Err(Errno::AGAIN);
            while asked == Err(Errno::AGAIN) {
                asked = identity(ask_kernel(root.as_fd(), Path::new(path), flags));
            }
            assert_eq!(walked, asked, "{path:?} {flags:?}");
        }
    }

    #[test]
    fn resolves_paths_as_the_kernel_does() {
        let (folder, root) = root();
        let inside = folder.path().join("root");
        let fifo = FileType::Fifo;
        mknodat(CWD, inside.join("fifo"), fifo, 0o600.into(), 0).unwrap();
        let outside = folder.path().join("file");
        let links = [
            ("absolute", outside.to_str().unwrap()),
            ("back", "a/b/../.."),
            ("dangling", "none"),
            ("folder", "a/"),
            ("here", "."),
            ("into_file", "file/"),
            ("itself", "itself"),
            ("out", "../file"),
            ("out_and_back", "../root/file"),
            ("over_root", "a/../../file"),
            ("root", "/"),
            ("slashes", "a//b///..//file"),
            // A trailing separator makes the kernel follow the next link.
            ("up", ".."),
            ("up_with_end", "up/"),
            ("within", "../root"),
            ("a/b/deep", "../../file"),
            ("a/b/out", "../../../file"),
        ];
        for (link, target) in links {
            symlink(target, inside.join(link)).unwrap();
        }
        let names = links.map(|(link, _)| link);
        let others = ["", ".", "..", "/", "a", "a/", "a/.", "a/..", "a/../..", "a/b/../file"];
        let more = ["file", "file/", "file/.", "file/x", "fifo", "none", "none/x", "./file"];
        for name in names.into_iter().chain(others).chain(more) {
            for end in ["", "/", "/.", "/..", "/file", "/../file", "/b/deep"] {
                assert_same_as_kernel(&root, &format!("{name}{end}"));
            }
        }
        assert_same_as_kernel(&root, &"x".repeat(256));
    }

    #[test]
    fn follows_as_many_links_as_the_kernel() {
        let (folder, root) = root();
        symlink("file", folder.path().join("root/0")).unwrap();
        for number in 1..45 {
            let target = (number - 1).to_string();
            symlink(target, folder.path().join(format!("root/{number}"))).unwrap();
            assert_same_as_kernel(&root, &number.to_string());
        }
    }

    #[test]
    fn bounds_the_number_of_descriptors() {
        let (folder, root) = root();
        let mut path = folder.path().join("root");
        for _ in 0..MAX_DEPTH {
            path.push("d");
        }
        fs::create_dir_all(path.join("d")).unwrap();
        fs::write(path.join("file"), "").unwrap();
        fs::write(path.join("d/file"), "").unwrap();
        let walked = |depth| walk(root.as_fd(), Path::new(&("d/".repeat(depth) + "file")), USES[0]);
        assert!(walked(MAX_DEPTH).is_ok());
        assert_eq!(walked(MAX_DEPTH + 1).unwrap_err(), Errno::NAMETOOLONG);
        // Back and forth is not deep.
        let path = "a/../".repeat(2 * MAX_DEPTH) + "file";
        assert_same_as_kernel(&root, &path);
    }

    #[test]
    fn distinguishes_denied_from_missing_files() {
        // Drops root, which may read everything.
        if rustix::process::geteuid().is_root() {
            let (folder, root) = root();
            let path = folder.path().to_owned();
            for (name, mode) in [("root/a", 0o600), ("root/file", 0)] {
                let file = fs::File::open(path.join(name)).unwrap();
                fchmod(file, mode.into()).unwrap();
            }
            // Changes the user of one thread only.
            std::thread::spawn(move || {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_uid(nobody).unwrap();
                for path in ["file", "a/file", "a/..", "a/../file", "a/b/..", "a/none", "a"] {
                    assert_same_as_kernel(&root, path);
                }
                let refused = walk(root.as_fd(), Path::new("a/../file"), USES[1]);
                assert_eq!(refused.unwrap_err(), Errno::ACCESS);
            })
            .join()
            .unwrap();
        }
    }

    /// Calls `meddle` repeatedly while `path` is opened, which must find a file inside or none.
    fn assert_never_outside(path: &str, meddle: impl Fn(&Path) + Sync) {
        let (folder, root) = root();
        let outside = identity(Ok(fs::File::open(folder.path().join("file")).unwrap().into()));
        let stop = AtomicBool::new(false);
        let mut opened = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    meddle(folder.path());
                }
            });
            let start = Instant::now();
            while start.elapsed() < Duration::from_millis(500) {
                for flags in USES {
                    let found = identity(walk(root.as_fd(), Path::new(path), flags));
                    opened += usize::from(found.is_ok());
                    if found == outside {
                        stop.store(true, Ordering::Relaxed);
                        panic!("{path} led outside");
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert!(opened > 0, "{path} never existed");
    }

    #[test]
    fn stays_inside_while_folders_are_moved_away() {
        // After the move, `..` of `b` is the folder around the root.
        assert_never_outside("a/b/../file", |folder| {
            fs::rename(folder.join("root/a/b"), folder.join("b")).unwrap();
            fs::rename(folder.join("b"), folder.join("root/a/b")).unwrap();
        });
    }

    #[test]
    fn stays_inside_while_files_are_replaced_by_links() {
        for (name, target, path) in
            [("root/file", "../file", "file"), ("root/a", "..", "a/file"), ("root/a", "..", "a/")]
        {
            assert_never_outside(path, |folder| {
                let (name, link) = (folder.join(name), folder.join("link"));
                let _ = symlink(target, &link);
                renameat_with(CWD, &name, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            });
        }
    }

    /// Paths of names that collide often.
    fn path() -> impl Strategy<Value = String> {
        let name = prop_oneof![
            6 => "[abc]",
            2 => Just("..".to_owned()),
            1 => Just(".".to_owned()),
            1 => Just(String::new()),
        ];
        prop::collection::vec(name, 1..6).prop_map(|names| names.join("/"))
    }

    #[derive(Debug, Clone)]
    enum Node {
        File,
        Folder,
        Link(String),
    }

    fn node() -> impl Strategy<Value = Node> {
        prop_oneof![
            1 => Just(Node::File),
            2 => Just(Node::Folder),
            2 => path().prop_map(Node::Link),
        ]
    }

    proptest! {
        #[test]
        fn resolves_paths_in_any_tree_as_the_kernel_does(
            nodes in prop::collection::vec(("[abc](/[abc]){0,3}", node()), 1..24),
            paths in prop::collection::vec(path(), 1..40),
        ) {
            let (folder, root) = root();
            for (name, node) in nodes {
                let path = folder.path().join("root").join(name);
                // Fails if the parent is missing or the name is taken.
                let _ = match node {
                    Node::File => fs::File::create_new(path).map(drop),
                    Node::Folder => fs::create_dir(path),
                    Node::Link(target) => symlink(target, path),
                };
            }
            for path in paths {
                assert_same_as_kernel(&root, &path);
            }
        }
    }
}
