//! An HTTP/1.1 client that enforces the egress policy, follows redirects itself and limits silence.
//!
//! The client resolves names itself and connects only to the addresses that the policy checked.

use std::collections::HashSet;
use std::error::Error as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{HeaderMap, HeaderValue, LOCATION, TRANSFER_ENCODING, USER_AGENT};
use reqwest::{Body, Method, Proxy, Request, Response, StatusCode, Url};
use rustls::ClientConfig;
use tokio::time::timeout;

use crate::http::egress;
use crate::http::egress::{EgressPolicy, Refused};
use crate::http::tls_error::{TlsError, TlsErrorKind};
use crate::net::idle_timer::timeout_while_running;

const MAX_REDIRECTS: usize = 5;

/// Maximum number of header fields of a reply, as in curl. hyper limits their size (408 KiB).
const MAX_HEADERS: usize = 5000;

/// Maximum bytes of an unused body that are read to reuse its connection.
const MAX_DRAINED: usize = 16 << 10;

/// Maximum duration of that read.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Lifetime of an idle connection.
const POOL_IDLE_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    #[error("cannot use the URL of the proxy")]
    Proxy,
    #[error("cannot create the HTTP client: {0}")]
    Other(String),
}

/// The reason why a request has no complete reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error("the server sent a redirect without a Location")]
    MissingLocation,
    #[error("more than {MAX_REDIRECTS} redirects")]
    TooManyRedirects,
    #[error("the server sent nothing for {0:?}")]
    IdleTimedOut(Duration),
    #[error("cannot look up {host}: {cause}")]
    Lookup { host: String, cause: String },
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the server's reply is malformed: {0}")]
    Malformed(String),
    #[error("the connection failed: {0}")]
    Network(String),
}

impl Error {
    pub(crate) fn is_temporary(&self) -> bool {
        match self {
            Self::Refused(_)
            | Self::MissingLocation
            | Self::TooManyRedirects
            | Self::Malformed(_) => false,
            Self::Tls(error) => error.kind == TlsErrorKind::Transient,
            Self::IdleTimedOut(_) | Self::Lookup { .. } | Self::Connect(_) | Self::Network(_) => {
                true
            }
        }
    }

    /// Converts an error without the URL that reqwest adds, because its query may hold secrets.
    fn of(error: &reqwest::Error, host: &str) -> Self {
        let mut innermost = None;
        let mut cause = error.source();
        while let Some(error) = cause {
            if let Some(refused) = error.downcast_ref::<Refused>() {
                return Self::Refused(refused.clone());
            }
            if let Some(LookupError { host, cause }) = error.downcast_ref() {
                return Self::Lookup { host: host.clone(), cause: cause.to_string() };
            }
            if let Some(io) = error.downcast_ref::<io::Error>() {
                if let Some(error) = TlsError::of_io(io, host) {
                    return Self::Tls(error);
                }
                // hyper reports faults of a chunked body as these.
                if matches!(io.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::InvalidData) {
                    return Self::Malformed(io.to_string());
                }
            }
            if let Some(error) = error.downcast_ref::<hyper::Error>()
                && error.is_parse()
            {
                return Self::Malformed(error.to_string());
            }
            innermost = Some(error.to_string());
            cause = error.source();
        }
        let innermost = innermost.unwrap_or_else(|| "unknown cause".to_owned());
        if error.is_connect() { Self::Connect(innermost) } else { Self::Network(innermost) }
    }
}

#[derive(Debug)]
pub(crate) struct Options {
    pub tls: ClientConfig,
    pub proxy: Option<Url>,
    /// Sent to the origins of `sources` only.
    pub headers: HeaderMap,
    pub sources: Vec<Url>,
    /// Maximum silence of a server; without it, the caller limits the whole request.
    pub timeout: Option<Duration>,
    /// Maximum number of idle connections per host.
    pub connections: usize,
}

#[derive(Debug)]
pub(crate) struct Client {
    inner: reqwest::Client,
    /// Never reuses a connection.
    unpooled: reqwest::Client,
    /// Origins that have replied, so that a request to them may use an open connection.
    replied: Mutex<HashSet<Origin>>,
    egress_policy: Arc<EgressPolicy>,
    headers: HeaderMap,
    sources: Vec<Origin>,
    timeout: Option<Duration>,
}

