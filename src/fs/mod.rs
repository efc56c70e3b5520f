//! Files and folders on any file system.
//!
//! Services open files with [`mod@file`] and [`folder`], confined by [`beneath`], on the threads of
//! a [`blocking_pool`]. Clients and mirrors check names with [`filename`] and save with [`atomic`].
//! Nothing here knows a service or the configuration.

pub(crate) mod atomic;
mod beneath;
pub(crate) mod blocking_pool;
pub(crate) mod created_dirs;
pub(crate) mod file;
pub(crate) mod filename;
pub(crate) mod folder;
