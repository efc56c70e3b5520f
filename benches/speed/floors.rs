//! The bare loops: the least that the same answer can cost.
//!
//! Each is a process of its own, with one thread, that hands out bytes which lie ready, sets no
//! option of a socket that it does not need, and looks at no error that does not end it.

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
    /// epoll; accept until nobody waits; write, close.
    Write,
    /// The same with sendfile from memory.
    Sendfile,
    /// recvfrom, sendto.
    Datagram,
}

impl Floor {
    /// Serves standard input until it is killed, and first says where.
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

/// The clients' sockets block, as a document that fits the kernel's buffers does not wait and
/// one that does not would cost a registration more.
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
