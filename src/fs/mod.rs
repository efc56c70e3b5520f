//! Files and folders on any file system.
//!
//! [`file`] opens regular files and folders to serve, [`beneath`] keeps names inside a folder,
//! [`atomic`] writes a file whole, [`blocking_pool`] runs calls that may hang, [`filename`] accepts
//! names that a server supplied. Nothing here knows a service.

pub(crate) mod atomic;
pub(crate) mod beneath;
pub(crate) mod blocking_pool;
pub(crate) mod created_dirs;
pub(crate) mod file;
pub(crate) mod filename;
