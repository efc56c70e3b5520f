//! The folder that files are mirrored into: opened once, and never left.
//!
//! Every name is one component, relative to the open folder, and no link is followed. What is not
//! whole has a hidden name that is made from the file's, so that a later run finds it.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, FlockOperation, Mode, OFlags, RenameFlags, Timespec, Timestamps,
    UTIME_OMIT, flock, fstat, fsync, futimens, linkat, openat, renameat, renameat_with, statat,
    unlinkat,
};
use rustix::io::Errno;
use sha2::{Digest, Sha256};

/// How hidden names of ours begin.
const PREFIX: &str = ".handout-";

/// How the name of a file that is not whole ends.
const PART: &str = ".part";

/// How the name ends of what is known about it.
const ABOUT: &str = ".part.json";

/// How often the place of a file that is not whole is tried when others rename it away.
const ATTEMPTS: usize = 8;

/// A file that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Local {
    /// In bytes.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
}

impl Local {
    /// When its content was last changed; `None` if that cannot be told.
    pub fn modified(&self) -> Option<SystemTime> {
        let (seconds, nanoseconds) = self.modified;
        let since = Duration::new(seconds.try_into().ok()?, nanoseconds.try_into().ok()?);
        UNIX_EPOCH.checked_add(since)
    }
}

/// What is at a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum There {
    /// Nothing.
    Nothing,
    /// A regular file.
    File(Local),
    /// Anything else: a folder, a link.
    Other,
}

/// An open folder.
#[derive(Debug)]
pub struct Place {
    folder: OwnedFd,
    /// The hashes of the names of which an earlier run has left a part.
    left: HashSet<String>,
}

/// A file that is not whole yet, which is ours alone.
#[derive(Debug)]
pub struct Part {
    /// At its beginning.
    pub file: File,
    /// How long it is, of an earlier transfer, in bytes.
    pub length: u64,
    /// Its hidden name.
    hidden: PathBuf,
}

/// Whether a file whose place is taken takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// The other stays.
    Never,
    /// It goes.
    Always,
}

fn hash(name: &str) -> String {
    // Enough that no two of a folder are the same.
    hex(Sha256::digest(name.as_bytes()).iter().take(16))
}

