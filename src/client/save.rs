//! A file that appears only when it is whole, and takes no other's place unasked.
//!
//! It grows without a name on the disk of its place, is forced to it, and only then gets its name.
//! Dropped before that, for whatever reason, it leaves nothing behind; nor does a process that is
//! killed, but between the two calls that put it in the place of another. Where the system has no
//! files without names, it has a hidden one beside its place.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use tempfile::{NamedTempFile, TempPath};

/// Where the system lets a process name what it has open.
const OPEN_FILES: &str = "/proc/self/fd";

/// A file that is not whole yet.
#[derive(Debug)]
pub struct Growing {
    file: File,
    /// Its hidden name, if it cannot be without one.
    hidden: Option<TempPath>,
}

/// What becomes of a file whose place is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// It stays.
    Never,
    /// It is replaced.
    Always,
}

impl Growing {
    /// Begins a file that will appear in `folder`.
    ///
    /// # Errors
    /// If nothing can be written there.
    pub fn begin(folder: &Path) -> io::Result<Self> {
        // As any program creates files: less what the umask takes away.
        let mode = 0o666;
        if Path::new(OPEN_FILES).is_dir() {
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            if let Ok(file) = open(folder, flags, Mode::from_raw_mode(mode)) {
                return Ok(Self { file: file.into(), hidden: None });
            }
        }
        // If nothing can be written there, this says so.
        let named =
            hidden_names().permissions(fs::Permissions::from_mode(mode)).tempfile_in(folder)?;
        let (file, hidden) = named.into_parts();
        Ok(Self { file, hidden: Some(hidden) })
    }

    /// Appends to it.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)
    }

    /// Gives it its name, which must be in the folder that it was begun in.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if the place is taken and must stay so, or whatever the
    /// disk says.
    pub fn finish(self, place: &Path, replace: Replace) -> io::Result<()> {
        self.file.sync_all()?;
        let folder = folder_of(place);
        match (self.hidden, replace) {
            (Some(hidden), Replace::Never) => hidden.persist_noclobber(place)?,
            (Some(hidden), Replace::Always) => hidden.persist(place)?,
            (None, Replace::Never) => name(&self.file, place)?,
            // A name cannot be taken over before there is another.
            (None, Replace::Always) => {
                let named: NamedTempFile<()> =
                    hidden_names().make_in(&folder, |path| name(&self.file, path))?;
                named.into_temp_path().persist(place)?;
            }
        }
        // The name is on the disk when its folder is.
        File::open(folder)?.sync_all()
    }
}

/// How hidden names of ours are made.
fn hidden_names() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".handout-");
    builder
}

/// Gives an open file without a name one that is free.
fn name(file: &File, path: &Path) -> io::Result<()> {
    let open = format!("{OPEN_FILES}/{}", file.as_raw_fd());
    Ok(linkat(CWD, open, CWD, path, AtFlags::SYMLINK_FOLLOW)?)
}

/// A folder for a file that is to be saved; what was created of it goes again unless it is kept.
#[derive(Debug)]
pub struct NewFolder {
    path: PathBuf,
    /// What did not exist before, the innermost first.
    created: Vec<PathBuf>,
}

impl NewFolder {
    /// One that must be there already.
    pub fn existing(path: &Path) -> Self {
        Self { path: path.to_owned(), created: Vec::new() }
    }

    /// Creates what does not exist of it.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        let missing = |folder: &&Path| *folder != Path::new("") && !folder.exists();
        let created = path.ancestors().take_while(missing).map(Path::to_owned).collect();
        let folder = Self { path: path.to_owned(), created };
        fs::create_dir_all(path)?;
        Ok(folder)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// There is a file in it now.
    pub fn keep(mut self) {
        self.created.clear();
    }
}

impl Drop for NewFolder {
    fn drop(&mut self) {
        for folder in &self.created {
            // One that somebody uses meanwhile is not empty, and stays.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// The folder that a path is in.
pub fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_appears_when_it_is_whole() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a");
        let mut growing = Growing::begin(folder.path()).unwrap();
        growing.append(b"al").unwrap();
        growing.append(b"pha").unwrap();
        assert!(!place.exists());
        growing.finish(&place, Replace::Never).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"alpha");
        assert_eq!(names(folder.path()), ["a"]);
        let mode = fs::metadata(&place).unwrap().permissions().mode();
        assert_eq!(mode & 0o600, 0o600);
    }

    #[test]
    fn what_is_dropped_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        Growing::begin(folder.path()).unwrap().append(b"half").unwrap();
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn a_process_that_is_killed_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let mut growing = Growing::begin(folder.path()).unwrap();
        growing.append(b"half").unwrap();
        // As nothing is dropped then.
        std::mem::forget(growing);
        assert!(names(folder.path()).is_empty());
    }

    #[test]
    fn where_every_file_has_a_name_it_is_a_hidden_one() {
        let folder = tempfile::tempdir().unwrap();
        let named = || {
            let named = hidden_names().tempfile_in(folder.path()).unwrap();
            let (file, hidden) = named.into_parts();
            let mut growing = Growing { file, hidden: Some(hidden) };
            growing.append(b"alpha").unwrap();
            growing
        };
        let place = folder.path().join("a");
        named().finish(&place, Replace::Never).unwrap();
        assert!(named().finish(&place, Replace::Never).is_err());
        named().finish(&place, Replace::Always).unwrap();
        assert_eq!(names(folder.path()), ["a"]);
    }

    #[test]
    fn a_new_folder_goes_again_unless_it_is_kept_or_used() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        drop(NewFolder::create(&deep).unwrap());
        assert!(names(folder.path()).is_empty());
        NewFolder::create(&deep).unwrap().keep();
        assert!(deep.exists());
        let deeper = NewFolder::create(&deep.join("d")).unwrap();
        fs::write(deep.join("d/file"), "x").unwrap();
        drop(deeper);
        assert!(deep.join("d/file").exists());
    }

    #[test]
    fn a_place_that_is_taken_is_taken_over_only_on_demand() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("a");
        fs::write(&place, "old").unwrap();
        let growing = || {
            let mut growing = Growing::begin(folder.path()).unwrap();
            growing.append(b"new").unwrap();
            growing
        };
        let refused = growing().finish(&place, Replace::Never).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&place).unwrap(), b"old");
        growing().finish(&place, Replace::Always).unwrap();
        assert_eq!(fs::read(&place).unwrap(), b"new");
        assert_eq!(names(folder.path()), ["a"]);
    }
}
