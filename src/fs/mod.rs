//! Files and folders on any file system.
//!
//! [`file`] opens regular files and folders to serve, [`beneath`] keeps names inside a folder,
//! [`atomic`] writes a file whole, [`blocking_pool`] runs calls that may hang, [`filename`] accepts
//! names that a server supplied. Nothing here knows a service.

pub mod atomic;
pub mod beneath;
pub mod blocking_pool;
pub mod created_dirs;
pub mod file;
pub mod filename;