/// Bytes as hexadecimal digits.
pub fn hex<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> String {
    bytes.into_iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn hidden(name: &str, end: &str) -> PathBuf {
    format!("{PREFIX}{}{end}", hash(name)).into()
}

impl Place {
    /// Opens a folder that is there.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = openat(CWD, path, flags, Mode::empty())?;
        let left = parts(&folder)?.into_iter().map(|(hash, _)| hash).collect();
        Ok(Self { folder, left })
    }

    /// What is at a name, which must be one component.
    ///
    /// # Errors
    /// If it cannot be looked at.
    pub fn look(&self, name: &str) -> io::Result<There> {
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
    pub fn read(&self, name: impl AsRef<Path>) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(openat(&self.folder, name.as_ref(), flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::other("not a regular file"))
        }
    }

    /// Opens the file that is to become `name` and is not whole, for us alone. What was there
    /// already is kept.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if another process is at it, or whatever the disk says.
    pub fn part(&self, name: &str) -> io::Result<Part> {
        let hidden = hidden(name, PART);
        for _ in 0..ATTEMPTS {
            let flags = OFlags::RDWR
                | OFlags::CREATE
                | OFlags::NOFOLLOW
                | OFlags::NONBLOCK
                | OFlags::CLOEXEC;
            // As any program creates files: less what the umask takes away.
            let file = openat(&self.folder, &hidden, flags, Mode::from_raw_mode(0o666))?;
            flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            // Another process may have finished it since, and what is open has its name by now.
            let opened = fstat(&file)?;
            match statat(&self.folder, &hidden, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(now) if (now.st_dev, now.st_ino) == (opened.st_dev, opened.st_ino) => {
                    if FileType::from_raw_mode(opened.st_mode) != FileType::RegularFile {
                        return Err(io::Error::other("not a regular file"));
                    }
                    return Ok(Part { file: file.into(), length: local(&opened).size, hidden });
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Gives a file that is whole its name, after forcing it to the disk. The name itself is on the
    /// disk after [`Place::sync`].
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if the place is taken and stays so, or whatever the disk
    /// says; then the part is gone.
    pub fn finish(
        &self,
        part: &Part,
        name: &str,
        modified: Option<SystemTime>,
        replace: Replace,
    ) -> io::Result<Local> {
        let finish = || {
            if let Some(modified) = modified.and_then(timespec) {
                let omit = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
                futimens(
                    &part.file,
                    &Timestamps { last_access: omit, last_modification: modified },
                )?;
            }
            fsync(&part.file)?;
            match replace {
                Replace::Always => renameat(&self.folder, &part.hidden, &self.folder, name)?,
                Replace::Never => self.rename_to_free(&part.hidden, name)?,
            }
            Ok(local(&fstat(&part.file)?))
        };
        finish().inspect_err(|_| self.remove(&part.hidden))
    }

    fn rename_to_free(&self, hidden: &Path, name: &str) -> Result<(), Errno> {
        let folder = &self.folder;
        match renameat_with(folder, hidden, folder, name, RenameFlags::NOREPLACE) {
            // Not every file system has it.
            Err(Errno::INVAL | Errno::NOSYS) => {
                linkat(folder, hidden, folder, name, AtFlags::empty())?;
                unlinkat(folder, hidden, AtFlags::empty())
            }
            renamed => renamed,
        }
    }

    /// Removes what is not whole, and what is known about it.
    pub fn drop_part(&self, part: &Part, name: &str) {
        self.remove(&part.hidden);
        self.drop_about(name);
    }

    /// Writes what is to be known about a file that is not whole, so that it can be resumed.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn write_about(&self, name: &str, about: &[u8]) -> io::Result<()> {
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // It may tell of a URL that is a secret.
        let mode = Mode::RUSR | Mode::WUSR;
        let file = openat(&self.folder, hidden(name, ABOUT), flags, mode)?;
        File::from(file).write_all(about)
    }

    /// What is known about a file that is not whole, if anything.
    pub fn about(&self, name: &str) -> Option<Vec<u8>> {
        self.read_small(&hidden(name, ABOUT), 64 << 10).ok()
    }

    /// Forgets what is known about a file that is not whole.
    pub fn drop_about(&self, name: &str) {
        self.remove(&hidden(name, ABOUT));
    }

    /// Whether there was a part of a file when the folder was opened.
    pub fn has_left(&self, name: &str) -> bool {
        !self.left.is_empty() && self.left.contains(&hash(name))
    }

    /// How much there is of a file that is not whole, in bytes.
    pub fn part_size(&self, name: &str) -> u64 {
        let stat = statat(&self.folder, hidden(name, PART), AtFlags::SYMLINK_NOFOLLOW);
        stat.map_or(0, |stat| local(&stat).size)
    }

    /// Reads a file of at most `limit` bytes.
    ///
    /// # Errors
    /// If it is larger, or cannot be read.
    pub fn read_small(&self, name: &Path, limit: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read(name)?.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::other("it is too large"));
        }
        Ok(bytes)
    }

    /// Writes a small hidden file of ours, whole or not at all.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn write_small(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        let new = format!("{name}.new");
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        // Whatever somebody has put there.
        self.remove(Path::new(&new));
        let mut file = File::from(openat(&self.folder, &new, flags, mode)?);
        file.write_all(bytes)?;
        fsync(&file)?;
        Ok(renameat(&self.folder, &new, &self.folder, name)?)
    }

    /// Removes a file; that there is none is no error.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn unlink(&self, name: &str) -> io::Result<()> {
        match unlinkat(&self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn remove(&self, name: &Path) {
        // What cannot be removed is overwritten the next time.
        let _ = unlinkat(&self.folder, name, AtFlags::empty());
    }

    /// Forces the names to the disk.
    ///
    /// # Errors
    /// Whatever the disk says.
    pub fn sync(&self) -> io::Result<()> {
        Ok(fsync(&self.folder)?)
    }

    /// Removes what is left of files that were not whole, and of which nothing has come for so
    /// long, but for those of these names, and for what another process is at.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn clean<'a>(
        &self,
        keep: impl IntoIterator<Item = &'a str>,
        age: Duration,
    ) -> io::Result<()> {
        let keep: HashSet<String> = keep.into_iter().map(hash).collect();
        for (hash, name) in parts(&self.folder)? {
            if keep.contains(&hash) {
                continue;
            }
            let busy = |part: &File| flock(part, FlockOperation::NonBlockingLockExclusive).is_err();
            let fresh = |part: &File| {
                let modified = part.metadata().and_then(|metadata| metadata.modified());
                // A time in the future is not long ago.
                modified.is_ok_and(|at| at.elapsed().unwrap_or_default() < age)
            };
            let part = self.read(format!("{PREFIX}{hash}{PART}"));
            if !part.is_ok_and(|part| fresh(&part) || busy(&part)) {
                self.remove(Path::new(&name));
            }
        }
        Ok(())
    }
}

