//! Sockets with their options: inherited from the service manager, or bound here.

use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::SocketType;
use rustix::net::sockopt::{set_socket_reuseport, socket_acceptconn, socket_type};
use socket2::{Domain, Protocol, SockFilter, Type};

use crate::net::endpoint::Endpoint;
use crate::sys;

/// Maximum length of the accept queue. The kernel limits it to `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = 4096;

/// A bound, non-blocking socket.
#[derive(Debug)]
pub(crate) enum Socket {
    Tcp(OwnedFd),
    /// The file of an inherited socket belongs to the service manager.
    Unix(OwnedFd, Option<SocketFile>),
    Udp(std::net::UdpSocket),
}

/// An endpoint that could not be bound.
#[derive(Debug, thiserror::Error)]
pub(crate) struct BindError {
    endpoint: Endpoint,
    source: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}", self.endpoint)?;
        let no_family = self.source.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error());
        let remedy = match (self.source.kind(), &self.endpoint) {
            (_, Endpoint::Tcp(address) | Endpoint::Udp(address))
                if no_family && address.is_ipv6() =>
            {
                "this machine has no IPv6"
            }
            (io::ErrorKind::AddrInUse, Endpoint::Tcp(address) | Endpoint::Udp(address))
                if address.ip() == Ipv4Addr::UNSPECIFIED =>
            {
                "another program listens there, or a socket unit on [::] without \
                 BindIPv6Only=ipv6-only: see `ss -lptnux`"
            }
            (io::ErrorKind::AddrInUse, _) => "another program listens there: see `ss -lptnux`",
            (io::ErrorKind::AddrNotAvailable, _) => "this machine does not have that address",
            (io::ErrorKind::PermissionDenied, Endpoint::Tcp(address) | Endpoint::Udp(address))
                if address.port() < 1024 =>
            {
                "ports below 1024 need CAP_NET_BIND_SERVICE"
            }
            (io::ErrorKind::NotFound, Endpoint::Unix(_)) => "its folder must exist",
            _ => return Ok(()),
        };
        write!(f, " ({remedy})")
    }
}

/// Binds a socket to `endpoint`; if `shared`, also beside other sockets that [`share_port`].
pub(crate) fn bind(endpoint: &Endpoint, shared: bool) -> Result<Socket, BindError> {
    let bound = match endpoint {
        Endpoint::Tcp(address) => bind_tcp(*address, shared).map(|bound| Socket::Tcp(bound.into())),
        Endpoint::Udp(address) => bind_udp(*address, shared),
        // Open to everyone who may enter the folder, as a TCP port is.
        Endpoint::Unix(path) => {
            bind_unix(path, 0o666).map(|(listener, file)| Socket::Unix(listener.into(), Some(file)))
        }
    };
    bound.map_err(|source| BindError { endpoint: endpoint.clone(), source })
}

/// The reason why inherited sockets cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InheritError {
    #[error("the sockets that systemd has passed cannot be found (LISTEN_FDS, LISTEN_FDNAMES)")]
    Unknown(#[source] io::Error),
    #[error("the descriptor that systemd passed under the name {name:?} cannot be served")]
    Unfit {
        /// Its `FileDescriptorName=`.
        name: String,
        source: io::Error,
    },
}

/// A socket of the service manager (`sd_listen_fds(3)`).
#[derive(Debug)]
pub(crate) struct Inherited {
    pub socket: Socket,
    pub endpoint: Endpoint,
    /// Its `FileDescriptorName=`.
    pub name: String,
}

impl Inherited {
    /// Takes all inherited sockets. A second call returns none.
    ///
    /// # Errors
    /// If a descriptor is neither a listening socket nor a datagram socket.
    pub(crate) fn take_all() -> Result<Vec<Self>, InheritError> {
        let descriptors = sys::inherited_descriptors().map_err(InheritError::Unknown)?;
        let take = |(fd, name)| match Socket::inherit(fd) {
            Ok((socket, endpoint)) => Ok(Self { socket, endpoint, name }),
            Err(source) => Err(InheritError::Unfit { name, source }),
        };
        descriptors.into_iter().map(take).collect()
    }
}

