//! Sockets that are bound here, with the options that they need.

use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use socket2::{Domain, Protocol, Type};

use crate::config::Endpoint;

/// The longest queue of connections that wait to be accepted; the kernel shortens it to its
/// `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// A socket that is bound and does not block.
#[derive(Debug)]
pub enum Socket {
    /// Accepts TCP connections.
    Tcp(OwnedFd),
    /// Accepts Unix connections.
    Unix(OwnedFd, SocketFile),
    /// Receives datagrams.
    Udp(std::net::UdpSocket),
}

/// An endpoint that could not be bound.
#[derive(Debug, thiserror::Error)]
pub struct BindError {
    endpoint: Endpoint,
    source: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}", self.endpoint)?;
        let remedy = match (self.source.kind(), &self.endpoint) {
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

/// Binds a socket to `endpoint`.
///
/// # Errors
/// Names the endpoint, the cause and, where there is one, the remedy.
pub fn bind(endpoint: &Endpoint) -> Result<Socket, BindError> {
    let bound = match endpoint {
        Endpoint::Tcp(address) => bind_tcp(*address),
        Endpoint::Udp(address) => bind_udp(*address),
        Endpoint::Unix(path) => bind_unix(path),
    };
    bound.map_err(|source| BindError { endpoint: endpoint.clone(), source })
}

impl Socket {
    /// The address that it has got, which tells the port where any was asked for.
    ///
    /// # Errors
    /// None is expected of a bound socket.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        let internet =
            |address: Option<SocketAddr>| address.ok_or(io::ErrorKind::Unsupported.into());
        match self {
            Self::Tcp(fd) => {
                let address = socket2::SockRef::from(fd).local_addr()?;
                internet(address.as_socket()).map(Endpoint::Tcp)
            }
            Self::Udp(socket) => socket.local_addr().map(Endpoint::Udp),
            Self::Unix(_, file) => Ok(Endpoint::Unix(file.path.clone())),
        }
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<Socket> {
    let socket = internet_socket(address, Type::STREAM, Protocol::TCP)?;
    // So that a restart does not wait for the connections of before.
    socket.set_reuse_address(true)?;
    // Inherited by the connections: a reply's last part does not wait for an acknowledgement.
    socket.set_tcp_nodelay(true)?;
    // Inherited, too: a connection that is closed is reset, unless it was finished; also by the
    // kernel, when it closes what a killed process had open.
    socket.set_linger(Some(Duration::ZERO))?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(Socket::Tcp(socket.into()))
}

fn bind_udp(address: SocketAddr) -> io::Result<Socket> {
    let socket = internet_socket(address, Type::DGRAM, Protocol::UDP)?;
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

fn bind_unix(path: &Path) -> io::Result<Socket> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    let file = SocketFile::new(path)?;
    listener.set_nonblocking(true)?;
    // Whoever may enter the folder may ask, as with a TCP port.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(Socket::Unix(listener.into(), file))
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
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode: a file that somebody else has put there meanwhile stays.
    identity: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), identity: identity(path)? })
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
