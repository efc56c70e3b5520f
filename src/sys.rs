//! The only unsafe code: two system calls without a safe wrapper, a registration with tokio, and
//! inherited descriptors.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

/// A socket that is registered with tokio's reactor, for waiting without an I/O operation.
#[derive(Debug)]
pub(crate) struct RegisteredFd(AsyncFd<OwnedFd>);

impl RegisteredFd {
    /// Registers the socket with the reactor of the current runtime. Closes it on failure.
    pub(crate) fn new(socket: OwnedFd, interest: Interest) -> io::Result<Self> {
        // SAFETY: an `OwnedFd` refers to the same open descriptor until it is dropped, and this
        // type exposes no mutable access that would allow to replace it.
        let registered = unsafe { AsyncFd::register_with_interest(socket, interest) };
        Ok(Self(registered?))
    }

    /// Waits until data can be read, or a client accepted. Fails if the reactor has stopped.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }

    /// Polls until the socket is readable or, for [`Interest::WRITABLE`], writable. Fails if the
    /// reactor has stopped.
    pub(crate) fn poll_ready(
        &self,
        context: &mut Context<'_>,
        direction: Interest,
    ) -> Poll<io::Result<AsyncFdReadyGuard<'_, OwnedFd>>> {
        if direction.is_writable() {
            self.0.poll_write_ready(context)
        } else {
            self.0.poll_read_ready(context)
        }
    }
}

impl AsFd for RegisteredFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

/// Takes the descriptors that the service manager passed to this process, each with its name
/// (`sd_listen_fds(3)`). Further calls return none. Fails if the environment variables of the
/// manager are malformed or name closed descriptors.
pub(crate) fn inherited_descriptors() -> io::Result<Vec<(OwnedFd, String)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    // Also checks that they are open, and sets close-on-exec.
    let passed = sd_notify::listen_fds_with_names()?;
    // SAFETY: the service manager opened them for this function alone, which takes them only once.
    Ok(passed.map(|(fd, name)| (unsafe { OwnedFd::from_raw_fd(fd) }, name)).collect())
}

/// The raw state of the kernel's clock (adjtimex(2)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Timex {
    /// The clock state: `TIME_OK`, `TIME_INS`, …, `TIME_ERROR`.
    pub state: i32,
    /// The status bits, `STA_*`.
    pub status: i32,
    /// The maximum error, in microseconds.
    pub max_error: i64,
}

/// Reads the clock state. Needs no privilege, but fails under `ProtectClock=yes`.
pub(crate) fn read_timex() -> io::Result<Timex> {
    // SAFETY: `timex` is a plain structure of integers, for which all zeros is a valid value;
    // with `modes` zero the call changes nothing and only fills it.
    let (state, timex) = unsafe {
        let mut timex: libc::timex = std::mem::zeroed();
        (libc::adjtimex(&raw mut timex), timex)
    };
    if state < 0 {
        return Err(io::Error::last_os_error());
    }
    // The width of the fields depends on the architecture.
    #[allow(clippy::useless_conversion)]
    Ok(Timex { state, status: timex.status, max_error: timex.maxerror.into() })
}

/// Returns the number of bytes written to `socket` that its peer has not acknowledged (tcp(7),
/// `SIOCOUTQ`); for a Unix socket, the memory of the unread bytes.
pub(crate) fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) stores one int through the pointer, which is
    // valid for the duration of the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u64::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn counts_bytes_until_they_are_acknowledged() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        assert_eq!(unacknowledged(server.as_fd()).unwrap(), 0);
        server.set_nonblocking(true).unwrap();
        while server.write(&[0; 8192]).is_ok() {}
        assert!(unacknowledged(server.as_fd()).unwrap() > 0);
        drop(server.shutdown(std::net::Shutdown::Write));
        client.read_to_end(&mut Vec::new()).unwrap();
        while unacknowledged(server.as_fd()).unwrap() > 0 {
            std::thread::yield_now();
        }
    }

    #[test]
    fn reads_the_clock_state() {
        assert!(read_timex().unwrap().max_error >= 0);
    }
}
