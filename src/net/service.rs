//! The interface between sockets and services.

use std::future::{Future, pending};

use jiff::Timestamp;

use crate::net::connection::{Connection, ServeError};
use crate::net::stream::LazySocket;
use crate::telemetry::counters::Datagram;

/// A service that answers connections and, optionally, datagrams.
///
/// Listeners accept, limit and log; a service only produces the reply.
pub trait Service: Send + Sync + 'static {
    /// Serves one connection. An error ends it with a reset.
    fn serve(
        &self,
        connection: &mut Connection<LazySocket>,
    ) -> impl Future<Output = Result<(), ServeError>> + Send;

    /// Whether [`Self::reply`] answers datagrams.
    fn answers_datagrams(&self) -> bool {
        false
    }

    /// Whether a datagram may be the reply of another service. Such a datagram is not answered, so
    /// that two services never answer each other.
    fn resembles_reply(&self, _datagram: &[u8]) -> bool {
        true
    }

    /// Appends the reply to a datagram.
    fn reply(&self, _datagram: &[u8], _reply: &mut Vec<u8>) -> Result<(), Datagram> {
        Err(Datagram::Unanswerable)
    }

    /// Runs work between connections, such as watching a file. Dropped when the service ends.
    fn background(&self) -> impl Future<Output = ()> + Send {
        pending()
    }

    /// Returns the reason why the service cannot read its files.
    fn problem(&self) -> Option<String> {
        None
    }

    /// Returns the time of the last change of the served file.
    fn file_version(&self) -> Option<Timestamp> {
        None
    }

    /// Whether the service is for monitoring: it runs during the drain and logs at `debug`.
    fn is_monitoring(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::net::connection::Shutdown;
    use crate::net::instance::ServiceInstance;
    use crate::net::limits::Limits;
    use crate::net::listener::{Assignment, Family, Listener};
    use crate::net::udp::DatagramSocket;
    use tokio::sync::watch;
    use tokio_util::task::TaskTracker;

    /// The quote of the day (RFC 865): a service is one type.
    #[derive(Debug)]
    struct QuoteOfTheDay(&'static str);

    impl Service for QuoteOfTheDay {
        async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
            connection.send(self.0.as_bytes()).await
        }

        fn answers_datagrams(&self) -> bool {
            true
        }

        fn resembles_reply(&self, datagram: &[u8]) -> bool {
            datagram == self.0.as_bytes()
        }

        fn reply(&self, _: &[u8], reply: &mut Vec<u8>) -> Result<(), Datagram> {
            reply.extend_from_slice(self.0.as_bytes());
            Ok(())
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn serves_any_implementation_over_tcp_and_udp() {
        let quote = "Simplicity is prerequisite for reliability.\r\n";
        let limits = Limits::default();
        let service = QuoteOfTheDay(quote);
        let instance =
            ServiceInstance::new("quote.day".into(), service, limits, Shutdown::default());
        let (assign, assignment) = watch::channel(Assignment {
            instance: Arc::new(instance),
            connections: TaskTracker::new(),
            own_ports: [].into(),
        });
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let tcp = socket.local_addr().unwrap();
        let listener = Listener::new(socket.into(), Family::Tcp { inherited: false }).unwrap();
        tokio::spawn(Arc::new(listener).run(assignment.clone()));
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let udp = socket.local_addr().unwrap();
        tokio::spawn(Arc::new(DatagramSocket::new(socket).unwrap()).run(assignment));

        let clients = tokio::task::spawn_blocking(move || {
            let mut reply = String::new();
            TcpStream::connect(tcp).unwrap().read_to_string(&mut reply).unwrap();
            assert_eq!(reply, quote);
            let client = UdpSocket::bind("127.0.0.1:0").unwrap();
            client.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
            let mut buffer = [0; 100];
            // A datagram may be lost.
            let length = (0..20).find_map(|_| {
                client.send_to(b"?", udp).unwrap();
                client.recv(&mut buffer).ok()
            });
            assert_eq!(&buffer[..length.unwrap()], quote.as_bytes());
        });
        clients.await.unwrap();
        drop(assign);
    }
}
