//! Regular files, opened without waiting, and folders that no name leads out of.
//!
//! This file knows files and their states; what is made of them is not its business.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use crate::fs::beneath;
use jiff::Timestamp;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

/// The longest name of a file in a folder, in bytes, with its sub-folders.
pub const MAX_NAME: usize = 4096;

/// Largest content of a file whose size does not tell its length, in bytes.
const MAX_UNSIZED: usize = 1 << 20;

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    device: u64,
    inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
    /// Hash of the content of an unsized file, else 0: its times tell nothing.
    content: u64,
}

impl Stamp {
    /// The state that `metadata` tells of.
    pub fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            content: 0,
        }
    }

    /// Whether the file system does not tell the length of the content, as procfs and sysfs.
    pub fn is_unsized(&self) -> bool {
        self.content != 0
    }

    /// Unlike equality, this holds when a file got another name, or lost its only one.
    fn same_content(&self, other: &Self) -> bool {
        (self.size, self.modified) == (other.size, other.modified)
    }

    /// When the content was last changed, to the second.
    pub fn modified(&self) -> Timestamp {
        second(self.modified.0)
    }
}

/// A time of a file; one that cannot be told, as a broken file system has it, is the nearest.
fn second(seconds: i64) -> Timestamp {
    let nearest = if seconds < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_second(seconds).unwrap_or(nearest)
}

/// A regular file, open for reading, with its state when it was opened.
#[derive(Debug)]
pub struct OpenFile {
    file: fs::File,
    /// The state that is read.
    pub stamp: Stamp,
    /// The content of an unsized file when it was opened.
    snapshot: Option<Vec<u8>>,
}

impl OpenFile {
    /// Opens a file without waiting, whatever it is, and only if it is a regular one.
    ///
    /// # Errors
    /// If it cannot be opened or is of another kind.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Looked at first, as opening alone can do something to a device.
        regular(&fs::metadata(path)?)?;
        let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        Self::new(fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?)
    }

    fn new(file: fs::File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        regular(&metadata)?;
        let mut stamp = Stamp::of(&metadata);
        let snapshot = read_unsized(&file, stamp.size)?;
        if let Some(snapshot) = &snapshot {
            let mut hasher = DefaultHasher::new();
            snapshot.hash(&mut hasher);
            (stamp.size, stamp.content) = (snapshot.len() as u64, hasher.finish() | 1);
        }
        Ok(Self { file, stamp, snapshot })
    }

    /// The file itself, at its beginning.
    pub fn into_file(self) -> fs::File {
        self.file
    }

    /// Fills `piece` with what is at `offset`, as it was when the file was opened.
    ///
    /// # Errors
    /// If it cannot be read, or has changed meanwhile.
    pub fn read_at(&self, piece: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(snapshot) = &self.snapshot {
            let from = usize::try_from(offset).ok().and_then(|offset| snapshot.get(offset..));
            let part = from.and_then(|from| from.get(..piece.len())).ok_or_else(changed)?;
            piece.copy_from_slice(part);
            return Ok(());
        }
        self.file.read_exact_at(piece, offset).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => changed(),
            _ => error,
        })?;
        self.check()
    }

    /// The same if the kernel has it in memory; false, with `piece` as good as empty, if it would
    /// have to be waited for.
    ///
    /// # Errors
    /// As [`OpenFile::read_at`].
    pub fn read_at_once(&self, piece: &mut [u8], offset: u64) -> io::Result<bool> {
        if self.snapshot.is_some() {
            return self.read_at(piece, offset).map(|()| true);
        }
        let length = piece.len();
        let mut pieces = [io::IoSliceMut::new(piece)];
        match preadv2(&self.file, &mut pieces, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) if read == length => self.check().map(|()| true),
            // The rest is not there, or this file system cannot tell, or there is a fault, of which
            // a reading that waits tells.
            Ok(_) | Err(_) => Ok(false),
        }
    }

    /// Asked after the reading, so that what was read is of the state that was promised.
    fn check(&self) -> io::Result<()> {
        if Stamp::of(&self.file.metadata()?).same_content(&self.stamp) {
            Ok(())
        } else {
            Err(changed())
        }
    }
}

