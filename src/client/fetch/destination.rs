//! Output paths of fetched files.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::FileType;

use super::error::Error;
use super::{FetchOptions, Output, Selection};
use crate::fs::atomic::{OverwritePolicy, is_special};
use crate::fs::filename::{self, NameError, escape};

/// A file that is requested by name.
pub(super) struct NamedFile<'a> {
    pub(super) name: &'a str,
    /// Output path; `None` for standard output.
    pub(super) path: Option<PathBuf>,
}

/// Returns the output path of a file that is requested by name; `None` for standard output.
pub(super) fn requested_path(name: &str, options: &FetchOptions) -> Result<Option<PathBuf>, Error> {
    // The protocol has one name per line.
    if name.is_empty() {
        return Err(unsafe_name(name, NameError::Empty));
    }
    if name.contains(['\n', '\r']) {
        return Err(unsafe_name(name, NameError::ControlCharacter));
    }
    let refuse = |cause| unsafe_name(name, cause);
    let path = match &options.output {
        Output::Stdout => return Ok(None),
        Output::File(path) => path.clone(),
        Output::Folder(folder) if options.selection == Selection::All => {
            join_folder(folder, &filename::relative_path(name).map_err(refuse)?)
        }
        Output::Folder(folder) => {
            join_folder(folder, Path::new(filename::last_component(name).map_err(refuse)?))
        }
    };
    // With --all, an existing file is compared with the received one and may be identical.
    if options.selection != Selection::All {
        check_existing(&path, options)?;
    }
    Ok(Some(path))
}

/// Returns the output path of a pushed file, whose name is chosen by the server; `None` for
/// standard output.
pub(super) fn pushed_path(name: &str, options: &FetchOptions) -> Result<Option<PathBuf>, Error> {
    let path = match &options.output {
        Output::Stdout => return Ok(None),
        Output::File(path) => path.clone(),
        Output::Folder(folder) => {
            let name = filename::file_name(name).map_err(|cause| unsafe_name(name, cause))?;
            join_folder(folder, Path::new(name))
        }
    };
    check_existing(&path, options)?;
    Ok(Some(path))
}

fn unsafe_name(name: &str, cause: NameError) -> Error {
    Error::UnsafeName { name: escape(name), cause }
}

/// Joins `folder` and `name` without a leading `./`.
pub(crate) fn join_folder(folder: &Path, name: &Path) -> PathBuf {
    if folder == Path::new(".") { name.to_owned() } else { folder.join(name) }
}

/// Refuses existing files that must not be replaced.
fn check_existing(path: &Path, options: &FetchOptions) -> Result<(), Error> {
    match file_type(path) {
        FileType::Socket if is_named_by_user(path, options) => Err(Error::Socket(path.to_owned())),
        kind if is_special(kind) && is_named_by_user(path, options) => Ok(()),
        kind if is_special(kind) => Err(Error::SpecialFile(path.to_owned())),
        _ if options.overwrite == OverwritePolicy::Refuse && path.symlink_metadata().is_ok() => {
            Err(Error::Exists(path.to_owned()))
        }
        _ => Ok(()),
    }
}

/// Whether the path was given with `-o FILE`, rather than derived from the name of a file.
fn is_named_by_user(path: &Path, options: &FetchOptions) -> bool {
    matches!(&options.output, Output::File(output) if output == path)
}

/// Whether a path that the user named is a device or FIFO, which is written to instead of replaced.
pub(super) fn is_stream(path: &Path) -> Result<bool, Error> {
    match file_type(path) {
        FileType::Socket => Err(Error::Socket(path.to_owned())),
        kind => Ok(is_special(kind)),
    }
}

fn file_type(path: &Path) -> FileType {
    FileType::from_raw_mode(path.metadata().map_or(0, |metadata| metadata.mode()))
}
