//! The metrics service: `GET /metrics` and `GET /healthz` over HTTP/1.1.
//!
//! Answers one request per connection, then closes it (RFC 9112, section 9.6), which is enough for
//! Prometheus. Timeouts and connection limits are those of every service.

use std::io;
use std::sync::Arc;

use bytes::BytesMut;
use httparse::{EMPTY_HEADER, Error, Request, Status};

use crate::net::connection::{Connection, ServeError, Stream};
use crate::net::service::Service;
use crate::net::stream::LazySocket;
use crate::telemetry::metrics::{MEDIA_TYPE, Monitor};

/// Maximum length of the request line and the header fields, in bytes.
const MAX_REQUEST: usize = 16 << 10;

/// Maximum number of header fields.
const MAX_HEADERS: usize = 64;

const PLAIN_TEXT: &str = "text/plain; charset=utf-8";

/// A running metrics service.
#[derive(Debug)]
pub struct MetricsService {
    monitor: Arc<Monitor>,
}

struct Reply {
    status: &'static str,
    media_type: &'static str,
    body: String,
}

impl Reply {
    fn text(status: &'static str, body: String) -> Self {
        Self { status, media_type: PLAIN_TEXT, body }
    }

    /// Creates a reply whose body is its status.
    fn status_only(status: &'static str) -> Self {
        Self::text(status, format!("{status}\n"))
    }

    fn to_http(&self, with_body: bool) -> String {
        let Self { status, media_type, body } = self;
        let length = body.len();
        let body = if with_body { body } else { "" };
        // `Allow` is required with 405 (RFC 9110, section 15.5.6) and correct for every reply.
        format!(
            "HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {length}\r\n\
             Allow: GET, HEAD\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n{body}"
        )
    }
}

impl MetricsService {
    /// Creates a service that reports the state of `monitor`.
    pub fn new(monitor: Arc<Monitor>) -> Self {
        Self { monitor }
    }

    /// Answers one request.
    ///
    /// # Errors
    /// If the connection fails or times out.
    pub async fn answer<S: Stream>(
        &self,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let mut request = BytesMut::new();
        let reply = loop {
            if connection.receive(&mut request).await? == 0 {
                // An incomplete request gets no reply.
                return Ok(());
            }
            if let Some(reply) = self.reply(&request) {
                break reply;
            }
        };
        connection.send_part(reply.as_bytes()).await
    }

    /// Returns the reply to a complete or faulty request; `None` if more of it is needed.
    fn reply(&self, request: &[u8]) -> Option<String> {
        let mut headers = [EMPTY_HEADER; MAX_HEADERS];
        let mut parsed = Request::new(&mut headers);
        let fault = match parsed.parse(request) {
            Ok(Status::Complete(length)) if length <= MAX_REQUEST => {
                let (method, target) = (parsed.method?, parsed.path?);
                let path = target.split_once('?').map_or(target, |(path, _)| path);
                // Servers must accept the absolute form (RFC 9112, section 3.2.2).
                let path = path.strip_prefix("http://").map_or(path, |rest| {
                    rest.find('/').and_then(|slash| rest.get(slash..)).unwrap_or("/")
                });
                return Some(match method {
                    "GET" => self.resource(path).to_http(true),
                    "HEAD" => self.resource(path).to_http(false),
                    _ => Reply::status_only("405 Method Not Allowed").to_http(true),
                });
            }
            Ok(Status::Partial) if request.len() <= MAX_REQUEST => return None,
            Ok(_) | Err(Error::TooManyHeaders) => "431 Request Header Fields Too Large",
            Err(_) => "400 Bad Request",
        };
        Some(Reply::status_only(fault).to_http(true))
    }

    fn resource(&self, path: &str) -> Reply {
        match path {
            "/metrics" => match self.monitor.metrics() {
                Ok(body) => Reply { status: "200 OK", media_type: MEDIA_TYPE, body },
                Err(error) => {
                    Reply::text("500 Internal Server Error", io::Error::other(error).to_string())
                }
            },
            "/healthz" => match self.monitor.problems().as_slice() {
                [] => Reply::text("200 OK", "ok\n".to_owned()),
                problems => Reply::text("503 Service Unavailable", problems.join("\n") + "\n"),
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
    fn serves_its_resources_and_answers_other_requests_with_errors() {
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
    fn answers_head_with_the_length_and_no_body() {
        let (head, body) = ("HEAD /healthz HTTP/1.1\r\n\r\n", "GET /healthz HTTP/1.1\r\n\r\n");
        let (head, body) = (reply(head.as_bytes()).unwrap(), reply(body.as_bytes()).unwrap());
        assert_eq!(body, format!("{head}ok\n"));
        assert!(head.contains("\r\nContent-Length: 3\r\n"));
    }

    #[test]
    fn waits_for_incomplete_requests_up_to_the_limits() {
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
        fn answers_any_input_completely_or_waits_for_more(
            request in prop::collection::vec(any::<u8>(), 0..2_000),
        ) {
            if let Some(reply) = reply(&request) {
                let (head, body) = reply.split_once("\r\n\r\n").unwrap();
                let length = head.split_once("Content-Length: ").unwrap().1.lines().next();
                prop_assert!(head.starts_with("HTTP/1.1 "));
                prop_assert_eq!(body.len(), length.unwrap().parse::<usize>().unwrap());
            }
        }
    }
}