/// The content of a file whose size does not tell its length: 0 on procfs and some FUSE file
/// systems, one page on sysfs. `None` for every other file.
fn read_unsized(file: &fs::File, size: u64) -> io::Result<Option<Vec<u8>>> {
    if !matches!(size, 0 | 4096 | 16_384 | 65_536) {
        return Ok(None);
    }
    let limit = if size == 0 { MAX_UNSIZED as u64 + 1 } else { size };
    let (mut content, mut buffer) = (Vec::new(), vec![0; 4096]);
    while (content.len() as u64) < limit {
        match file.read_at(&mut buffer, content.len() as u64) {
            Ok(0) => break,
            Ok(read) => content.extend_from_slice(buffer.get(..read).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if size == 0 && content.len() > MAX_UNSIZED {
        return Err(io::Error::other("the file has no size and more than 1 MiB"));
    }
    let length = content.len() as u64;
    Ok((if size == 0 { length > 0 } else { length < size }).then_some(content))
}

fn changed() -> io::Error {
    io::Error::other("the file changed while it was read")
}

fn regular(metadata: &fs::Metadata) -> io::Result<()> {
    if metadata.is_file() { Ok(()) } else { Err(io::Error::other("not a regular file")) }
}

/// Returns the path that is the same for the same file however it is named, also before that is
/// created: what exists of it is canonical, and the rest follows as it is written.
pub(crate) fn canonical(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut canonical = PathBuf::new();
    for component in path.components() {
        match component {
            // No link is left in what exists, and what is created will be none.
            Component::ParentDir => drop(canonical.pop()),
            component => canonical.push(component),
        }
        canonical = canonical.canonicalize().unwrap_or(canonical);
    }
    canonical
}

/// A folder of which files are asked for by name.
///
/// It is opened anew for every request, so that a folder that took its name is seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
}

/// A file in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    /// Its name, with `/` between sub-folders.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// When its content was last changed, to the second.
    pub modified: Timestamp,
}

/// The files of a folder, with what is left out of them.
#[derive(Debug, Default)]
pub struct Listing {
    /// By name, in order.
    pub entries: Vec<Entry>,
    /// How many entries were left out, by reason.
    pub left_out: BTreeMap<LeftOut, u64>,
    /// Entries that could not be read, with the cause; at most [`MAX_UNREADABLE`].
    pub unreadable: Vec<(String, io::Error)>,
}

/// How many unreadable entries a list names.
pub(crate) const MAX_UNREADABLE: usize = 100;

/// Why an entry is not in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LeftOut {
    /// Its name begins with a dot.
    Hidden,
    /// Its name is not UTF-8.
    NotUtf8,
    /// Its name is too long, or cannot be sent as a line.
    Unsendable,
    /// A device, a FIFO, a socket, or a link to one or to a folder.
    NotRegular,
    /// A link that leads nowhere, or out of the folder.
    BrokenLink,
    /// The content cannot be read.
    Unreadable,
}

impl LeftOut {
    /// The reason in words, after a count.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Hidden => "hidden",
            Self::NotUtf8 => "with a name that is not UTF-8",
            Self::Unsendable => "with a name that cannot be requested",
            Self::NotRegular => "not regular",
            Self::BrokenLink => "linked to nothing or out of the folder",
            Self::Unreadable => "unreadable",
        }
    }
}

impl Listing {
    fn leave_out(&mut self, why: LeftOut) {
        *self.left_out.entry(why).or_default() += 1;
    }

    fn unreadable(&mut self, name: String, error: io::Error) {
        self.leave_out(LeftOut::Unreadable);
        if self.unreadable.len() < MAX_UNREADABLE {
            self.unreadable.push((name, error));
        }
    }
}

impl Folder {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes a folder that can be read.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn open(path: &Path) -> io::Result<Self> {
        let folder = Self::expected(path);
        folder.look().map(|()| folder)
    }

