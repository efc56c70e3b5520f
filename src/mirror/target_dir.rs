//! The target folder of a mirror.
//!
//! Names are single components, relative to the open folder; links are not followed. A partial
//! file has a hidden name derived from the name of the file, so that a later run finds it.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, flock, fstat, openat, statat, unlinkat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

use crate::fs::atomic::{
    DirHandle, HIDDEN_PREFIX as PREFIX, NEW_FILE, OverwritePolicy, PendingFile, SaveError,
    log_unsupported, retry,
};
use crate::text::to_hex;

/// Suffix of a partial file.
const PARTIAL_SUFFIX: &str = ".part";

/// Suffix of the metadata of a partial file.
const META_SUFFIX: &str = ".part.json";

/// Age at which a partial file is removed although the file system cannot lock it.
const UNLOCKED_AGE: Duration = Duration::from_hours(24);

/// Attempts to open a partial file that other processes rename at the same time.
const ATTEMPTS: usize = 8;

/// Metadata of an existing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LocalFile {
    /// In bytes.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl LocalFile {
    /// Returns the modification time, or `None` if [`SystemTime`] cannot represent it.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        let (seconds, nanoseconds) = self.modified;
        let since = Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?);
        UNIX_EPOCH.checked_add(since)
    }
}

/// The kind of a directory entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DirEntryKind {
    Missing,
    File(LocalFile),
    /// As a folder or a link.
    Other,
}

/// An open target folder.
#[derive(Debug)]
pub(crate) struct TargetDir {
    folder: DirHandle,
    /// Hashes of the names of the partial files of earlier runs.
    partials: HashSet<String>,
}

/// A partial file, locked against other processes where the file system has locks.
#[derive(Debug)]
pub(crate) struct PartialFile {
    /// The file, at its beginning.
    pub pending: PendingFile,
    /// Bytes from an earlier transfer.
    pub length: u64,
    hidden: PathBuf,
    is_locked: bool,
}

/// How a file system compares names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Folding {
    /// Names that differ in case only are equal.
    pub ignores_case: bool,
    /// Dots and spaces at the end are not stored, as on FAT.
    pub ignores_end: bool,
}

impl Folding {
    /// Folds more than any file system does.
    pub(crate) const ALL: Self = Self { ignores_case: true, ignores_end: true };

    /// Returns a text that is equal for all names of one file.
    pub(crate) fn fold(self, name: &str) -> String {
        let name = if self.ignores_end { name.trim_end_matches(['.', ' ']) } else { name };
        if self.ignores_case { name.to_uppercase().to_lowercase() } else { name.to_owned() }
    }
}

fn hash(name: &str) -> String {
    // 128 bits do not collide.
    to_hex(Sha256::digest(name.as_bytes()).first_chunk::<16>().expect("a digest of 32 bytes"))
}

fn hidden(name: &str, end: &str) -> PathBuf {
    format!("{PREFIX}{}{end}", hash(name)).into()
}

