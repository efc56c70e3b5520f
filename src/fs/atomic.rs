//! Writes files atomically: a file appears under its name complete and synced, or not at all.
//!
//! A call that only strengthens a guarantee (file times, locks, the sync of a folder) may fail and
//! is logged once at `debug`. A call that a guarantee needs has an equivalent for file systems
//! without it: an unnamed file becomes one with a hidden name; `RENAME_NOREPLACE` becomes a link,
//! or a check and a rename. An error after the file is in place is not a failure.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
    fstat, fsync, futimens, linkat, openat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

/// Prefix of hidden names that handout creates.
pub(crate) const HIDDEN_PREFIX: &str = ".handout-";

/// Mode of new files; the umask applies, as for any program.
pub(crate) const NEW_FILE: Mode = Mode::from_raw_mode(0o666);

/// Open files as paths, to link an unnamed file.
const OPEN_FILES: &str = "/proc/self/fd";

/// Attempts to find a hidden name that is free, or to repeat an interrupted call.
const ATTEMPTS: u32 = 16;

/// The treatment of an existing file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverwritePolicy {
    /// Keeps the file and fails.
    Refuse,
    Replace,
    /// Replaces the file if its content differs.
    Update,
}

impl OverwritePolicy {
    /// Returns the policy for the options `--force` and `--update`.
    pub fn from_flags(force: bool, update: bool) -> Self {
        match (update, force) {
            (true, _) => Self::Update,
            (false, true) => Self::Replace,
            (false, false) => Self::Refuse,
        }
    }

    fn may_replace(self) -> bool {
        self != Self::Refuse
    }
}

/// The reason why a file was not saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SaveError {
    #[error("a file of this name exists")]
    Exists,
    #[error("a device, FIFO or socket has this name and is never replaced")]
    SpecialFile,
    #[error("the file system does not accept this name: {0}")]
    NameRejected(io::Error),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for SaveError {
    fn from(error: Errno) -> Self {
        match error {
            Errno::INVAL | Errno::ILSEQ | Errno::NAMETOOLONG => Self::NameRejected(error.into()),
            error => Self::Io(error.into()),
        }
    }
}

/// An open folder. All names are relative to it.
#[derive(Debug, Clone)]
pub(crate) struct DirHandle(Arc<OwnedFd>);

impl DirHandle {
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let open = |access| {
            let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC;
            retry(|| openat(CWD, path, flags, Mode::empty()))
        };
        // Files can be created in a folder that may not be listed.
        let folder = match open(OFlags::RDONLY) {
            Err(Errno::ACCESS) => open(OFlags::PATH),
            opened => opened,
        };
        Ok(Self(Arc::new(folder?)))
    }

    /// Syncs the names in the folder, if the file system can.
    pub(crate) fn sync(&self) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let synced = match fsync(self) {
            // The folder was opened with `O_PATH`.
            Err(Errno::BADF) => {
                openat(self, ".", flags, Mode::empty()).and_then(|folder| fsync(&folder))
            }
            synced => synced,
        };
        log_unsupported("fsync of a folder", synced);
    }

    /// Writes a small file whole, replacing another. A temporary file of a killed process is
    /// reused by the next call. The old file is intact if this fails.
    pub(crate) fn write(&self, name: &str, mode: Mode, bytes: &[u8]) -> Result<(), SaveError> {
        let temp = OsString::from(format!("{name}.new"));
        self.remove(Path::new(&temp));
        let mut pending = PendingFile::create_named(self.clone(), temp, mode)?;
        pending.file.write_all(bytes)?;
        pending.publish(Path::new(name), OverwritePolicy::Replace, None)?;
        self.sync();
        Ok(())
    }

    /// Removes a temporary file, if it exists.
    pub(crate) fn remove(&self, name: &Path) {
        match unlinkat(self, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            removed => log_unsupported("removing a temporary file", removed),
        }
    }

    /// Fails if `name` is taken and may not be replaced.
    fn check_target(&self, name: &Path, policy: OverwritePolicy) -> Result<(), SaveError> {
        let kind =
            |flags| statat(self, name, flags).map(|stat| FileType::from_raw_mode(stat.st_mode));
        let target = match kind(AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => return Ok(()),
            // A link to a device is treated like the device; other links are replaced.
            Ok(FileType::Symlink) => kind(AtFlags::empty()).unwrap_or(FileType::Symlink),
            target => target?,
        };
        match target {
            target if is_special(target) => Err(SaveError::SpecialFile),
            _ if policy.may_replace() => Ok(()),
            _ => Err(SaveError::Exists),
        }
    }
}

