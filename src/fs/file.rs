//! Regular files, opened without blocking on devices or FIFOs, and their state.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::OFlags;
use rustix::io::{ReadWriteFlags, preadv2};

/// Maximum content of a file whose size does not reveal its length, in bytes.
const MAX_UNSIZED: usize = 1 << 20;

/// Flags that keep open(2) from blocking or acquiring a terminal.
pub(super) const NON_BLOCKING: OFlags = OFlags::NONBLOCK.union(OFlags::NOCTTY);

/// The state of a file, to detect changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    /// In bytes.
    pub size: u64,
    /// In seconds and nanoseconds, as `changed`.
    modified: (i64, i64),
    changed: (i64, i64),
    /// Hash of the content of an unsized file, whose times do not change; else 0.
    content: u64,
}

impl Stamp {
    pub(crate) fn of(metadata: &fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            content: 0,
        }
    }

    /// Returns whether the file system does not report the length of the content (procfs, sysfs).
    pub(crate) fn is_unsized(&self) -> bool {
        self.content != 0
    }

    /// Compares the content only: a rename or unlink changes other times.
    fn has_same_content(&self, other: &Self) -> bool {
        (self.size, self.modified) == (other.size, other.modified)
    }

    /// Returns the time of the last change of the content, in whole seconds.
    pub(crate) fn modified(&self) -> Timestamp {
        timestamp(self.modified.0)
    }
}

/// Converts a file time; broken file systems report times out of range.
pub(super) fn timestamp(seconds: i64) -> Timestamp {
    let nearest = if seconds < 0 { Timestamp::MIN } else { Timestamp::MAX };
    Timestamp::from_second(seconds).unwrap_or(nearest)
}

/// A regular file open for reading, with its state when it was opened.
#[derive(Debug)]
pub struct OpenFile {
    file: fs::File,
    pub(crate) stamp: Stamp,
    /// The content of an unsized file when it was opened.
    snapshot: Option<Vec<u8>>,
}

impl OpenFile {
    /// Opens a regular file and refuses any other kind.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        // Checked before, because opening a device can have an effect.
        check_regular(&fs::metadata(path)?)?;
        let flags = NON_BLOCKING.bits().cast_signed();
        Self::new(fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?)
    }

    pub(super) fn new(file: fs::File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        check_regular(&metadata)?;
        let mut stamp = Stamp::of(&metadata);
        let snapshot = read_unsized(&file, stamp.size)?;
        if let Some(snapshot) = &snapshot {
            let mut hasher = DefaultHasher::new();
            snapshot.hash(&mut hasher);
            (stamp.size, stamp.content) = (snapshot.len() as u64, hasher.finish() | 1);
        }
        Ok(Self { file, stamp, snapshot })
    }

    pub fn into_file(self) -> fs::File {
        self.file
    }

    /// Fills `piece` with the content at `offset` as it was when the file was opened, or fails if
    /// the file has changed.
    pub(crate) fn read_at(&self, piece: &mut [u8], offset: u64) -> io::Result<()> {
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
        self.check_unchanged()
    }

    /// Like [`Self::read_at`], but returns false if the content is not in the page cache. `piece`
    /// is undefined then.
    pub(crate) fn read_cached_at(&self, piece: &mut [u8], offset: u64) -> io::Result<bool> {
        if self.snapshot.is_some() {
            return self.read_at(piece, offset).map(|()| true);
        }
        let length = piece.len();
        let mut pieces = [io::IoSliceMut::new(piece)];
        match preadv2(&self.file, &mut pieces, offset, ReadWriteFlags::NOWAIT) {
            Ok(read) if read == length => self.check_unchanged().map(|()| true),
            // A blocking read reports the error, if there is one.
            Ok(_) | Err(_) => Ok(false),
        }
    }

    /// Called after reading, so that the bytes read belong to the promised state.
    fn check_unchanged(&self) -> io::Result<()> {
        let now = Stamp::of(&self.file.metadata()?);
        if now.has_same_content(&self.stamp) { Ok(()) } else { Err(changed()) }
    }
}

/// Reads the content of a file whose size does not reveal its length: 0 on procfs and some FUSE
/// file systems, one page on sysfs. Returns `None` for every other file.
fn read_unsized(file: &fs::File, size: u64) -> io::Result<Option<Vec<u8>>> {
    if !matches!(size, 0 | 4096 | 16_384 | 65_536) {
        return Ok(None);
    }
    let limit = if size == 0 { MAX_UNSIZED as u64 + 1 } else { size };
    let (mut content, mut buffer) = (Vec::new(), vec![0; 4096]);
    while (content.len() as u64) < limit {
        match file.read_at(&mut buffer, content.len() as u64) {
            Ok(0) => break,
            Ok(read) => content.extend_from_slice(buffer.split_at(read).0),
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

fn check_regular(metadata: &fs::Metadata) -> io::Result<()> {
    if metadata.is_file() { Ok(()) } else { Err(io::Error::other("not a regular file")) }
}

/// Returns the canonical path of the existing part of `path`, followed by the rest as written, so
/// that paths can be compared before they exist.
pub(crate) fn canonical(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut canonical = PathBuf::new();
    for component in path.components() {
        match component {
            // The existing part contains no link, and the rest is created without any.
            Component::ParentDir => drop(canonical.pop()),
            component => canonical.push(component),
        }
        canonical = canonical.canonicalize().unwrap_or(canonical);
    }
    canonical
}
