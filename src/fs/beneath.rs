//! What is beneath a folder, opened wherever links lead, and nothing else.
//!
//! The kernel itself keeps every name inside with openat2(2), from Linux 5.6 on and where no filter
//! refuses it, as systemd's `RestrictSUIDSGID=` does. Elsewhere the way is walked here, to the
//! same end: no name, link or race leads out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2, readlinkat};
use rustix::io::Errno;

/// A race with a rename makes us try again; so often, before it is an error.
const ATTEMPTS: usize = 16;

/// How many links are followed, as by the kernel.
const MAX_LINKS: usize = 40;

/// How deep a walk goes, as each folder on the way takes a descriptor.
const MAX_DEPTH: usize = 128;

/// Opens what `path` leads to from `root`. An absolute path, or link, leads out.
///
/// # Errors
/// [`Errno::XDEV`] if it leads out, else what openat2(2) says.
pub(crate) fn open(root: &OwnedFd, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::CLOEXEC;
    match ask_kernel(root.as_fd(), path, flags) {
        // Filters refuse with either of the first two. The third is for renames without end.
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

/// Goes from folder to folder, each opened from the one before and never through a link, which is
/// read instead. `..` leads back to the folder that was left, even if what was entered from there
/// is elsewhere by now: nothing that happens meanwhile leads above `root`.
fn walk(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let mut entered: Vec<OwnedFd> = Vec::new();
    // The next name is the last.
    let mut ahead = Vec::new();
    put_ahead(path.as_os_str().as_bytes(), &mut ahead)?;
    let (mut links, mut attempts) = (0, 0);
    while let Some(name) = ahead.pop() {
        let here = entered.last().map_or(root, AsFd::as_fd);
        let is_last = ahead.is_empty();
        match name.as_slice() {
            // An empty name stands between two separators, and after one at the end.
            b"" | b"." if is_last => return openat(here, c".", flags, Mode::empty()),
            b"" | b"." => may_search(here)?,
            b".." => {
                may_search(here)?;
                entered.pop().ok_or(Errno::XDEV)?;
                if is_last {
                    ahead.push(b".".to_vec());
                }
            }
            name_here => {
                let follows = !is_last || !flags.contains(OFlags::NOFOLLOW);
                let looked = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let found = openat(here, name_here, looked, Mode::empty())?;
                match FileType::from_raw_mode(fstat(&found)?.st_mode) {
                    FileType::Symlink if follows => {
                        links += 1;
                        if links > MAX_LINKS {
                            return Err(Errno::LOOP);
                        }
                        // Of the link that was opened, whatever has its name now.
                        put_ahead(readlinkat(&found, c"", Vec::new())?.as_bytes(), &mut ahead)?;
                    }
                    FileType::Directory if !is_last => {
                        if entered.len() == MAX_DEPTH {
                            return Err(Errno::NAMETOOLONG);
                        }
                        entered.push(found);
                    }
                    _ if !is_last => return Err(Errno::NOTDIR),
                    // What was looked at, and not what has its name now.
                    _ if flags == OFlags::PATH | OFlags::CLOEXEC => return Ok(found),
                    _ => match openat(here, name_here, flags | OFlags::NOFOLLOW, Mode::empty()) {
                        // It has become a link since it was looked at.
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

/// Puts the names of a path, or of what a link says, before those that are ahead.
fn put_ahead(path: &[u8], ahead: &mut Vec<Vec<u8>>) -> Result<(), Errno> {
    match path.first() {
        None => Err(Errno::NOENT),
        Some(b'/') => Err(Errno::XDEV),
        Some(_) => {
            ahead.extend(path.rsplit(|&byte| byte == b'/').map(<[u8]>::to_vec));
            Ok(())
        }
    }
}

/// Whether names may be looked up in the folder, which the kernel wants to know of `..`, too.
fn may_search(folder: BorrowedFd<'_>) -> Result<(), Errno> {
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

    /// How a file is looked at, how it is opened, how a folder is opened to be listed.
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

    /// Which file it is.
    fn identity(opened: Result<OwnedFd, Errno>) -> Result<(u64, u64), Errno> {
        let stat = fstat(opened?)?;
        Ok((stat.st_dev, stat.st_ino))
    }

    fn assert_both_ways_lead_to_the_same(root: &OwnedFd, path: &str) {
        for flags in USES.map(|flags| flags | OFlags::CLOEXEC) {
            let walked = identity(walk(root.as_fd(), Path::new(path), flags));
            // Other tests rename so much that the kernel gives up.
            let mut asked = Err(Errno::AGAIN);
            while asked == Err(Errno::AGAIN) {
                asked = identity(ask_kernel(root.as_fd(), Path::new(path), flags));
            }
            assert_eq!(walked, asked, "{path:?} {flags:?}");
        }
    }

    #[test]
    fn the_walk_leads_where_the_kernel_leads() {
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
            // Where a separator at the end of a link makes the kernel follow the next.
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
                assert_both_ways_lead_to_the_same(&root, &format!("{name}{end}"));
            }
        }
        assert_both_ways_lead_to_the_same(&root, &"x".repeat(256));
    }

    #[test]
    fn the_walk_follows_as_many_links_as_the_kernel() {
        let (folder, root) = root();
        symlink("file", folder.path().join("root/0")).unwrap();
        for number in 1..45 {
            let target = (number - 1).to_string();
            symlink(target, folder.path().join(format!("root/{number}"))).unwrap();
            assert_both_ways_lead_to_the_same(&root, &number.to_string());
        }
    }

    #[test]
    fn the_walk_does_not_take_every_descriptor() {
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
        assert_both_ways_lead_to_the_same(&root, &path);
    }

    #[test]
    fn what_may_not_be_searched_or_read_is_told_apart_from_what_is_not_there() {
        // Only for others than root, who may everything.
        if rustix::process::geteuid().is_root() {
            let (folder, root) = root();
            let path = folder.path().to_owned();
            for (name, mode) in [("root/a", 0o600), ("root/file", 0)] {
                let file = fs::File::open(path.join(name)).unwrap();
                fchmod(file, mode.into()).unwrap();
            }
            // A user of this thread alone.
            std::thread::spawn(move || {
                let nobody = rustix::process::Uid::from_raw(65534);
                rustix::thread::set_thread_uid(nobody).unwrap();
                for path in ["file", "a/file", "a/..", "a/../file", "a/b/..", "a/none", "a"] {
                    assert_both_ways_lead_to_the_same(&root, path);
                }
                let refused = walk(root.as_fd(), Path::new("a/../file"), USES[1]);
                assert_eq!(refused.unwrap_err(), Errno::ACCESS);
            })
            .join()
            .unwrap();
        }
    }

    /// Does something with the folder again and again while its files are opened in `ways`, which
    /// must lead to one of those inside or to nothing.
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
        assert!(opened > 0, "{path} was never there");
    }

    #[test]
    fn a_folder_that_is_moved_away_meanwhile_leads_nobody_outside() {
        // `..` of what was moved to beside the root is the folder around it.
        assert_never_outside("a/b/../file", |folder| {
            fs::rename(folder.join("root/a/b"), folder.join("b")).unwrap();
            fs::rename(folder.join("b"), folder.join("root/a/b")).unwrap();
        });
    }

    #[test]
    fn a_link_that_takes_the_place_of_a_file_or_a_folder_leads_nobody_outside() {
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

    /// Names that meet often, and paths of them.
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
    enum Thing {
        File,
        Folder,
        Link(String),
    }

    fn thing() -> impl Strategy<Value = Thing> {
        prop_oneof![
            1 => Just(Thing::File),
            2 => Just(Thing::Folder),
            2 => path().prop_map(Thing::Link),
        ]
    }

    proptest! {
        #[test]
        fn in_any_tree_the_walk_leads_where_the_kernel_leads(
            things in prop::collection::vec(("[abc](/[abc]){0,3}", thing()), 1..24),
            paths in prop::collection::vec(path(), 1..40),
        ) {
            let (folder, root) = root();
            for (name, thing) in things {
                let path = folder.path().join("root").join(name);
                // What has no folder to be in, or a name that is taken, is left out.
                let _ = match thing {
                    Thing::File => fs::File::create_new(path).map(drop),
                    Thing::Folder => fs::create_dir(path),
                    Thing::Link(target) => symlink(target, path),
                };
            }
            for path in paths {
                assert_both_ways_lead_to_the_same(&root, &path);
            }
        }
    }
}
