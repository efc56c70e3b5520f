//! What clients do, again and again, and how they see that it was done.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::PATIENCE;

/// How much a client reads at one time.
const PIECE: usize = 256 << 10;

/// How many datagrams a client sends before it awaits the replies.
pub const BURST: usize = 8;

/// After so long a silence, a datagram is lost.
const LOST: Duration = Duration::from_secs(1);

/// A client does one thing again and again, and says how many exchanges that was.
pub type Client = Box<dyn FnMut() -> io::Result<usize> + Send>;

/// Connects, and reads until the server ends the connection.
pub fn reader(address: SocketAddr, length: usize) -> Client {
    let mut buffer = vec![0; PIECE];
    Box::new(move || {
        let received = read_to_end(&mut connect(address)?, &mut buffer)?;
        if received == length { Ok(1) } else { Err(wrong(received, length)) }
    })
}

/// Asks by HTTP for `/data`, and reads until the server ends the connection.
pub fn browser(address: SocketAddr, length: usize) -> Client {
    let mut buffer = vec![0; PIECE];
    Box::new(move || {
        let mut stream = connect(address)?;
        stream.write_all(b"GET /data HTTP/1.0\r\n\r\n")?;
        let received = read_to_end(&mut stream, &mut buffer)?;
        // Before the file stands a head.
        if received > length { Ok(1) } else { Err(wrong(received, length)) }
    })
}

/// Sends so many datagrams at once, and awaits as many replies.
pub fn asker(address: SocketAddr, burst: usize, length: usize) -> io::Result<Client> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(address)?;
    socket.set_read_timeout(Some(LOST))?;
    Ok(Box::new(move || {
        for _ in 0..burst {
            socket.send(b"?")?;
        }
        for answered in 0..burst {
            match socket.recv(&mut [0; 64]) {
                Ok(received) if received != length => return Err(wrong(received, length)),
                Ok(_) => {}
                // UDP may lose some, but not all.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && answered > 0 => {
                    return Ok(answered);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(burst)
    }))
}

/// The loop that only reads.
pub fn read_all(address: SocketAddr) -> io::Result<()> {
    read_to_end(&mut connect(address)?, &mut vec![0; PIECE]).map(drop)
}

pub fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

pub fn read_to_end(stream: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut received = 0;
    loop {
        match stream.read(buffer)? {
            0 => return Ok(received),
            read => received += read,
        }
    }
}

fn wrong(received: usize, length: usize) -> io::Error {
    io::Error::other(format!("{received} bytes, not {length}"))
}
