//! The metrics and the state of health, to whoever asks by HTTP: `GET /metrics` and `GET /healthz`.
//!
//! One request, one reply, then the end (RFC 9112, 9.6). The rest of HTTP is for those who need it,
//! and Prometheus does not. The deadlines and the number of connections are those of any service.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use httparse::{EMPTY_HEADER, Error, Request, Status};

use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::service::Service;
use crate::net::stream::LazySocket;
use crate::telemetry::metrics::{MEDIA_TYPE, Monitor};

/// The longest request line with its header fields, in bytes.
const MAX_REQUEST: usize = 16 << 10;

/// The most header fields.
const MAX_HEADERS: usize = 64;

const TEXT: &str = "text/plain; charset=utf-8";

/// The service.
#[derive(Debug)]
pub struct MetricsService {
    monitor: Arc<Monitor>,
}

/// What is answered.
struct Reply {
    status: &'static str,
    media_type: &'static str,
    body: String,
}

impl Reply {
    fn text(status: &'static str, body: String) -> Self {
        Self { status, media_type: TEXT, body }
    }

    /// A status that says it all.
    fn plain(status: &'static str) -> Self {
        Self::text(status, format!("{status}\n"))
    }

    fn to_http(&self, with_body: bool) -> String {
        let Self { status, media_type, body } = self;
        let length = body.len();
        let body = if with_body { body } else { "" };
        // RFC 9110, 10.2.1, wants it with 405; it is true of every reply.
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\
             Allow: GET, HEAD\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n{body}"
        )
    }
}

impl MetricsService {
    /// Tells what `monitor` knows.
    pub fn new(monitor: Arc<Monitor>) -> Self {
        Self { monitor }
    }

    /// Answers one request.
    ///
    /// # Errors
    /// If the client went away, or did not say all in time.
    pub async fn answer<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let mut request = BytesMut::new();
        let reply = loop {
            if connection.receive(&mut request).await? == 0 {
                // Who asks nothing, or half a question, is told nothing.
                return Ok(());
            }
            if let Some(reply) = self.reply(&request) {
                break reply;
            }
        };
        connection.send_part(reply.as_bytes()).await
    }

    /// The reply to a request, if that is whole, or has a fault.
    fn reply(&self, request: &[u8]) -> Option<String> {
        let mut headers = [EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = Request::new(&mut headers);
        let fault = match parsed.parse(request) {
            Ok(Status::Complete(length)) if length <= MAX_REQUEST => {
                let (method, target) = (parsed.method?, parsed.path?);
                let path = target.split_once('?').map_or(target, |(path, _)| path);
                // The absolute form, which a server has to accept (RFC 9112, 3.2.2).
                let path = path.strip_prefix("http://").map_or(path, |rest| {
                    rest.find('/').and_then(|slash| rest.get(slash..)).unwrap_or("/")
                });
                return Some(match method {
                    "GET" => self.resource(path).to_http(true),
                    "HEAD" => self.resource(path).to_http(false),
                    _ => Reply::plain("405 Method Not Allowed").to_http(true),
                });
            }
            Ok(Status::Partial) if request.len() <= MAX_REQUEST => return None,
            Ok(_) | Err(Error::TooManyHeaders) => "431 Request Header Fields Too Large",
            Err(_) => "400 Bad Request",
        };
        Some(Reply::plain(fault).to_http(true))
    }

    fn resource(&self, path: &str) -> Reply {
        match path {
            "/metrics" => match self.monitor.metrics() {
                Ok(body) => Reply { status: "200 OK", media_type: MEDIA_TYPE, body },
                Err(error) => {
                    Reply::text("500 Internal Server Error", io::Error::other(error).to_string())
                }
            },
            "/healthz" => match self.monitor.troubles().as_slice() {
                [] => Reply::text("200 OK", "ok\n".to_owned()),
                troubles => Reply::text("503 Service Unavailable", troubles.join("\n") + "\n"),
            },
            _ => Reply::text("404 Not Found", "expected /metrics or /healthz\n".to_owned()),
        }
    }
}

impl Service for MetricsService {
    async fn serve(&self, connection: &mut Connection<LazySocket>) -> Result<(), ServeError> {
        self.answer(connection).await
    }

    fn is_monitoring(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply(request: &[u8]) -> Option<String> {
        MetricsService::new(Arc::default()).reply(request)
    }

    fn status(request: &str) -> String {
        reply(request.as_bytes()).unwrap().lines().next().unwrap().to_owned()
    }

    #[test]
    fn a_resource_is_told_and_anything_else_is_a_plain_error() {
        assert_eq!(status("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(status("GET /healthz?full=1 HTTP/1.0\n\n"), "HTTP/1.1 200 OK");
        assert_eq!(status("GET http://x:1/healthz HTTP/1.1\r\n\r\n"), "HTTP/1.1 200 OK");
        assert_eq!(status("GET http://x HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
        assert_eq!(status("GET / HTTP/1.1\r\n\r\n"), "HTTP/1.1 404 Not Found");
        assert_eq!(status("POST /metrics HTTP/1.1\r\n\r\n"), "HTTP/1.1 405 Method Not Allowed");
        assert_eq!(status("hello there\r\n"), "HTTP/1.1 400 Bad Request");
        assert_eq!(status("GET /metrics\r\n\r\n"), "HTTP/1.1 400 Bad Request");
    }

    #[test]
    fn a_head_is_told_the_length_and_no_body() {
        let (head, body) = ("HEAD /healthz HTTP/1.1\r\n\r\n", "GET /healthz HTTP/1.1\r\n\r\n");
        let (head, body) = (reply(head.as_bytes()).unwrap(), reply(body.as_bytes()).unwrap());
        assert_eq!(body, format!("{head}ok\n"));
        assert!(head.contains("\r\nContent-Length: 3\r\n"));
    }

    #[test]
    fn a_part_of_a_request_is_waited_for_and_too_much_of_one_is_not() {
        let request = b"GET /metrics HTTP/1.1\r\nHost: localhost:9467\r\n\r\n";
        for end in 0..request.len() {
            assert_eq!(reply(&request[..end]), None, "{end}");
        }
        let too_large = "431 Request Header Fields Too Large";
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(MAX_REQUEST));
        assert!(status(&long).ends_with(too_large));
        let many = "A: b\r\n".repeat(MAX_HEADERS + 1);
        assert!(status(&format!("GET / HTTP/1.1\r\n{many}\r\n")).ends_with(too_large));
    }

    proptest! {
        #[test]
        fn whatever_is_sent_gets_a_whole_reply_or_is_waited_for(
            request in prop::collection::vec(any::<u8>(), 0..2_000),
        ) {
            if let Some(reply) = reply(&request) {
                let length = reply.split_once("Content-Length: ").unwrap().1.lines().next().unwrap();
                let body = reply.split_once("\r\n\r\n").unwrap().1;
                prop_assert!(reply.starts_with("HTTP/1.1 ") && body.len() == length.parse::<usize>().unwrap());
            }
        }
    }
}
