//! Sockets that were inherited from the service manager or are bound here, with the options that
//! they need.

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

/// The longest queue of connections that wait to be accepted; the kernel shortens it to its
/// `net.core.somaxconn`.
pub(crate) const BACKLOG: i32 = 4096;

/// A socket that is bound and does not block.
#[derive(Debug)]
pub(crate) enum Socket {
    /// Accepts TCP connections.
    Tcp(OwnedFd),
    /// Accepts Unix connections. The file of one that was inherited is the service manager's.
    Unix(OwnedFd, Option<SocketFile>),
    /// Receives datagrams.
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

/// Binds a socket to `endpoint`; if `shared`, also where sockets are in the way of which each may
/// [`share_port`].
///
/// # Errors
/// Names the endpoint, the cause and, where there is one, the remedy.
pub(crate) fn bind(endpoint: &Endpoint, shared: bool) -> Result<Socket, BindError> {
    let bound = match endpoint {
        Endpoint::Tcp(address) => bind_tcp(*address, shared).map(|bound| Socket::Tcp(bound.into())),
        Endpoint::Udp(address) => bind_udp(*address, shared),
        // Whoever may enter the folder may ask, as with a TCP port.
        Endpoint::Unix(path) => {
            bind_unix(path, 0o666).map(|(listener, file)| Socket::Unix(listener.into(), Some(file)))
        }
    };
    bound.map_err(|source| BindError { endpoint: endpoint.clone(), source })
}

/// The sockets that the service manager has passed cannot be taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InheritError {
    /// What it says of them makes no sense.
    #[error("the sockets that systemd has passed cannot be found (LISTEN_FDS, LISTEN_FDNAMES)")]
    Unknown(#[source] io::Error),
    /// One cannot be served.
    #[error("the descriptor that systemd passed under the name {name:?} cannot be served")]
    Unfit {
        /// Its `FileDescriptorName=`.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A socket that the service manager has passed.
#[derive(Debug)]
pub(crate) struct Inherited {
    /// The socket itself.
    pub socket: Socket,
    /// Where it is bound.
    pub endpoint: Endpoint,
    /// Its `FileDescriptorName=`.
    pub name: String,
}

impl Inherited {
    /// Every socket that the service manager has passed; once, and then no more.
    ///
    /// # Errors
    /// If one is not a socket that listens or receives datagrams.
    pub(crate) fn take_all() -> Result<Vec<Self>, InheritError> {
        let descriptors = sys::inherited_descriptors().map_err(InheritError::Unknown)?;
        let take = |(fd, name)| match Socket::inherit(fd) {
            Ok((socket, endpoint)) => Ok(Self { socket, endpoint, name }),
            Err(source) => Err(InheritError::Unfit { name, source }),
        };
        descriptors.into_iter().map(take).collect()
    }
}

/// Begins to queue the clients of a socket that was bound to `endpoint`; those of a TCP socket in so
/// many queues, each with a socket of its own, among which the kernel spreads them (socket(7),
/// `SO_REUSEPORT`). No other program can share the port by accident: the first was bound alone.
///
/// # Errors
/// As [`bind`].
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
            // Here the kernel looks once more whether the port is free.
            first.listen(BACKLOG)?;
            let mut sockets = vec![Socket::Tcp(first.into())];
            for _ in 1..queues {
                let further = bind_tcp(address, true)?;
                further.listen(BACKLOG)?;
                sockets.push(Socket::Tcp(further.into()));
            }
            Ok(sockets)
        }
        Socket::Udp(socket) => {
            share_port(&socket, false)?;
            Ok(vec![Socket::Udp(socket)])
        }
        // It listens since it was bound.
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

    /// The address that a socket has got that was to be bound to `wanted`, which tells the port
    /// where any was asked for.
    ///
    /// # Errors
    /// None is expected of a bound socket.
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

/// Whether another socket of this user may be bound beside this one, to an address that includes
/// this one's or is included in it: a reload binds the new one before it closes the old one.
///
/// # Errors
/// None is expected of an Internet socket.
pub(crate) fn share_port(socket: impl AsFd, shared: bool) -> io::Result<()> {
    Ok(set_socket_reuseport(socket, shared)?)
}

/// Lets nobody begin to connect to a TCP socket that listens, so that it can be closed without a
/// reset for whom the kernel has just connected. Who has begun gets through; who comes now hears
/// nothing and asks again a second later, as if the packet were lost, and then finds the socket closed.
///
/// # Errors
/// None is expected of a TCP socket.
pub(crate) fn drop_new_syns(listening: impl AsFd) -> io::Result<()> {
    // The words of classic BPF (linux/filter.h).
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
    // So that a restart does not wait for the connections of before.
    socket.set_reuse_address(true)?;
    prepare_tcp(&socket)?;
    share_port(&socket, shared)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Sets what the connections inherit from their listening socket.
fn prepare_tcp(socket: &socket2::Socket) -> io::Result<()> {
    // A reply's last part does not wait for an acknowledgement.
    socket.set_tcp_nodelay(true)?;
    // A connection that is closed is reset, unless it was finished; also by the kernel, when it
    // closes what a killed process had open.
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
        // Else `[::]` would take the IPv4 port too, and `0.0.0.0` could not be bound beside it.
        socket.set_only_v6(true)?;
    }
    Ok(socket)
}

/// Binds a Unix socket that does not block and whose file has this mode. The file of a process that
/// was killed is replaced, that of another that lives is not.
///
/// # Errors
/// [`io::ErrorKind::AddrInUse`] if another process listens there, or why it cannot be bound.
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

/// Removes a socket file that nobody listens on, as a killed process leaves behind.
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

/// The file of a Unix socket, which goes when the socket goes.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    /// Device and inode: a file that somebody else has put there meanwhile stays.
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
    fn who_has_begun_to_connect_gets_through_and_who_comes_later_is_refused() {
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
