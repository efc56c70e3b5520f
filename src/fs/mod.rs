//! Files and folders on any file system.

pub mod atomic;
pub mod created_dirs;
