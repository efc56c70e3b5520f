//! The folder that files are mirrored into: opened once, and never left.
//!
//! Every name is one component, relative to the open folder, and no link is followed. What is not
//! whole has a hidden name that is made from the file's, so that a later run finds it.

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

/// How the name of a file that is not whole ends.
const PART: &str = ".part";

/// How the name ends of what is known about it.
const ABOUT: &str = ".part.json";

/// Age at which a partial file is removed although the file system cannot lock it.
const UNLOCKED_AGE: Duration = Duration::from_hours(24);

/// How often the place of a file that is not whole is tried when others rename it away.
const ATTEMPTS: usize = 8;

/// A file that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Local {
    /// In bytes.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl Local {
    /// When its content was last changed; `None` if that cannot be told.
    pub(crate) fn modified(&self) -> Option<SystemTime> {
        let (seconds, nanoseconds) = self.modified;
        let since = Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?);
        UNIX_EPOCH.checked_add(since)
    }
}

/// What is at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum There {
    /// Nothing.
    Nothing,
    /// A regular file.
    File(Local),
    /// Anything else: a folder, a link.
    Other,
}

/// An open folder.
#[derive(Debug)]
pub(crate) struct Place {
    folder: DirHandle,
    /// The hashes of the names of which an earlier run has left a part.
    left: HashSet<String>,
}

/// A partial file, locked against other processes where the file system has locks.
#[derive(Debug)]
pub(crate) struct Part {
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
    /// Upper and lower case are the same.
    pub ignores_case: bool,
    /// Dots and spaces at the end are not stored.
    pub ignores_end: bool,
}

impl Folding {
    /// Folds more than any file system does.
    pub(crate) const ALL: Self = Self { ignores_case: true, ignores_end: true };

    /// The text that names of one file have in common.
    pub(crate) fn fold(self, name: &str) -> String {
        let name = if self.ignores_end { name.trim_end_matches(['.', ' ']) } else { name };
        if self.ignores_case { name.to_uppercase().to_lowercase() } else { name.to_owned() }
    }
}

fn hash(name: &str) -> String {
    // Enough that no two of a folder are the same.
    to_hex(Sha256::digest(name.as_bytes()).first_chunk::<16>().expect("a digest of 32 bytes"))
}

fn hidden(name: &str, end: &str) -> PathBuf {
    format!("{PREFIX}{}{end}", hash(name)).into()
}

