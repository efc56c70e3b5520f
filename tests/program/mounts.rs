//! Where what is mounted, or the network, is a test's own.

use std::thread;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Runs a test in a thread with namespaces of its own, if it may: whatever it mounts, or does to the
/// network, is seen by what it starts and by nobody else.
pub fn apart(namespaces: UnshareFlags, test: impl FnOnce() + Send) {
    let alone = || {
        // SAFETY: no descriptors are divided from those of the other threads.
        unsafe { unshare_unsafe(namespaces | UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
    };
    let run = || match alone() {
        Ok(()) => test(),
        Err(error) => eprintln!("SKIPPED: nothing can be mounted here: {error}"),
    };
    thread::scope(|scope| scope.spawn(run).join()).unwrap();
}

/// The same for what is mounted only.
pub fn with_own_mounts(test: impl FnOnce() + Send) {
    apart(UnshareFlags::empty(), test);
}

/// Mounts an empty file system over `place`, with these options.
pub fn empty(place: impl AsRef<std::path::Path>, options: &std::ffi::CStr) {
    let place = place.as_ref();
    mount("none", place, "tmpfs", MountFlags::empty(), options)
        .unwrap_or_else(|error| panic!("{}: {error}", place.display()));
}
