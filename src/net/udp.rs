//! The loop that receives and answers datagrams.
//!
//! Batches of datagrams are received with their destination, so that a reply leaves from the address
//! of the request. Buffers are allocated once.

use std::array;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Instant;

use quinn_udp::{BATCH_SIZE, RecvMeta, Transmit, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;
use tokio::sync::watch;

use crate::net::accept_backoff::AcceptBackoff;
use crate::net::listener::{Assignment, run_until_reassigned};
use crate::net::service::Service;
use crate::net::udp_filter::may_be_answered;
use crate::telemetry::counters::Datagram;

/// Size of a buffer, which may receive several datagrams of one sender. Unused pages take no memory.
const DATAGRAM: usize = 64 << 10;

/// A socket that receives datagrams, registered with the reactor.
#[derive(Debug)]
pub(crate) struct DatagramSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    /// Used by one task after the other, so that its pages are mapped once.
    buffer: tokio::sync::Mutex<Vec<u8>>,
}

impl AsFd for DatagramSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl DatagramSocket {
    /// Registers a bound socket.
    pub(crate) fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let socket = UdpSocket::from_std(socket)?;
        // Enables the destination of each datagram: on a wildcard address, the reply must leave from
        // the address of the request.
        let state = UdpSocketState::new((&socket).into())?;
        let buffer = vec![0; BATCH_SIZE * DATAGRAM].into();
        Ok(Self { socket, state, buffer })
    }

    /// Answers datagrams in one task, until the sender of `assignments` is dropped.
    pub(crate) async fn run<S: Service>(
        self: Arc<Self>,
        assignments: watch::Receiver<Assignment<S>>,
    ) {
        run_until_reassigned(assignments, |current| self.answer_for(current)).await;
    }

    async fn answer_for<S: Service>(&self, current: Assignment<S>) {
        let mut buffer = self.buffer.lock().await;
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        let mut reply = Vec::new();
        let mut backoff = AcceptBackoff::default();
        loop {
            let received = self.socket.async_io(Interest::READABLE, || {
                let mut pieces = buffer.chunks_mut(DATAGRAM);
                let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
                    array::from_fn(|_| IoSliceMut::new(pieces.next().unwrap_or_default()));
                self.state.recv((&self.socket).into(), &mut slices, &mut metas)
            });
            let received = match received.await {
                Ok(received) => received,
                Err(error) => {
                    backoff.wait(&current.instance, "cannot receive datagrams", &error).await;
                    continue;
                }
            };
            backoff.reset();
            let now = Instant::now();
            for (meta, payload) in metas.iter().zip(buffer.chunks(DATAGRAM)).take(received) {
                let payload = payload.get(..meta.len).unwrap_or_default();
                // The kernel may hand over several datagrams of one sender as one.
                for datagram in segments(payload, meta.stride) {
                    let result = self.answer_one(meta, datagram, now, &current, &mut reply);
                    let outcome = result.err().unwrap_or(Datagram::Answered);
                    current.instance.counts().datagrams.add(outcome);
                }
            }
            // A flood of datagrams must not keep the other tasks of this thread waiting.
            tokio::task::consume_budget().await;
        }
    }

    /// Answers a datagram, or returns the outcome that prevented the reply.
    fn answer_one<S: Service>(
        &self,
        meta: &RecvMeta,
        datagram: &[u8],
        now: Instant,
        assignment: &Assignment<S>,
        reply: &mut Vec<u8>,
    ) -> Result<(), Datagram> {
        let service = &assignment.instance.service;
        let resembles_reply = || service.resembles_reply(datagram);
        if !may_be_answered(meta.addr, meta.dst_ip, &assignment.own_ports, resembles_reply) {
            return Err(Datagram::Unanswerable);
        }
        assignment.instance.admit_datagram(meta.addr.ip(), now)?;
        reply.clear();
        service.reply(datagram, reply)?;
        // A full send queue drops the reply, as any network may.
        let sent = self.state.try_send((&self.socket).into(), &reply_to(meta, reply));
        sent.map_err(|_| Datagram::Failed)
    }
}

fn segments(payload: &[u8], stride: usize) -> impl Iterator<Item = &[u8]> {
    // An empty datagram is a segment, too.
    let empty = payload.is_empty().then_some(payload);
    empty.into_iter().chain(payload.chunks(stride.max(1)))
}

fn reply_to<'a>(meta: &RecvMeta, reply: &'a [u8]) -> Transmit<'a> {
    Transmit {
        destination: meta.addr,
        ecn: None,
        contents: reply,
        segment_size: None,
        src_ip: meta.dst_ip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_coalesced_datagrams() {
        let split = |payload, stride| segments(payload, stride).collect::<Vec<_>>();
        assert_eq!(split(b"", 0), [b""]);
        assert_eq!(split(b"a", 1), [b"a"]);
        assert_eq!(split(b"aabbc", 2), [&b"aa"[..], b"bb", b"c"]);
    }
}
