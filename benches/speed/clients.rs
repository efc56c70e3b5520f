//! The clients: each repeats one exchange and checks its result.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use crate::PATIENCE;

/// Size of one read, in bytes.
const PIECE: usize = 256 << 10;

/// Datagrams sent before the replies are awaited.
pub const BURST: usize = 8;

/// Time after which a datagram counts as lost.
const LOST: Duration = Duration::from_secs(1);

/// Runs one round and returns the number of exchanges.
pub type Client = Box<dyn FnMut() -> io::Result<usize> + Send>;

/// Connects and reads to the end.
pub fn reader(address: SocketAddr, length: usize) -> Client {
    let mut buffer = vec![0; PIECE];
    Box::new(move || {
        let received = read_to_end(&mut connect(address)?, &mut buffer)?;
        if received == length { Ok(1) } else { Err(wrong(received, length)) }
    })
}

/// Requests `/data` over HTTP and reads to the end.
pub fn browser(address: SocketAddr, length: usize) -> Client {
    let mut buffer = vec![0; PIECE];
    Box::new(move || {
        let mut stream = connect(address)?;
        stream.write_all(b"GET /data HTTP/1.0\r\n\r\n")?;
        let received = read_to_end(&mut stream, &mut buffer)?;
        // The reply has a header.
        if received > length { Ok(1) } else { Err(wrong(received, length)) }
    })
}

/// Sends a burst of datagrams and awaits the replies.
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
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && answered > 0 => {
                    return Ok(answered);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(burst)
    }))
}

/// Reads and discards everything.
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