impl Client {
    pub(crate) fn new(
        options: Options,
        egress_policy: Arc<EgressPolicy>,
    ) -> Result<Self, BuildError> {
        let Options { tls, proxy, headers, sources, timeout, connections } = options;
        let resolver = Resolver {
            egress_policy: Arc::clone(&egress_policy),
            // The operator chose the proxy, so it may have any address.
            proxy: proxy.as_ref().map(egress::host_of),
        };
        let proxy = proxy.map(Proxy::all).transpose().map_err(|_| BuildError::Proxy)?;
        let build = |max_idle| {
            let mut builder = reqwest::Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .retry(reqwest::retry::never())
                .referer(false)
                .http1_only()
                .http1_allow_obsolete_multiline_headers_in_responses(true)
                .http1_allow_spaces_after_header_name_in_responses(true)
                .http1_max_headers(MAX_HEADERS)
                .tls_backend_preconfigured(tls.clone())
                // Ignore proxies of the environment.
                .no_proxy()
                .pool_idle_timeout(POOL_IDLE_TIMEOUT)
                .pool_max_idle_per_host(max_idle)
                .dns_resolver(resolver.clone());
            if let Some(timeout) = timeout {
                builder = builder.connect_timeout(timeout);
            }
            if let Some(proxy) = &proxy {
                builder = builder.proxy(proxy.clone());
            }
            let client = builder.build();
            client.map_err(|error| BuildError::Other(crate::text::error_chain(&error)))
        };
        let (inner, unpooled) = (build(connections)?, build(0)?);
        let sources = sources.iter().map(origin_of).collect();
        let replied = Mutex::default();
        Ok(Self { inner, unpooled, replied, egress_policy, headers, sources, timeout })
    }

    /// Returns the head of the reply after redirects, with any status. `headers` are sent to the
    /// targets of redirects, too.
    pub(crate) async fn get(&self, url: &Url, headers: &HeaderMap) -> Result<Response, Error> {
        let mut url = url.clone();
        self.egress_policy.check_url(&url)?;
        for _ in 0..=MAX_REDIRECTS {
            let mut response = self.send(Method::GET, &url, headers, None).await?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).map(location);
            let location = location.filter(|location| !location.trim().is_empty());
            let location = location.ok_or(Error::MissingLocation)?;
            url = self.egress_policy.check_redirect(&url, &location)?;
            self.drain(&mut response).await;
        }
        Err(Error::TooManyRedirects)
    }

    /// Like [`Client::get`], but returns redirects: `headers` are meant for this URL only.
    pub(crate) async fn get_here(&self, url: &Url, headers: &HeaderMap) -> Result<Response, Error> {
        self.egress_policy.check_url(url)?;
        self.send(Method::GET, url, headers, None).await
    }

    /// Returns the head of the reply with any status. Follows no redirect: `body` is meant for this
    /// URL only.
    pub(crate) async fn post(
        &self,
        url: &Url,
        headers: &HeaderMap,
        body: impl Into<Body>,
    ) -> Result<Response, Error> {
        self.egress_policy.check_url(url)?;
        self.send(Method::POST, url, headers, Some(body.into())).await
    }

    async fn send(
        &self,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        body: Option<Body>,
    ) -> Result<Response, Error> {
        let mut request = Request::new(method, url.clone());
        *request.body_mut() = body;
        let request_headers = request.headers_mut();
        let agent = concat!("handout/", env!("CARGO_PKG_VERSION"));
        request_headers.insert(USER_AGENT, HeaderValue::from_static(agent));
        let origin = origin_of(url);
        if self.sources.contains(&origin) {
            request_headers.extend(self.headers.clone());
        }
        request_headers.extend(headers.clone());
        let has_replied = self.replied.lock().contains(&origin);
        let repeated = request.try_clone().filter(|_| has_replied && request.method().is_safe());
        let executed = async {
            match (self.inner.execute(request).await, repeated) {
                // The server closed an idle connection at the same time (RFC 9112, 9.3.1).
                (Err(error), Some(repeated)) if is_closed_without_reply(&error) => {
                    self.unpooled.execute(repeated).await
                }
                (result, _) => result,
            }
        };
        let response = self.with_silence_limit(&egress::host_of(url), executed).await?;
        if !has_replied {
            self.replied.lock().insert(origin);
        }
        check_transfer_codings(response.headers())?;
        Ok(response)
    }

    async fn with_silence_limit<T>(
        &self,
        host: &str,
        reply: impl Future<Output = reqwest::Result<T>>,
    ) -> Result<T, Error> {
        let replied = match self.timeout {
            None => reply.await,
            Some(silence) => {
                let replied = timeout_while_running(silence, pin!(reply)).await;
                replied.ok_or(Error::IdleTimedOut(silence))?
            }
        };
        replied.map_err(|error| Error::of(&error, host))
    }

    /// Discards a small body to make its connection reusable.
    pub(crate) async fn drain(&self, response: &mut Response) {
        let drain = async {
            let mut left = MAX_DRAINED;
            while let Ok(Some(piece)) = response.chunk().await {
                match left.checked_sub(piece.len()) {
                    Some(less) => left = less,
                    None => break,
                }
            }
        };
        let _ = timeout(DRAIN_TIMEOUT, drain).await;
    }

    /// Returns the next part of a body, `None` at its end.
    pub(crate) async fn piece(
        &self,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, Error> {
        let host = egress::host_of(response.url());
        self.with_silence_limit(&host, response.chunk()).await
    }
}