    /// One that need not be there yet.
    pub fn expected(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Looks whether the folder can be read.
    ///
    /// # Errors
    /// If it cannot be.
    pub fn look(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        Ok(beneath::open(&self.root()?, Path::new("."), flags).map(drop)?)
    }

    fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(CWD, &self.path, flags, Mode::empty())?)
    }

    /// Opens the file of that name.
    ///
    /// Hidden files do not exist, nor does what lies outside, whatever links say. A link that
    /// stays inside works, also one that leads through hidden names, as Kubernetes makes them.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if there is no such file, else why it cannot be read.
    pub fn file(&self, name: &str) -> io::Result<OpenFile> {
        if !is_visible(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let root = self.root()?;
        // Looked at first, as opening alone can do something to a device.
        let look = open_beneath(&root, name, OFlags::PATH)?;
        if !fs::File::from(look).metadata()?.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
        OpenFile::new(open_beneath(&root, name, flags)?.into())
    }

    /// Every file that can be asked for, by name, in order; not through links to folders. `None`
    /// if there are more than `max`.
    ///
    /// # Errors
    /// If the folder cannot be read. Sub-folders that cannot be are left out.
    pub fn list(&self, max: usize) -> io::Result<Option<Listing>> {
        let root = self.root()?;
        let mut listing = Listing::default();
        let mut folders = VecDeque::from([String::new()]);
        while let Some(folder) = folders.pop_front() {
            let path = if folder.is_empty() { "." } else { &folder };
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            let opened = match beneath::open(&root, Path::new(path), flags) {
                Ok(opened) => opened,
                Err(error) if folder.is_empty() => return Err(error.into()),
                Err(error) => {
                    listing.unreadable(folder, error.into());
                    continue;
                }
            };
            for entry in Dir::read_from(&opened)? {
                let entry = entry?;
                let bytes = entry.file_name().to_bytes();
                if bytes == b"." || bytes == b".." {
                    continue;
                }
                if bytes.starts_with(b".") {
                    listing.leave_out(LeftOut::Hidden);
                    continue;
                }
                let Ok(last) = str::from_utf8(bytes) else {
                    listing.leave_out(LeftOut::NotUtf8);
                    continue;
                };
                let separator = if folder.is_empty() { "" } else { "/" };
                let name = format!("{folder}{separator}{last}");
                if !is_visible(&name) || !can_be_requested(&name) {
                    listing.leave_out(LeftOut::Unsendable);
                    continue;
                }
                // Some file systems do not tell the kind.
                let kind = match entry.file_type() {
                    FileType::Unknown => statat(&opened, last, AtFlags::SYMLINK_NOFOLLOW)
                        .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
                    known => known,
                };
                match kind {
                    FileType::Directory => folders.push_back(name),
                    FileType::RegularFile | FileType::Symlink => {
                        let look = match open_beneath(&root, &name, OFlags::PATH) {
                            Ok(look) => look,
                            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                                listing.leave_out(LeftOut::BrokenLink);
                                continue;
                            }
                            Err(error) => {
                                listing.unreadable(name, error);
                                continue;
                            }
                        };
                        let metadata = fs::File::from(look).metadata()?;
                        if metadata.is_file() {
                            let (size, modified) = (metadata.size(), second(metadata.mtime()));
                            listing.entries.push(Entry { name, size, modified });
                        } else {
                            listing.leave_out(LeftOut::NotRegular);
                        }
                    }
                    _ => listing.leave_out(LeftOut::NotRegular),
                }
                if listing.entries.len() > max || folders.len() > max {
                    return Ok(None);
                }
            }
        }
        listing.entries.sort();
        Ok(Some(listing))
    }
}

/// Whether a name can be that of a file that is handed out: it is relative, and nothing in it is
/// hidden or leads upwards.
fn is_visible(name: &str) -> bool {
    name.len() <= MAX_NAME
        && !name.contains('\0')
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

/// Whether a name arrives as it is when it is sent as a line.
fn can_be_requested(name: &str) -> bool {
    !name.contains('\n') && !name.ends_with('\r')
}

fn open_beneath(root: &OwnedFd, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
    beneath::open(root, Path::new(name), flags).map_err(|error| match error {
        // Where it leads is nobody's business.
        Errno::NOENT | Errno::NOTDIR | Errno::XDEV | Errno::LOOP | Errno::NAMETOOLONG => {
            io::ErrorKind::NotFound.into()
        }
        other => other.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::symlink;

    /// Names that meet often, hidden ones and those of folders for themselves among them.
    fn name() -> impl Strategy<Value = String> {
        let part =
            prop_oneof![6 => "[ab]", 2 => "\\.[ab]", 2 => Just("..".to_owned()), 1 => "[./]"];
        prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
    }

    proptest! {
        #[test]
        fn no_name_that_is_served_leaves_the_folder_or_is_hidden(
            files in prop::collection::vec("\\.?[ab](/\\.?[ab]){0,2}", 1..6),
            links in prop::collection::vec(("[ab](/[ab])?", "(/|(\\.\\./){0,3})[ab](/[ab])?"), 0..6),
            names in prop::collection::vec(name(), 1..20),
        ) {
            // Files of the same names lie around the folder and in it.
            let around = tempfile::tempdir().unwrap();
            let around = around.path().canonicalize().unwrap();
            let root = around.join("around/a");
            fs::create_dir_all(&root).unwrap();
            for folder in [&around, &around.join("around"), &root] {
                for file in &files {
                    let path = folder.join(file);
                    // What has no folder to be in, or a name that is taken, is left out.
                    let _ = fs::create_dir_all(path.parent().unwrap());
                    let _ = fs::File::create_new(path);
                }
            }
            for (name, target) in links {
                let absolute = target.strip_prefix('/').map(|target| around.join(target));
                let _ = symlink(absolute.unwrap_or(target.into()), root.join(name));
            }
            let folder = Folder::open(&root).unwrap();
            let hidden = |name: &str| name.split('/').any(|part| part.starts_with('.'));
            for name in names {
                if let Ok(open) = folder.file(&name) {
                    let descriptor = open.into_file();
                    let link = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
                    let real = fs::read_link(link).unwrap();
                    prop_assert!(real.starts_with(&root), "{name:?} leads to {real:?}");
                    prop_assert!(!hidden(&name), "{name:?}");
                }
            }
            for entry in folder.list(usize::MAX).unwrap().unwrap().entries {
                prop_assert!(!hidden(&entry.name), "{:?}", entry.name);
                prop_assert!(folder.file(&entry.name).is_ok(), "{:?}", entry.name);
            }
        }
    }
}