/// Starts to listen on a bound socket. A TCP socket becomes `queues` sockets, among which the kernel
/// distributes the clients (socket(7), `SO_REUSEPORT`). No other program shares the port by accident:
/// the first socket was bound alone.
pub(crate) fn listen(
    socket: Socket,
    endpoint: &Endpoint,
    queues: usize,
) -> Result<Vec<Socket>, BindError> {
    let listen = || match socket {
        Socket::Tcp(first) => {
            let first = socket2::Socket::from(first);
            let address = first.local_addr()?.as_socket().ok_or(io::ErrorKind::Unsupported)?;
            share_port(&first, true)?;
            // The kernel checks again that the port is free.
            first.listen(BACKLOG)?;
            let mut sockets = vec![Socket::Tcp(first.into())];
            for _ in 1..queues {
                let next = bind_tcp(address, true)?;
                next.listen(BACKLOG)?;
                sockets.push(Socket::Tcp(next.into()));
            }
            Ok(sockets)
        }
        Socket::Udp(socket) => {
            share_port(&socket, false)?;
            Ok(vec![Socket::Udp(socket)])
        }
        // `bind` made it listen.
        Socket::Unix(..) => Ok(vec![socket]),
    };
    listen().map_err(|source| BindError { endpoint: endpoint.clone(), source })
}

impl Socket {
    fn inherit(fd: OwnedFd) -> io::Result<(Self, Endpoint)> {
        let other = || {
            let expected = "expected a socket that listens or receives datagrams (ListenStream= \
                            with Accept=no, or ListenDatagram=)";
            io::Error::new(io::ErrorKind::InvalidInput, expected)
        };
        let kind = socket_type(&fd).map_err(|_| other())?;
        let listens = socket_acceptconn(&fd)?;
        let address = socket2::SockRef::from(&fd).local_addr()?;
        socket2::SockRef::from(&fd).set_nonblocking(true)?;
        match (kind, listens, address.as_socket()) {
            (SocketType::STREAM, true, Some(address)) => {
                prepare_tcp(&socket2::SockRef::from(&fd))?;
                Ok((Self::Tcp(fd), Endpoint::Tcp(address)))
            }
            (SocketType::DGRAM, _, Some(address)) => {
                Ok((Self::Udp(fd.into()), Endpoint::Udp(address)))
            }
            (SocketType::STREAM, true, None) if address.is_unix() => {
                let abstract_name = || {
                    let name = address.as_abstract_namespace().unwrap_or_default();
                    PathBuf::from(format!("@{}", name.escape_ascii()))
                };
                let path = address.as_pathname().map_or_else(abstract_name, Path::to_owned);
                Ok((Self::Unix(fd, None), Endpoint::Unix(path)))
            }
            _ => Err(other()),
        }
    }

    /// Returns the endpoint of a socket that was bound to `wanted`, with the port that the kernel
    /// chose for port 0.
    pub(crate) fn endpoint(&self, wanted: &Endpoint) -> io::Result<Endpoint> {
        let internet =
            |address: Option<SocketAddr>| address.ok_or(io::ErrorKind::Unsupported.into());
        match self {
            Self::Tcp(fd) => {
                let address = socket2::SockRef::from(fd).local_addr()?;
                internet(address.as_socket()).map(Endpoint::Tcp)
            }
            Self::Udp(socket) => socket.local_addr().map(Endpoint::Udp),
            Self::Unix(..) => Ok(wanted.clone()),
        }
    }
}

/// Sets whether other sockets of this user may be bound to overlapping addresses: a reload binds the
/// new socket before it closes the old one.
pub(crate) fn share_port(socket: impl AsFd, shared: bool) -> io::Result<()> {
    Ok(set_socket_reuseport(socket, shared)?)
}