/// Whether an open connection ended before the head of the reply.
fn is_closed_without_reply(error: &reqwest::Error) -> bool {
    let mut cause = error.source().filter(|_| !error.is_connect());
    while let Some(error) = cause {
        if error.downcast_ref().is_some_and(hyper::Error::is_incomplete_message)
            || error.downcast_ref().is_some_and(|error: &io::Error| {
                matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe)
            })
        {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Refuses transfer codings (RFC 9112, 6.1) that hyper does not decode: all but a final `chunked`.
fn check_transfer_codings(headers: &HeaderMap) -> Result<(), Error> {
    let lists = headers.get_all(TRANSFER_ENCODING).iter();
    let codings = lists.flat_map(|list| list.as_bytes().split(|byte| *byte == b','));
    let codings: Vec<_> = codings.map(|coding| coding.trim_ascii().to_ascii_lowercase()).collect();
    let is_known = |coding: &Vec<u8>| matches!(&**coding, b"" | b"identity" | b"chunked");
    let chunked = codings.iter().rposition(|coding| coding == b"chunked");
    let is_last = chunked.is_none_or(|chunked| chunked + 1 == codings.len());
    if is_last && codings.iter().all(is_known) {
        return Ok(());
    }
    Err(Error::Malformed("unsupported transfer coding".to_owned()))
}

/// Percent-encodes the bytes of a `Location` outside ASCII, as curl does.
fn location(value: &HeaderValue) -> String {
    value.as_bytes().iter().fold(String::new(), |mut location, &byte| {
        if byte.is_ascii() {
            location.push(byte.into());
        } else {
            location.push_str(percent_encoding::percent_encode_byte(byte));
        }
        location
    })
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// Scheme, host and port: the scope of a secret.
type Origin = (String, String, Option<u16>);

/// Returns the origin. Unlike [`Url::origin`], ignores the final dot of a host.
fn origin_of(url: &Url) -> Origin {
    (url.scheme().to_owned(), egress::host_of(url), url.port_or_known_default())
}

/// Resolves names and checks the addresses against the policy.
#[derive(Debug, Clone)]
struct Resolver {
    egress_policy: Arc<EgressPolicy>,
    proxy: Option<String>,
}

#[derive(Debug, thiserror::Error)]
#[error("cannot look up {host}")]
struct LookupError {
    host: String,
    #[source]
    cause: io::Error,
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let Self { egress_policy, proxy } = self.clone();
        Box::pin(async move {
            let host = name.as_str();
            let error = |cause| LookupError { host: host.to_owned(), cause };
            let found = tokio::net::lookup_host((host, 0)).await.map_err(error)?;
            let found: Vec<SocketAddr> = found.collect();
            if found.is_empty() {
                return Err(error(io::Error::other("no address")).into());
            }
            if proxy.as_deref() != Some(host) {
                let addresses: Vec<IpAddr> = found.iter().map(SocketAddr::ip).collect();
                egress_policy.check_addresses(host, addresses)?;
            }
            let found: Addrs = Box::new(found.into_iter());
            Ok(found)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_encodes_locations_outside_ascii() {
        let encoded = |bytes: &[u8]| location(&HeaderValue::from_bytes(bytes).unwrap());
        assert_eq!(encoded(b"/a b?c=%20"), "/a b?c=%20");
        assert_eq!(encoded("/ü".as_bytes()), "/%C3%BC");
        assert_eq!(encoded(b"/\xfc"), "/%FC");
    }

    #[test]
    fn accepts_only_a_final_chunked_coding() {
        let check = |values: &[&'static str]| {
            let headers = values.iter().map(|value| (TRANSFER_ENCODING, value.parse().unwrap()));
            check_transfer_codings(&headers.collect()).is_ok()
        };
        assert!(check(&[]));
        assert!(check(&["Chunked"]));
        assert!(check(&["identity", "chunked"]));
        assert!(!check(&["chunked, identity"]));
        assert!(!check(&["gzip, chunked"]));
    }

    #[test]
    fn distinguishes_origins_by_scheme_host_and_port() {
        let origin = |text: &str| origin_of(&text.parse().unwrap());
        assert_eq!(origin("https://Example.org./a"), origin("https://example.org:443/b"));
        assert_ne!(origin("https://example.org/"), origin("http://example.org/"));
        assert_ne!(origin("https://example.org/"), origin("https://example.org:8443/"));
    }
}