impl AsFd for DirHandle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

pub(crate) fn is_special(kind: FileType) -> bool {
    use FileType::{BlockDevice, CharacterDevice, Fifo, Socket};
    matches!(kind, BlockDevice | CharacterDevice | Fifo | Socket)
}

/// A file that has no name yet, or only a hidden one. Dropping it removes it unless
/// [`keep_on_drop`](Self::keep_on_drop) is set.
#[derive(Debug)]
pub(crate) struct PendingFile {
    /// The data, for reading and writing.
    pub file: File,
    /// Leaves the file under its hidden name, to be resumed.
    pub keep_on_drop: bool,
    dir: DirHandle,
    /// `None` for a file without a name, and after the file was published.
    temp: Option<OsString>,
    mode: Mode,
}

impl PendingFile {
    /// Creates an unnamed file for `dir`, so that nothing remains if the process is killed; a
    /// hidden one where the file system has no unnamed files.
    pub(crate) fn create(dir: DirHandle, mode: Mode) -> io::Result<Self> {
        if Path::new(OPEN_FILES).is_dir() {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            match retry(|| openat(&dir, ".", flags, mode)) {
                Ok(file) => return Ok(Self::from_open(dir, file.into(), None, mode)),
                Err(error) => log_unsupported("O_TMPFILE", Err(error)),
            }
        }
        let mut created = Err(io::ErrorKind::AlreadyExists.into());
        for attempt in 0..ATTEMPTS {
            created = Self::create_named(dir.clone(), hidden_name(attempt), mode);
            if !matches!(&created, Err(error) if error.kind() == io::ErrorKind::AlreadyExists) {
                break;
            }
        }
        created
    }