impl Place {
    /// Opens a folder that is there.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let folder = DirHandle::open(path)?;
        // A folder that may not be listed can be saved into.
        let left = parts(&folder).unwrap_or_default().into_iter().map(|(hash, _)| hash).collect();
        Ok(Self { folder, left })
    }

    /// What is at a name, which must be one component.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub(crate) fn look(&self, name: &str) -> io::Result<There> {
        let stat = match statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(There::Nothing),
            other => other?,
        };
        Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => There::File(local(&stat)),
            _ => There::Other,
        })
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// If there is none.
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

    /// Opens the partial file of `name`, with what an earlier transfer has left.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if another process has it, or if it cannot be opened.
    pub(crate) fn part(&self, name: &str) -> io::Result<Part> {
        let hidden = hidden(name, PART);
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
                return Ok(Part { pending, length: local(&opened).size, hidden, is_locked });
            }
            pending.keep_on_drop = true;
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Opens an empty partial file of `name`.
    ///
    /// # Errors
    /// As [`Place::part`].
    pub(crate) fn new_part(&self, name: &str) -> io::Result<Part> {
        let part = self.part(name)?;
        if part.length > 0 {
            self.drop_about(name);
        }
        if part.is_locked && (part.length == 0 || part.pending.file.set_len(0).is_ok()) {
            return Ok(Part { length: 0, ..part });
        }
        // Without a lock, another process may write to it: it is replaced by a file that no other
        // process has open.
        let Part { pending, hidden, .. } = part;
        drop(pending);
        let temp = hidden.clone().into_os_string();
        let pending = PendingFile::create_named(self.folder.clone(), temp, NEW_FILE)?;
        let is_locked = lock(&pending.file).is_ok();
        Ok(Part { pending, length: 0, hidden, is_locked })
    }

    /// Whether a hidden name is that of an open file.
    fn is_at(&self, hidden: &Path, file: &File) -> io::Result<bool> {
        let opened = fstat(file)?;
        match statat(&self.folder, hidden, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(now) => Ok((now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino)),
            Err(Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Publishes a complete file. The name itself is synced by [`Place::sync`].
    ///
    /// # Errors
    /// If it cannot be published; the partial file is removed then.
    pub(crate) fn finish(
        &self,
        mut part: Part,
        name: &str,
        modified: Option<SystemTime>,
        policy: OverwritePolicy,
    ) -> Result<Local, SaveError> {
        if !part.is_locked && !self.is_at(&part.hidden, &part.pending.file)? {
            // Another process has replaced it.
            part.pending.keep_on_drop = true;
            return Err(SaveError::Io(io::ErrorKind::WouldBlock.into()));
        }
        let stat = part.pending.publish(Path::new(name), policy, modified)?;
        Ok(local(&stat))
    }

    /// Removes a partial file and what is known about it.
    pub(crate) fn drop_part(&self, mut part: Part, name: &str) {
        part.pending.keep_on_drop = false;
        drop(part);
        self.drop_about(name);
    }

    /// Writes what is to be known about a file that is not whole, so that it can be resumed.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub(crate) fn write_about(&self, name: &str, about: &[u8]) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // It may tell of a URL that is a secret.
        let mode = Mode::RUSR | Mode::WUSR;
        let file = retry(|| openat(&self.folder, hidden(name, ABOUT), flags, mode))?;
        File::from(file).write_all(about).inspect_err(|_| self.drop_about(name))
    }

    /// What is known about a file that is not whole, if anything.
    pub(crate) fn about(&self, name: &str) -> Option<Vec<u8>> {
        self.read_small(&hidden(name, ABOUT), 64 << 10).ok()
    }

    /// Forgets what is known about a file that is not whole.
    pub(crate) fn drop_about(&self, name: &str) {
        self.folder.remove(&hidden(name, ABOUT));
    }

    /// Whether there was a part of a file when the folder was opened.
    pub(crate) fn has_left(&self, name: &str) -> bool {
        !self.left.is_empty() && self.left.contains(&hash(name))
    }

    /// How much there is of a file that is not whole, in bytes.
    pub(crate) fn part_size(&self, name: &str) -> u64 {
        let stat = statat(&self.folder, hidden(name, PART), AtFlags::SYMLINK_NOFOLLOW);
        stat.map_or(0, |stat| local(&stat).size)
    }

    /// Reads a file of at most `limit` bytes.
    ///
    /// # Errors
    /// If it is larger, or cannot be read.
    pub(crate) fn read_small(&self, name: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read(name)?.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::other("it is too large"));
        }
        Ok(bytes)
    }

    /// Writes a small private file whole.
    ///
    /// # Errors
    /// If it could not be written; the old one is intact then.
    pub(crate) fn write_small(&self, name: &str, bytes: &[u8]) -> Result<(), SaveError> {
        self.folder.write(name, Mode::RUSR | Mode::WUSR, bytes)
    }

    /// Removes a file; that there is none is no error.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub(crate) fn unlink(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns by which rule names that differ are one name here: ignored case, and ignored dots
    /// and spaces at the end, as on FAT.
    ///
    /// # Errors
    /// If no file can be created to find out.
    pub(crate) fn folding(&self) -> io::Result<Folding> {
        let probe = format!("{PREFIX}{}{PART}", hash("folding"));
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

    /// Removes what is left of files that were not whole, and of which nothing has come for so
    /// long, but for those of these names, and for what another process is at.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub(crate) fn clean<'a>(
        &self,
        keep: impl IntoIterator<Item = &'a str>,
        age: Duration,
    ) -> io::Result<()> {
        let keep: HashSet<String> = keep.into_iter().map(hash).collect();
        for (hash, name) in parts(&self.folder)? {
            if keep.contains(&hash) {
                continue;
            }
            let fresh = |part: &File, age| {
                let modified = part.metadata().and_then(|metadata| metadata.modified());
                // A time in the future is not long ago.
                modified.is_ok_and(|at| at.elapsed().unwrap_or_default() < age)
            };
            let part = self.read(format!("{PREFIX}{hash}{PART}"));
            let busy = |part: &File| match lock(part) {
                Ok(()) => false,
                Err(Errno::WOULDBLOCK) => true,
                Err(_) => fresh(part, UNLOCKED_AGE),
            };
            if !part.is_ok_and(|part| fresh(&part, age) || busy(&part)) {
                self.folder.remove(Path::new(&name));
            }
        }
        Ok(())
    }
}

