//! Folders whose files are opened and listed by name. No name leads out of its folder.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, openat, statat};
use rustix::io::Errno;

use crate::fs::beneath;
use crate::fs::file::{NON_BLOCKING, OpenFile, timestamp};

/// Maximum length of a name with its subfolders, in bytes.
pub const MAX_NAME: usize = 4096;

/// Maximum number of unreadable entries that a listing names.
const MAX_UNREADABLE: usize = 100;

/// A folder, opened anew for every request, so that a folder that replaces it is noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
}

/// A file in a folder.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    /// Path below the folder, with `/` between subfolders.
    pub(crate) name: String,
    /// Size of the content, in bytes.
    pub(crate) size: u64,
    /// Time of the last change, in whole seconds.
    pub(crate) modified: Timestamp,
}

/// The files of a folder.
#[derive(Debug, Default)]
pub(crate) struct Listing {
    /// The files that can be requested, sorted by name.
    pub(crate) entries: Vec<Entry>,
    /// Number of omitted entries by reason.
    pub(crate) omitted: BTreeMap<Omission, u64>,
    /// Unreadable entries with their cause, at most [`MAX_UNREADABLE`].
    pub(crate) unreadable: Vec<(String, io::Error)>,
}

/// The reason why an entry is not listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Omission {
    Hidden,
    NotUtf8,
    /// The name is too long or cannot be sent as a line.
    Unsendable,
    NotRegular,
    /// A link to nothing or out of the folder.
    BrokenLink,
    Unreadable,
}

impl Omission {
    /// Returns the reason as text that follows a count.
    pub(crate) fn reason(self) -> &'static str {
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
    fn omit(&mut self, reason: Omission) {
        *self.omitted.entry(reason).or_default() += 1;
    }

    fn omit_unreadable(&mut self, name: String, error: io::Error) {
        self.omit(Omission::Unreadable);
        if self.unreadable.len() < MAX_UNREADABLE {
            self.unreadable.push((name, error));
        }
    }

    /// Adds a regular file or a link to one.
    fn add(&mut self, root: &OwnedFd, name: String) -> io::Result<()> {
        match open_beneath(root, &name, OFlags::PATH) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.omit(Omission::BrokenLink);
            }
            Err(error) => self.omit_unreadable(name, error),
            Ok(found) => {
                let metadata = fs::File::from(found).metadata()?;
                if metadata.is_file() {
                    let (size, modified) = (metadata.size(), timestamp(metadata.mtime()));
                    self.entries.push(Entry { name, size, modified });
                } else {
                    self.omit(Omission::NotRegular);
                }
            }
        }
        Ok(())
    }
}

impl Folder {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a folder that can be read.
    pub fn open(path: &Path) -> io::Result<Self> {
        let folder = Self::expected(path);
        folder.check().map(|()| folder)
    }

    /// Returns a folder that need not exist yet.
    pub(crate) fn expected(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }

    /// Fails if the folder cannot be read.
    pub(crate) fn check(&self) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        Ok(beneath::open(&self.root()?, Path::new("."), flags).map(drop)?)
    }

    fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(openat(CWD, &self.path, flags, Mode::empty())?)
    }

    /// Opens a file by name.
    ///
    /// Links are followed if they stay inside, also through hidden names, as Kubernetes uses them.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`] if there is no such file, it is hidden or outside the folder;
    /// otherwise the reason why it cannot be read.
    pub fn file(&self, name: &str) -> io::Result<OpenFile> {
        if !is_servable(name) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let root = self.root()?;
        // Checked before, because opening a device can have an effect.
        let found = open_beneath(&root, name, OFlags::PATH)?;
        if !fs::File::from(found).metadata()?.is_file() {
            return Err(io::ErrorKind::NotFound.into());
        }
        OpenFile::new(open_beneath(&root, name, OFlags::RDONLY | NON_BLOCKING)?.into())
    }

    /// Lists every file that can be requested, without following links to folders. Returns `None`
    /// if there are more than `max`.
    ///
    /// # Errors
    /// If the folder itself cannot be read; unreadable subfolders are omitted.
    pub(crate) fn list(&self, max: usize) -> io::Result<Option<Listing>> {
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
                    listing.omit_unreadable(folder, error.into());
                    continue;
                }
            };
            for entry in Dir::read_from(&opened)? {
                let entry = entry?;
                let name = match requestable_name(&folder, entry.file_name()) {
                    Ok(Some(name)) => name,
                    Ok(None) => continue,
                    Err(reason) => {
                        listing.omit(reason);
                        continue;
                    }
                };
                match kind_of(&opened, entry.file_name(), entry.file_type()) {
                    FileType::Directory => folders.push_back(name),
                    FileType::RegularFile | FileType::Symlink => listing.add(&root, name)?,
                    _ => listing.omit(Omission::NotRegular),
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

/// Returns the name by which an entry of `folder` is requested; `None` for `.` and `..`.
fn requestable_name(folder: &str, entry: &CStr) -> Result<Option<String>, Omission> {
    let bytes = entry.to_bytes();
    if bytes == b"." || bytes == b".." {
        return Ok(None);
    }
    if bytes.starts_with(b".") {
        return Err(Omission::Hidden);
    }
    let last = str::from_utf8(bytes).map_err(|_| Omission::NotUtf8)?;
    let separator = if folder.is_empty() { "" } else { "/" };
    let name = format!("{folder}{separator}{last}");
    // Requests are lines that end with LF or CRLF.
    let is_line = !name.contains('\n') && !name.ends_with('\r');
    if is_servable(&name) && is_line { Ok(Some(name)) } else { Err(Omission::Unsendable) }
}

/// Returns the kind of an entry, which some file systems do not report with the name.
fn kind_of(folder: &OwnedFd, name: &CStr, kind: FileType) -> FileType {
    match kind {
        FileType::Unknown => statat(folder, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
        known => known,
    }
}

/// Returns whether a name is relative and contains nothing hidden and no `..`.
fn is_servable(name: &str) -> bool {
    name.len() <= MAX_NAME
        && !name.contains('\0')
        && name.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

fn open_beneath(root: &OwnedFd, name: &str, flags: OFlags) -> io::Result<OwnedFd> {
    beneath::open(root, Path::new(name), flags).map_err(|error| match error {
        // Clients do not learn where a link leads.
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

    /// Names that collide often, with hidden ones, `.` and `..` among them.
    fn name() -> impl Strategy<Value = String> {
        let part =
            prop_oneof![6 => "[ab]", 2 => "\\.[ab]", 2 => Just("..".to_owned()), 1 => "[./]"];
        prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/"))
    }

    proptest! {
        #[test]
        fn serves_no_hidden_file_and_none_outside_the_folder(
            files in prop::collection::vec("\\.?[ab](/\\.?[ab]){0,2}", 1..6),
            links in prop::collection::vec(("[ab](/[ab])?", "(/|(\\.\\./){0,3})[ab](/[ab])?"), 0..6),
            names in prop::collection::vec(name(), 1..20),
        ) {
            // The same names exist around the folder and in it.
            let around = tempfile::tempdir().unwrap();
            let around = around.path().canonicalize().unwrap();
            let root = around.join("around/a");
            fs::create_dir_all(&root).unwrap();
            for folder in [&around, &around.join("around"), &root] {
                for file in &files {
                    let path = folder.join(file);
                    // Some files cannot be created: their parent is a file, or the name is taken.
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