    /// Creates a file with the hidden name `temp`, which must not exist.
    pub(crate) fn create_named(dir: DirHandle, temp: OsString, mode: Mode) -> io::Result<Self> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = retry(|| openat(&dir, &temp, flags, mode))?;
        Ok(Self::from_open(dir, file.into(), Some(temp), mode))
    }

    /// Takes over an open file and its hidden name.
    pub(crate) fn from_open(
        dir: DirHandle,
        file: File,
        temp: Option<OsString>,
        mode: Mode,
    ) -> Self {
        Self { file, keep_on_drop: false, dir, temp, mode }
    }

    /// Syncs the file and gives it the name `name` in its folder, with its times if
    /// `modified` is given. Call [`DirHandle::sync`] afterwards. If this fails, the pending file is
    /// removed and an existing file is intact.
    pub(crate) fn publish(
        mut self,
        name: &Path,
        policy: OverwritePolicy,
        modified: Option<SystemTime>,
    ) -> Result<Stat, SaveError> {
        self.keep_on_drop = false;
        if let Some(modified) = modified.and_then(timespec) {
            let omitted = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
            let times = Timestamps { last_access: omitted, last_modification: modified };
            log_unsupported("setting the time of a file", futimens(&self.file, &times));
        }
        sync_data(&self.file)?;
        let stat = fstat(&self.file).map_err(io::Error::from)?;
        self.dir.check_target(name, policy)?;
        if self.temp.is_none() {
            if !policy.may_replace() {
                match link_open_file(&self.file, &self.dir, name) {
                    Ok(()) => return Ok(stat),
                    Err(Errno::EXIST) => return Err(SaveError::Exists),
                    Err(error) => log_unsupported("linkat of an unnamed file", Err(error)),
                }
            }
            self.name_temporarily()?;
        }
        self.rename(name, policy)?;
        self.temp = None;
        Ok(stat)
    }

    /// Gives an unnamed file a hidden name. Where it cannot be linked, its content is copied.
    fn name_temporarily(&mut self) -> io::Result<()> {
        for attempt in 0..ATTEMPTS {
            let temp = hidden_name(attempt);
            match link_open_file(&self.file, &self.dir, Path::new(&temp)) {
                Ok(()) => {
                    self.temp = Some(temp);
                    return Ok(());
                }
                Err(Errno::EXIST) => {}
                Err(_) => {
                    let mut copy = Self::create_named(self.dir.clone(), temp, self.mode)?;
                    self.file.rewind()?;
                    io::copy(&mut self.file, &mut copy.file)?;
                    sync_data(&copy.file)?;
                    *self = copy;
                    return Ok(());
                }
            }
        }
        Err(io::ErrorKind::AlreadyExists.into())
    }

    fn rename(&self, name: &Path, policy: OverwritePolicy) -> Result<(), SaveError> {
        let (dir, Some(temp)) = (&self.dir, &self.temp) else { return Ok(()) };
        let rename = || match renameat(dir, temp, dir, name) {
            // exFAT reports this for a name with a character that it cannot store.
            Err(error @ Errno::NOENT) if statat(dir, temp, AtFlags::SYMLINK_NOFOLLOW).is_ok() => {
                Err(SaveError::NameRejected(error.into()))
            }
            renamed => Ok(renamed?),
        };
        if policy.may_replace() {
            return rename();
        }
        match renameat_with(dir, temp, dir, name, RenameFlags::NOREPLACE) {
            Ok(()) => return Ok(()),
            Err(Errno::EXIST) => return Err(SaveError::Exists),
            Err(error) => log_unsupported("RENAME_NOREPLACE", Err(error)),
        }
        match linkat(dir, temp, dir, name, AtFlags::empty()) {
            Ok(()) => {
                dir.remove(Path::new(temp));
                return Ok(());
            }
            Err(Errno::EXIST) => return Err(SaveError::Exists),
            Err(error) => log_unsupported("linkat", Err(error)),
        }
        dir.check_target(name, policy)?;
        rename()
    }
}

impl Drop for PendingFile {
    fn drop(&mut self) {
        if let (Some(temp), false) = (&self.temp, self.keep_on_drop) {
            self.dir.remove(Path::new(temp));
        }
    }
}

/// Syncs the data of a file. File systems and devices without this call are no error.
pub(crate) fn sync_data(file: &File) -> io::Result<()> {
    match retry(|| fsync(file)) {
        Err(error @ (Errno::INVAL | Errno::ROFS | Errno::NOSYS | Errno::OPNOTSUPP)) => {
            log_unsupported("fsync", Err(error));
            Ok(())
        }
        synced => Ok(synced?),
    }
}

/// Logs at `debug`, once for each call and error, that an optional call failed.
pub(crate) fn log_unsupported(call: &'static str, result: Result<(), Errno>) {
    static LOGGED: Mutex<BTreeSet<(&str, i32)>> = Mutex::new(BTreeSet::new());
    let Err(error) = result else { return };
    if LOGGED.lock().insert((call, error.raw_os_error())) {
        tracing::debug!("{call} failed: {error}: continuing without it");
    }
}

/// Repeats a call that a signal interrupted, which network and FUSE file systems report.
pub(crate) fn retry<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let mut result = call();
    for _ in 1..ATTEMPTS {
        match result {
            Err(Errno::INTR) => result = call(),
            result => return result,
        }
    }
    result
}

