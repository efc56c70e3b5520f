//! Private mount and network namespaces.

use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs a test in a thread with private namespaces, which its child processes share. Skips the test
/// without the privilege.
pub fn apart(namespaces: UnshareFlags, test: impl FnOnce() + Send) {
    let alone = || {
        // SAFETY: file descriptors remain shared with the other threads.
        unsafe { unshare_unsafe(namespaces | UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
    };
    let run = || match alone() {
        Ok(()) => test(),
        Err(error) => eprintln!("SKIPPED: nothing can be mounted here: {error}"),
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap();
}

/// Runs a test with a private mount namespace.
pub fn with_own_mounts(test: impl FnOnce() + Send) {
    apart(UnshareFlags::empty(), test);
}

/// Mounts an empty tmpfs over `place`.
pub fn empty(place: impl AsRef<std::path::Path>, options: &std::ffi::CStr) {
    let place = place.as_ref();
    mount("none", place, "tmpfs", MountFlags::empty(), options)
        .unwrap_or_else(|error| panic!("{}: {error}", place.display()));
}