impl TargetDir {
    /// Opens an existing folder.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let folder = DirHandle::open(path)?;
        // A folder that may not be listed can be saved into.
        let partials = partials(&folder).unwrap_or_default();
        let partials = partials.into_iter().map(|(hash, _)| hash).collect();
        Ok(Self { folder, partials })
    }

    /// Examines the entry `name`.
    pub(crate) fn stat(&self, name: &str) -> io::Result<DirEntryKind> {
        let stat = match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(DirEntryKind::Missing),
            other => other?,
        };
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => DirEntryKind::File(local(&stat)),
            _ => DirEntryKind::Other,
        })
    }

    /// Opens a regular file for reading.
    pub(crate) fn read(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = || openat(&self.folder, name.as_ref(), flags, Mode::empty());
        let file = File::from(retry(open)?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::other("not a regular file"))
        }
    }

    /// Opens or creates the partial file of `name`, and locks it.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if another process has locked it.
    pub(crate) fn open_partial(&self, name: &str) -> io::Result<PartialFile> {
        let hidden = hidden(name, PARTIAL_SUFFIX);
        for _ in 0..ATTEMPTS {
            let flags = OFlags::RDWR
                | OFlags::CREATE
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::CLOEXEC;
            let file = File::from(retry(|| openat(&self.folder, &hidden, flags, NEW_FILE))?);
            let is_locked = match lock(&file) {
                Err(Errno::WOULDBLOCK) => return Err(io::ErrorKind::WouldBlock.into()),
                Ok(()) => true,
                Err(error) => {
                    log_unsupported("flock", Err(error));
                    false
                }
            };
            // Removes the file if an error follows.
            let temp = Some(hidden.clone().into_os_string());
            let mut pending = PendingFile::from_open(self.folder.clone(), file, temp, NEW_FILE);
            let opened = fstat(&pending.file)?;
            if FileType::from_raw_mode(opened.st_mode) != FileType::RegularFile {
                pending.keep_on_drop = true;
                return Err(io::Error::other("not a regular file"));
            }
            // Another process may have published it before it was locked.
            if self.is_at(&hidden, &pending.file)? {
                return Ok(PartialFile { pending, length: local(&opened).size, hidden, is_locked });
            }
            pending.keep_on_drop = true;
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Opens an empty partial file of `name`.
    ///
    /// # Errors
    /// As [`TargetDir::open_partial`].
    pub(crate) fn create_partial(&self, name: &str) -> io::Result<PartialFile> {
        let partial = self.open_partial(name)?;
        if partial.length > 0 {
            self.remove_partial_meta(name);
        }
        if partial.is_locked && (partial.length == 0 || partial.pending.file.set_len(0).is_ok()) {
            return Ok(PartialFile { length: 0, ..partial });
        }
        // Without a lock, another process may write to it: it is replaced by a file that no other
        // process has open.
        let PartialFile { pending, hidden, .. } = partial;
        drop(pending);
        let temp = hidden.clone().into_os_string();
        let pending = PendingFile::create_named(self.folder.clone(), temp, NEW_FILE)?;
        let is_locked = lock(&pending.file).is_ok();
        Ok(PartialFile { pending, length: 0, hidden, is_locked })
    }

    /// Whether `hidden` is the name of an open file.
    fn is_at(&self, hidden: &Path, file: &File) -> io::Result<bool> {
        let opened = fstat(file)?;
        match statat(&self.folder, hidden, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(now) => Ok((now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Publishes a complete file, or removes it if that fails. [`TargetDir::sync`] syncs the name.
    pub(crate) fn finish(
        &self,
        mut partial: PartialFile,
        name: &str,
        modified: Option<SystemTime>,
        policy: OverwritePolicy,
    ) -> Result<LocalFile, SaveError> {
        if !partial.is_locked && !self.is_at(&partial.hidden, &partial.pending.file)? {
            // Another process has replaced it.
            partial.pending.keep_on_drop = true;
            return Err(SaveError::Io(io::ErrorKind::WouldBlock.into()));
        }
        let stat = partial.pending.publish(Path::new(name), policy, modified)?;
        Ok(local(&stat))
    }

    /// Removes a partial file and its metadata.
    pub(crate) fn remove_partial(&self, mut partial: PartialFile, name: &str) {
        partial.pending.keep_on_drop = false;
        drop(partial);
        self.remove_partial_meta(name);
    }

    /// Writes the metadata of a partial file, which are needed to resume it.
    pub(crate) fn write_partial_meta(&self, name: &str, meta: &[u8]) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // Private, because the URL in it may be a secret.
        let mode = Mode::RUSR | Mode::WUSR;
        let file = retry(|| openat(&self.folder, hidden(name, META_SUFFIX), flags, mode))?;
        File::from(file).write_all(meta).inspect_err(|_| self.remove_partial_meta(name))
    }

    /// Returns the metadata of a partial file.
    pub(crate) fn read_partial_meta(&self, name: &str) -> Option<Vec<u8>> {
        self.read_small(&hidden(name, META_SUFFIX), 64 << 10).ok()
    }

    pub(crate) fn remove_partial_meta(&self, name: &str) {
        self.folder.remove(&hidden(name, META_SUFFIX));
    }

    /// Whether a partial file existed when the folder was opened.
    pub(crate) fn had_partial(&self, name: &str) -> bool {
        !self.partials.is_empty() && self.partials.contains(&hash(name))
    }

    /// Returns the size of a partial file in bytes, 0 if there is none.
    pub(crate) fn partial_size(&self, name: &str) -> u64 {
        let stat = statat(&self.folder, hidden(name, PARTIAL_SUFFIX), AtFlags::SYMLINK_NOFOLLOW);
        stat.map_or(0, |stat| local(&stat).size)
    }

    /// Reads a file of at most `limit` bytes.
    pub(crate) fn read_small(&self, name: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read(name)?.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(bytes)
    }

    /// Replaces a small private file.
    pub(crate) fn write_small(&self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.folder.write(name, Mode::RUSR | Mode::WUSR, bytes)
    }

    /// Removes a file, if it exists.
    pub(crate) fn unlink(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Finds out how the file system compares names, by means of a temporary file.
    pub(crate) fn folding(&self) -> io::Result<Folding> {
        let probe = format!("{PREFIX}{}{PARTIAL_SUFFIX}", hash("folding"));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        retry(|| openat(&self.folder, &*probe, flags, NEW_FILE))?;
        let exists = |name: &str| statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW).is_ok();
        let folding = Folding {
            ignores_case: exists(&probe.to_uppercase()),
            ignores_end: exists(&format!("{probe}.")),
        };
        self.folder.remove(Path::new(&probe));
        Ok(folding)
    }

    /// Syncs the names in the folder, as far as the file system can.
    pub(crate) fn sync(&self) {
        self.folder.sync();
    }

    /// Removes partial files that have not grown for `age`, except those of the files `keep` and
    /// those that another process has locked.
    pub(crate) fn clean<'a>(
        &self,
        keep: impl IntoIterator<Item = &'a str>,
        age: Duration,
    ) -> io::Result<()> {
        let keep: HashSet<String> = keep.into_iter().map(hash).collect();
        for (hash, name) in partials(&self.folder)? {
            if keep.contains(&hash) {
                continue;
            }
            let fresh = |partial: &File, age| {
                let modified = partial.metadata().and_then(|metadata| metadata.modified());
                // A time in the future counts as now.
                modified.is_ok_and(|at| at.elapsed().unwrap_or_default() < age)
            };
            let partial = self.read(format!("{PREFIX}{hash}{PARTIAL_SUFFIX}"));
            let busy = |partial: &File| match lock(partial) {
                Ok(()) => false,
                Err(Errno::WOULDBLOCK) => true,
                Err(_) => fresh(partial, UNLOCKED_AGE),
            };
            if !partial.is_ok_and(|partial| fresh(&partial, age) || busy(&partial)) {
                self.folder.remove(Path::new(&name));
            }
        }
        Ok(())
    }
}

/// Returns the partial files of a folder: the hash of the final name, and the hidden name.
fn partials(folder: &DirHandle) -> io::Result<Vec<(String, String)>> {
    let mut partials = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        if let Some(hash) =
            rest.strip_suffix(META_SUFFIX).or_else(|| rest.strip_suffix(PARTIAL_SUFFIX))
        {
            partials.push((hash.to_owned(), name.to_owned()));
        }
    }
    Ok(partials)
}

fn lock(file: &File) -> Result<(), Errno> {
    retry(|| flock(file, FlockOperation::NonBlockingLockExclusive))
}

fn local(stat: &rustix::fs::Stat) -> LocalFile {
    LocalFile {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: (stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn dir() -> (tempfile::TempDir, TargetDir) {
        let folder = tempfile::tempdir().unwrap();
        let dir = TargetDir::open(folder.path()).unwrap();
        (folder, dir)
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn publishes_a_complete_file_with_its_time() {
        let (folder, dir) = dir();
        let mut partial = dir.open_partial("a").unwrap();
        partial.pending.file.write_all(b"alpha").unwrap();
        assert!(names(folder.path())[0].starts_with(".handout-"));
        let modified = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let local = dir.finish(partial, "a", Some(modified), OverwritePolicy::Refuse).unwrap();
        assert_eq!(names(folder.path()), ["a"]);
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"alpha");
        assert_eq!(local, LocalFile { size: 5, modified: (1_000_000_000, 0) });
        assert_eq!(dir.stat("a").unwrap(), DirEntryKind::File(local));
        assert_eq!(local.modified(), Some(modified));
    }

    #[test]
    fn replaces_a_file_only_on_demand() {
        let (folder, dir) = dir();
        let path = folder.path().join("a");
        fs::write(&path, "old").unwrap();
        let partial = || {
            let mut partial = dir.open_partial("a").unwrap();
            partial.pending.file.write_all(b"new").unwrap();
            partial
        };
        let refused = dir.finish(partial(), "a", None, OverwritePolicy::Refuse);
        assert!(matches!(refused, Err(SaveError::Exists)));
        assert_eq!((fs::read(&path).unwrap(), names(folder.path()).len()), (b"old".to_vec(), 1));
        dir.finish(partial(), "a", None, OverwritePolicy::Replace).unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(folder.path()).len()), (b"new".to_vec(), 1));
    }

    #[test]
    fn follows_no_link() {
        let (folder, dir) = dir();
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        symlink(&secret, folder.path().join("a")).unwrap();
        symlink(&secret, folder.path().join(hidden("a", PARTIAL_SUFFIX))).unwrap();
        assert_eq!(dir.stat("a").unwrap(), DirEntryKind::Other);
        assert!(dir.read("a").is_err());
        assert!(dir.open_partial("a").is_err());
        fs::remove_file(folder.path().join(hidden("a", PARTIAL_SUFFIX))).unwrap();
        let mut partial = dir.open_partial("a").unwrap();
        partial.pending.file.write_all(b"new").unwrap();
        dir.finish(partial, "a", None, OverwritePolicy::Replace).unwrap();
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"new");
    }

    #[test]
    fn locks_a_partial_file_and_finds_it_again() {
        let (folder, dir) = dir();
        let mut partial = dir.open_partial("a").unwrap();
        partial.pending.file.write_all(b"half").unwrap();
        partial.pending.keep_on_drop = true;
        let busy = TargetDir::open(folder.path()).unwrap().open_partial("a").unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        dir.clean([], Duration::ZERO).unwrap();
        drop(partial);
        let dir = TargetDir::open(folder.path()).unwrap();
        assert_eq!(dir.partial_size("a"), 4);
        let mut partial = dir.open_partial("a").unwrap();
        partial.pending.keep_on_drop = true;
        assert_eq!(partial.length, 4);
        drop(partial);
        dir.write_partial_meta("a", b"{}").unwrap();
        dir.clean(["a"], Duration::ZERO).unwrap();
        dir.clean([], Duration::from_hours(1)).unwrap();
        assert_eq!((dir.partial_size("a"), dir.read_partial_meta("a")), (4, Some(b"{}".to_vec())));
        fs::write(folder.path().join(".handout-mirror.json"), "x").unwrap();
        dir.clean(["b"], Duration::ZERO).unwrap();
        assert_eq!(names(folder.path()), [".handout-mirror.json"]);
    }
}