/// Drops the first packet of new connections to a listening TCP socket, so that its close resets
/// none. Pending handshakes complete. New clients repeat the packet after a second, as if it were
/// lost, and then find the socket closed.
pub(crate) fn drop_new_syns(listening: impl AsFd) -> io::Result<()> {
    // Operations of classic BPF (linux/filter.h).
    const LOAD_BYTE: u16 = 0x30;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // Of the TCP header (RFC 9293, 3.1).
    const FLAGS_AT: u32 = 13;
    const SYN: u32 = 0x02;
    const ACK: u32 = 0x10;
    let program = [
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS_AT),
        SockFilter::new(AND, 0, 0, SYN | ACK),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ];
    socket2::SockRef::from(&listening).attach_filter(&program)
}

fn bind_tcp(address: SocketAddr, shared: bool) -> io::Result<socket2::Socket> {
    let socket = internet_socket(address, Type::STREAM, Protocol::TCP)?;
    // A restart need not wait for the TIME-WAIT of earlier connections.
    socket.set_reuse_address(true)?;
    prepare_tcp(&socket)?;
    share_port(&socket, shared)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Sets the options that connections inherit from their listening socket.
fn prepare_tcp(socket: &socket2::Socket) -> io::Result<()> {
    // The last part of a reply does not wait for an acknowledgement.
    socket.set_tcp_nodelay(true)?;
    // A close resets the connection, unless it was completed; also when the kernel closes the
    // sockets of a killed process.
    socket.set_linger(Some(Duration::ZERO))
}

fn bind_udp(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = internet_socket(address, Type::DGRAM, Protocol::UDP)?;
    share_port(&socket, shared)?;
    socket.bind(&address.into())?;
    Ok(Socket::Udp(socket.into()))
}

fn internet_socket(
    address: SocketAddr,
    kind: Type,
    protocol: Protocol,
) -> io::Result<socket2::Socket> {
    let socket = socket2::Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv6() {
        // Otherwise `[::]` would include IPv4, and `0.0.0.0` could not be bound beside it.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Binds a non-blocking Unix socket with a file of this mode. Replaces the file of a killed process.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if another process listens there.
pub(crate) fn bind_unix(path: &Path, mode: u32) -> io::Result<(UnixListener, SocketFile)> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    let file = SocketFile::new(path)?;
    listener.set_nonblocking(true)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok((listener, file))
}

/// Removes the socket file of a killed process.
fn remove_stale(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(io::Error::other("there is a file of another kind, which is left alone"));
    }
    // Without blocking: a live server may be too busy to accept.
    let probe = socket2::Socket::new(Domain::UNIX, Type::STREAM, None)?;
    probe.set_nonblocking(true)?;
    match probe.connect(&socket2::SockAddr::unix(path)?) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Ok(()) | Err(_) => Err(io::ErrorKind::AddrInUse.into()),
    }
}

/// The file of a Unix socket, removed on drop.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode. A file that another process created meanwhile stays.
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
    }

    /// Whether clients no longer find it, because it was removed or replaced.
    pub(crate) fn is_gone(&self) -> bool {
        match identity(&self.path) {
            Ok(identity) => identity != self.identity,
            // Any other error says nothing about the file.
            Err(error) => {
                matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
            }
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // If it cannot be removed, the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn is_decided(socket: &socket2::Socket, within: Duration) -> bool {
        let within = Timespec::try_from(within).unwrap();
        poll(&mut [PollFd::new(socket, PollFlags::OUT)], Some(&within)).unwrap() > 0
    }

    #[test]
    fn dropping_new_syns_completes_pending_handshakes_and_delays_new_ones() {
        let listening = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listening.local_addr().unwrap();
        let mut before = TcpStream::connect(address).unwrap();
        drop_new_syns(&listening).unwrap();
        let after = socket2::Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        after.set_nonblocking(true).unwrap();
        assert!(after.connect(&address.into()).is_err());
        assert!(!is_decided(&after, Duration::from_millis(100)));

        let mut accepted = listening.accept().unwrap().0;
        before.write_all(b"request").unwrap();
        accepted.read_exact(&mut [0; 7]).unwrap();
        accepted.write_all(b"reply").unwrap();
        before.read_exact(&mut [0; 5]).unwrap();

        drop(listening);
        assert!(is_decided(&after, Duration::from_mins(1)));
        let error = after.take_error().unwrap().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