fn link_open_file(file: &File, dir: &DirHandle, name: &Path) -> Result<(), Errno> {
    let open = format!("{OPEN_FILES}/{}", file.as_raw_fd());
    linkat(CWD, open, dir, name, AtFlags::SYMLINK_FOLLOW)
}

fn hidden_name(attempt: u32) -> OsString {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    format!("{HIDDEN_PREFIX}{:x}-{now:x}-{attempt}", std::process::id()).into()
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
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A pending file of each kind with the content `new`.
    fn pending(folder: &Path) -> [PendingFile; 2] {
        let dir = || DirHandle::open(folder).unwrap();
        let named = PendingFile::create_named(dir(), ".handout-temp".into(), NEW_FILE);
        [PendingFile::create(dir(), NEW_FILE), named].map(|pending| {
            let mut pending = pending.unwrap();
            pending.file.write_all(b"new").unwrap();
            pending
        })
    }

    fn publish(pending: PendingFile, policy: OverwritePolicy) -> Result<Stat, SaveError> {
        pending.publish(Path::new("a"), policy, None)
    }

    #[test]
    fn publishes_complete_files_only() {
        for kind in [0, 1] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a");
            let pending = pending(folder.path()).into_iter().nth(kind).unwrap();
            assert!(!path.exists());
            publish(pending, OverwritePolicy::Refuse).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
            assert_eq!(names(folder.path()), ["a"]);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o600, 0o600);
        }
    }

    #[test]
    fn removes_files_that_are_not_published() {
        let folder = tempfile::tempdir().unwrap();
        drop(pending(folder.path()));
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn leaves_nothing_behind_when_the_process_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let [unnamed, _] = pending(folder.path());
        // A killed process drops nothing.
        std::mem::forget(unnamed);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn replaces_files_only_if_the_policy_permits_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        fs::write(&path, "old").unwrap();
        for pending in pending(folder.path()) {
            let refused = publish(pending, OverwritePolicy::Refuse);
            assert!(matches!(refused, Err(SaveError::Exists)));
            assert_eq!(fs::read(&path).unwrap(), b"old");
        }
        assert_eq!(names(folder.path()), ["a"]);
        for pending in pending(folder.path()) {
            fs::write(&path, "old").unwrap();
            publish(pending, OverwritePolicy::Replace).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"new");
        }
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn never_replaces_devices_fifos_and_sockets_or_links_to_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let fifo = folder.path().join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, NEW_FILE, 0).unwrap();
        let targets: [&dyn Fn(); 4] = [
            &|| symlink("/dev/null", &path).unwrap(),
            &|| symlink(&fifo, &path).unwrap(),
            &|| rustix::fs::mknodat(CWD, &path, FileType::Fifo, NEW_FILE, 0).unwrap(),
            &|| drop(UnixListener::bind(&path).unwrap()),
        ];
        for create in targets {
            create();
            let before = fs::symlink_metadata(&path).unwrap().file_type();
            for policy in
                [OverwritePolicy::Refuse, OverwritePolicy::Replace, OverwritePolicy::Update]
            {
                for pending in pending(folder.path()) {
                    assert!(matches!(publish(pending, policy), Err(SaveError::SpecialFile)));
                }
            }
            assert_eq!(fs::symlink_metadata(&path).unwrap().file_type(), before);
            fs::remove_file(&path).unwrap();
        }
        assert_eq!(names(folder.path()), ["fifo"]);
    }

    #[test]
    fn saves_into_folders_that_may_not_be_listed() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o300)).unwrap();
        let path_only = openat(CWD, folder.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        let dir = DirHandle(Arc::new(path_only.unwrap()));
        dir.write("a", NEW_FILE, b"whole").unwrap();
        assert_eq!(fs::read(folder.path().join("a")).unwrap(), b"whole");
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(names(folder.path()), ["a"]);
    }
}
