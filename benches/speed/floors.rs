//! The floors: bare loops with the minimum cost of the same reply.
//!
//! Each is a separate process with one thread. It sends prepared bytes, sets no unnecessary socket
//! option and ignores errors.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};

use clap::ValueEnum;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::fs::{MemfdFlags, memfd_create, sendfile};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

#[derive(Clone, Copy, ValueEnum)]
pub enum Floor {
    /// epoll; accept until the queue is empty; write, close.
    Write,
    /// Like `Epoll`, with sendfile from memory.
    Sendfile,
    /// A loop of recvfrom and sendto.
    Datagram,
}

impl Floor {
    /// Prints its address and serves standard input until killed.
    pub fn serve(self) -> io::Result<()> {
        let mut reply = Vec::new();
        io::stdin().read_to_end(&mut reply)?;
        match self {
            Self::Write => accept_all(|mut client| client.write_all(&reply)),
            Self::Sendfile => {
                let mut file = File::from(memfd_create("reply", MemfdFlags::CLOEXEC)?);
                file.write_all(&reply)?;
                accept_all(|client| send_whole(&client, &file, reply.len()))
            }
            Self::Datagram => answer_all(&reply),
        }
    }
}

/// Client sockets block: a small document never waits, and a large one would cost a
/// registration.
fn accept_all(answer: impl Fn(TcpStream) -> io::Result<()>) -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    listener.set_nonblocking(true)?;
    println!("{}", listener.local_addr()?);
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&epoll, &listener, EventData::new_u64(0), EventFlags::IN)?;
    let mut events = [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }];
    loop {
        epoll::wait(&epoll, &mut events, None)?;
        loop {
            match accept_with(&listener, SocketFlags::CLOEXEC) {
                Ok(client) => answer(client.into())?,
                Err(Errno::AGAIN) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn send_whole(client: &TcpStream, file: &File, length: usize) -> io::Result<()> {
    let mut sent = 0;
    while sent < length as u64 {
        sendfile(client, file, Some(&mut sent), length)?;
    }
    Ok(())
}

fn answer_all(reply: &[u8]) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", socket.local_addr()?);
    let mut datagram = [0; 64];
    loop {
        let (_, client) = socket.recv_from(&mut datagram)?;
        socket.send_to(reply, client)?;
    }
}