/// What there is of files that are not whole: the hashes of their names, and the hidden names.
fn parts(folder: &OwnedFd) -> io::Result<Vec<(String, String)>> {
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

fn local(stat: &rustix::fs::Stat) -> Local {
    Local {
        size: u64::try_from(stat.st_size).unwrap_or(0),
        modified: (stat.st_mtime, stat.st_mtime_nsec.cast_signed()),
    }
}

fn timespec(time: SystemTime) -> Option<Timespec> {
    let since = time.duration_since(UNIX_EPOCH).ok()?;
    Some(Timespec {
        tv_sec: since.as_secs().try_into().ok()?,
        tv_nsec: since.subsec_nanos().into(),
    })
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
        part.file.write_all(b"alpha").unwrap();
        assert!(names(folder.path())[0].starts_with(".handout-"));
        let modified = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let local = place.finish(&part, "a", Some(modified), Replace::Never).unwrap();
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
            part.file.write_all(b"new").unwrap();
            part
        };
        let refused = place.finish(&part(), "a", None, Replace::Never).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!((fs::read(&path).unwrap(), names(folder.path()).len()), (b"old".to_vec(), 1));
        place.finish(&part(), "a", None, Replace::Always).unwrap();
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
        part.file.write_all(b"new").unwrap();
        place.finish(&part, "a", None, Replace::Always).unwrap();
        assert_eq!(fs::read(&secret).unwrap(), b"secret");
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"new");
    }

    #[test]
    fn what_is_not_whole_is_one_s_own_and_found_again() {
        let (folder, place) = place();
        let mut part = place.part("a").unwrap();
        part.file.write_all(b"half").unwrap();
        let busy = Place::open(folder.path()).unwrap().part("a").unwrap_err();
        assert_eq!(busy.kind(), io::ErrorKind::WouldBlock);
        place.clean([], Duration::ZERO).unwrap();
        drop(part);
        let place = Place::open(folder.path()).unwrap();
        assert_eq!(place.part_size("a"), 4);
        assert_eq!(place.part("a").unwrap().length, 4);
        place.write_about("a", b"{}").unwrap();
        place.clean(["a"], Duration::ZERO).unwrap();
        place.clean([], Duration::from_hours(1)).unwrap();
        assert_eq!((place.part_size("a"), place.about("a")), (4, Some(b"{}".to_vec())));
        fs::write(folder.path().join(".handout-mirror.json"), "x").unwrap();
        place.clean(["b"], Duration::ZERO).unwrap();
        assert_eq!(names(folder.path()), [".handout-mirror.json"]);
    }
}
