//! A file that appears only when it is whole, and takes no other's place unasked.
//!
//! It grows under a hidden name beside its place, is forced to the disk, and only then gets its
//! name. Dropped before that, for whatever reason, it leaves nothing behind.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

/// A file that is not whole yet.
#[derive(Debug)]
pub struct Growing {
    file: NamedTempFile,
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
        let file = tempfile::Builder::new()
            .prefix(".handout-")
            // As any program creates files: less what the umask takes away.
            .permissions(fs::Permissions::from_mode(0o666))
            .tempfile_in(folder)?;
        Ok(Self { file })
    }

    /// Appends to it.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.as_file_mut().write_all(bytes)
    }

    /// Gives it its name, which must be in the folder that it was begun in.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if the place is taken and must stay so, or whatever the
    /// disk says.
    pub fn finish(self, place: &Path, replace: Replace) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        match replace {
            Replace::Never => drop(self.file.persist_noclobber(place)?),
            Replace::Always => drop(self.file.persist(place)?),
        }
        // The name is on the disk when its folder is.
        fs::File::open(folder_of(place))?.sync_all()
    }
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