/// What there is of files that are not whole: the hashes of their names, and the hidden names.
fn parts(folder: &DirHandle) -> io::Result<Vec<(String, String)>> {
    let mut parts = Vec::new();
    for entry in Dir::read_from(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let Some(rest) = name.strip_prefix(PREFIX) else { continue };
        if let Some(hash) = rest.strip_suffix(ABOUT).or_else(|| rest.strip_suffix(PART)) {
            parts.push((hash.to_owned(), name.to_owned()));
        }
    }
    Ok(parts)
}

fn lock(file: &File) -> Result<(), Errno> {
    retry(|| flock(file, FlockOperation::NonBlockingLockExclusive))
}

fn local(stat: &rustix::fs::Stat) -> Local {
    Local {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: (stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn place() -> (tempfile::TempDir, Place) {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::open(folder.path()).unwrap();
        (folder, place)
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_when_it_is_whole_with_its_time() {
        let (folder, place) = place();
        let mut part = place.part("a").unwrap();
        part.pending.file.write_all(b"alpha").unwrap();
        assert!(names(folder.path())[0].starts_with(".handout-"));
        let modified = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let local = place.finish(part, "a", Some(modified), OverwritePolicy::Refuse).unwrap();
        assert_eq!(names(folder.path()), ["a"]);
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"alpha");
        assert_eq!(local, Local { size: 5, modified: (1_000_000_000, 0) });
        assert_eq!(place.look("a").unwrap(), There::File(local));
        assert_eq!(local.modified(), Some(modified));
    }

    #[test]
    fn a_place_that_is_taken_is_taken_over_only_on_demand() {
        let (folder, place) = place();
        let path = folder.path().join("a");
        fs::write(&path, "old").unwrap();
        let part = || {
            let mut part = place.part("a").unwrap();
            part.pending.file.write_all(b"new").unwrap();
            part
        };
        let refused = place.finish(part(), "a", None, OverwritePolicy::Refuse);
        assert!(matches!(refused, Err(SaveError::Exists)));
        assert_eq!((fs::read(&path).unwrap(), names(folder.path()).len()), (b"old".to_vec(), 1));
        place.finish(part(), "a", None, OverwritePolicy::Replace).unwrap();
        assert_eq!((fs::read(&path).unwrap(), names(folder.path()).len()), (b"new".to_vec(), 1));
    }

    #[test]
    fn no_link_is_followed() {
        let (folder, place) = place();
        let outside = tempfile::tempdir().unwrap();
        let secret = outside.path().join("secret");
        fs::write(&secret, "secret").unwrap();
        symlink(&secret, folder.path().join("a")).unwrap();
        symlink(&secret, folder.path().join(hidden("a", PART))).unwrap();
        assert_eq!(place.look("a").unwrap(), There::Other);
        assert!(place.read("a").is_err());
        assert!(place.part("a").is_err());
        fs::remove_file(folder.path().join(hidden("a", PART))).unwrap();
        let mut part = place.part("a").unwrap();
        part.pending.file.write_all(b"new").unwrap();
        place.finish(part, "a", None, OverwritePolicy::Replace).unwrap();
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"new");
    }

    #[test]
    fn what_is_not_whole_is_one_s_own_and_found_again() {
        let (folder, place) = place();
        let mut part = place.part("a").unwrap();
        part.pending.file.write_all(b"half").unwrap();
        part.pending.keep_on_drop = true;
        let busy = Place::open(folder.path()).unwrap().part("a").unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        place.clean([], Duration::ZERO).unwrap();
        drop(part);
        let place = Place::open(folder.path()).unwrap();
        assert_eq!(place.part_size("a"), 4);
        let mut part = place.part("a").unwrap();
        part.pending.keep_on_drop = true;
        assert_eq!(part.length, 4);
        drop(part);
        place.write_about("a", b"{}").unwrap();
        place.clean(["a"], Duration::ZERO).unwrap();
        place.clean([], Duration::from_hours(1)).unwrap();
        assert_eq!((place.part_size("a"), place.about("a")), (4, Some(b"{}".to_vec())));
        fs::write(folder.path().join(".handout-mirror.json"), "x").unwrap();
        place.clean(["b"], Duration::ZERO).unwrap();
        assert_eq!(names(folder.path()), [".handout-mirror.json"]);
    }
}
