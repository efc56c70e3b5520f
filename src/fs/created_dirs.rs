//! Folders created for files that may never be saved.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A folder to save into. Dropping it removes the folders that it created and that are still
/// empty.
#[derive(Debug)]
pub(crate) struct CreatedDirs {
    path: PathBuf,
    /// Created folders, the innermost first.
    created: Vec<PathBuf>,
}

impl CreatedDirs {
    /// A folder that exists already.
    pub(crate) fn existing(path: &Path) -> Self {
        Self { path: path.to_owned(), created: Vec::new() }
    }

    /// Creates the folder with its parents.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let missing = |folder: &&Path| *folder != Path::new("") && !folder.exists();
        let created = path.ancestors().take_while(missing).map(Path::to_owned).collect();
        let folder = Self { path: path.to_owned(), created };
        match fs::create_dir_all(path) {
            Err(_) if path.exists() && !path.is_dir() => Err(io::ErrorKind::NotADirectory.into()),
            created => created.map(|()| folder),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps the folders, because a file was saved in them.
    pub(crate) fn keep(mut self) {
        self.created.clear();
    }
}

impl Drop for CreatedDirs {
    fn drop(&mut self) {
        for folder in &self.created {
            // Fails if the folder is not empty.
            let _ = fs::remove_dir(folder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn removes_created_folders_unless_they_are_kept_or_used() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("a/b/c");
        drop(CreatedDirs::create(&deep).unwrap());
        assert!(!folder.path().join("a").exists());
        CreatedDirs::create(&deep).unwrap().keep();
        assert!(deep.exists());
        let deeper = CreatedDirs::create(&deep.join("d")).unwrap();
        fs::write(deep.join("d/file"), "x").unwrap();
        drop(deeper);
        assert!(deep.join("d/file").exists());
    }
}
