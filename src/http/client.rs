//! The HTTP client: it asks only whom it may, follows redirects by itself, and is not kept waiting.
//!
//! HTTP/1.1 only. What was checked is what is connected to: names are looked up here, and the
//! addresses that were looked at are those that are used.

use std::collections::HashSet;
use std::error::Error as _;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::{HeaderMap, HeaderValue, LOCATION, TRANSFER_ENCODING, USER_AGENT};
use reqwest::{Body, Method, Proxy, Request, Response, StatusCode, Url};
use rustls::ClientConfig;
use tokio::time::timeout;

use crate::http::egress;
use crate::http::egress::{Reach, Refused};
use crate::http::tls_error::{TlsError, TlsErrorKind};
use crate::net::idle_timer::timeout_while_running;

/// How many redirects are followed.
const MAX_REDIRECTS: usize = 5;

/// The largest number of header fields in a reply, as in curl. hyper bounds their size (408 KiB).
const MAX_HEADERS: usize = 5000;

/// The largest body that is read only so that its connection can be used again.
const MAX_DRAINED: usize = 16 << 10;

/// How long that may take.
const MAX_DRAINING: Duration = Duration::from_secs(1);

/// How long a connection is kept that nobody uses.
const KEEP_IDLE: Duration = Duration::from_secs(30);

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BuildError {
    /// The proxy's URL is none.
    #[error("the proxy's URL cannot be used")]
    Proxy,
    /// Something else, which is not expected.
    #[error("the HTTP client cannot be made: {0}")]
    Other(String),
}

/// Why there is no reply, or no end of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It may not be asked.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// A redirect that leads nowhere.
    #[error("it is redirected, but nowhere (no Location)")]
    Nowhere,
    /// One redirect after the other.
    #[error("it is redirected more than {MAX_REDIRECTS} times")]
    Redirects,
    /// Nothing came for too long.
    #[error("nothing came for {0:?}")]
    Silent(Duration),
    /// The server's name stands for no address.
    #[error("cannot look up {host}: {cause}")]
    Lookup {
        /// The name.
        host: String,
        /// Why.
        cause: String,
    },
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(String),
    /// No encrypted connection.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The server's reply violates HTTP.
    #[error("the server's reply is malformed: {0}")]
    Malformed(String),
    /// The connection ended or failed before the end of the reply.
    #[error("the connection failed: {0}")]
    Network(String),
}

impl Error {
    /// Whether it may be better a little later.
    pub(crate) fn is_temporary(&self) -> bool {
        match self {
            Self::Refused(_) | Self::Nowhere | Self::Redirects | Self::Malformed(_) => false,
            Self::Tls(error) => error.kind == TlsErrorKind::Transient,
            Self::Silent(_) | Self::Lookup { .. } | Self::Connect(_) | Self::Network(_) => true,
        }
    }

    /// What reqwest says, without the URL, which it would repeat with its query.
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
        let innermost = innermost.unwrap_or_else(|| "of an unknown cause".to_owned());
        if error.is_connect() { Self::Connect(innermost) } else { Self::Network(innermost) }
    }
}

/// How a client asks.
#[derive(Debug)]
pub(crate) struct Options {
    /// How servers are verified.
    pub tls: ClientConfig,
    /// Whom it asks to ask.
    pub proxy: Option<Url>,
    /// What it says besides, to the origins of `sources` only.
    pub headers: HeaderMap,
    /// The URLs that the operator has named.
    pub sources: Vec<Url>,
    /// How long a server may be silent; without it, whoever asks bounds the whole.
    pub timeout: Option<Duration>,
    /// How many connections may be kept.
    pub connections: usize,
}

/// Asks servers.
#[derive(Debug)]
pub(crate) struct Client {
    inner: reqwest::Client,
    /// Never reuses a connection.
    unpooled: reqwest::Client,
    /// Origins that have replied, so that a request to them may use an open connection.
    replied: Mutex<HashSet<url_origin::Origin>>,
    reach: Arc<Reach>,
    headers: HeaderMap,
    sources: Vec<url_origin::Origin>,
    timeout: Option<Duration>,
}

impl Client {
    /// One that asks whom `reach` permits.
    ///
    /// # Errors
    /// If the proxy cannot be used.
    pub(crate) fn new(options: Options, reach: Arc<Reach>) -> Result<Self, BuildError> {
        let Options { tls, proxy, headers, sources, timeout, connections } = options;
        let resolver = Resolver {
            reach: Arc::clone(&reach),
            // The operator has named it, and what it may ask is its own affair.
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
                // The environment does not say whom we ask.
                .no_proxy()
                .pool_idle_timeout(KEEP_IDLE)
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
        let sources = sources.iter().map(url_origin::of).collect();
        let replied = Mutex::default();
        Ok(Self { inner, unpooled, replied, reach, headers, sources, timeout })
    }

    /// Asks for `url`, follows redirects, and returns the head of the reply, whatever its status
    /// is. Whoever they lead to is told `headers`, too.
    ///
    /// # Errors
    /// If it may not be asked, cannot be reached, or does not answer.
    pub(crate) async fn get(&self, url: &Url, headers: &HeaderMap) -> Result<Response, Error> {
        let mut url = url.clone();
        self.reach.may_ask(&url)?;
        for _ in 0..=MAX_REDIRECTS {
            let mut response = self.ask(Method::GET, &url, headers, None).await?;
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).map(location);
            let location = location.filter(|location| !location.trim().is_empty());
            url = self.reach.next_hop(&url, &location.ok_or(Error::Nowhere)?)?;
            self.drain(&mut response).await;
        }
        Err(Error::Redirects)
    }

    /// Asks for `url`, and returns the head of the reply, whatever its status is. A redirect is not
    /// followed: what is said is meant for this URL.
    ///
    /// # Errors
    /// If it may not be asked, cannot be reached, or does not answer.
    pub(crate) async fn get_here(&self, url: &Url, headers: &HeaderMap) -> Result<Response, Error> {
        self.reach.may_ask(url)?;
        self.ask(Method::GET, url, headers, None).await
    }

    /// Sends `body` to `url`, and returns the head of the reply, whatever its status is. A redirect
    /// is not followed: what is sent is meant for this URL.
    ///
    /// # Errors
    /// If it may not be asked, cannot be reached, or does not answer.
    pub(crate) async fn post(
        &self,
        url: &Url,
        headers: &HeaderMap,
        body: impl Into<Body>,
    ) -> Result<Response, Error> {
        self.reach.may_ask(url)?;
        self.ask(Method::POST, url, headers, Some(body.into())).await
    }

    async fn ask(
        &self,
        method: Method,
        url: &Url,
        headers: &HeaderMap,
        body: Option<Body>,
    ) -> Result<Response, Error> {
        let mut request = Request::new(method, url.clone());
        *request.body_mut() = body;
        let said = request.headers_mut();
        let agent = concat!("handout/", env!("CARGO_PKG_VERSION"));
        said.insert(USER_AGENT, HeaderValue::from_static(agent));
        let origin = url_origin::of(url);
        if self.sources.contains(&origin) {
            said.extend(self.headers.clone());
        }
        said.extend(headers.clone());
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
        let response = self.unless_silent(&egress::host_of(url), executed).await?;
        if !has_replied {
            self.replied.lock().insert(origin);
        }
        check_transfer_codings(response.headers())?;
        Ok(response)
    }

    /// What comes of `reply`, if it comes in time.
    async fn unless_silent<T>(
        &self,
        host: &str,
        reply: impl Future<Output = reqwest::Result<T>>,
    ) -> Result<T, Error> {
        let replied = match self.timeout {
            None => reply.await,
            Some(silence) => {
                let replied = timeout_while_running(silence, reply).await;
                replied.ok_or(Error::Silent(silence))?
            }
        };
        replied.map_err(|error| Error::of(&error, host))
    }

    /// Reads a small body of which nothing is wanted, so that its connection can be used again.
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
        // One that comes slowly is not worth the wait.
        let _ = timeout(MAX_DRAINING, drain).await;
    }

    /// The next piece of a body; `None` at its end.
    ///
    /// # Errors
    /// If it does not come, or the body ends before its end.
    pub(crate) async fn piece(
        &self,
        response: &mut Response,
    ) -> Result<Option<bytes::Bytes>, Error> {
        let host = egress::host_of(response.url());
        self.unless_silent(&host, response.chunk()).await
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

/// Checks that the body can be taken out of its transfer codings (RFC 9112, 6.1): hyper leaves all in
/// place but a `chunked` that is named last.
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
    Err(Error::Malformed("it has a transfer coding that is not supported".to_owned()))
}

/// A `Location` as a reference: what is not ASCII is percent-encoded byte by byte, in whatever
/// encoding it is, as curl does. The rest, such as spaces, is the URL parser's.
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

/// Scheme, host and port: what a secret is meant for.
mod url_origin {
    use reqwest::Url;

    pub(crate) type Origin = (String, String, Option<u16>);

    pub(crate) fn of(url: &Url) -> Origin {
        (url.scheme().to_owned(), crate::http::egress::host_of(url), url.port_or_known_default())
    }
}

/// Looks names up, and at what is found.
#[derive(Debug, Clone)]
struct Resolver {
    reach: Arc<Reach>,
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
        let Self { reach, proxy } = self.clone();
        Box::pin(async move {
            let host = name.as_str();
            let error = |cause| LookupError { host: host.to_owned(), cause };
            let found = tokio::net::lookup_host((host, 0)).await.map_err(error)?;
            let found: Vec<SocketAddr> = found.collect();
            if found.is_empty() {
                return Err(error(io::Error::other("it has no address")).into());
            }
            if proxy.as_deref() != Some(host) {
                let addresses: Vec<IpAddr> = found.iter().map(SocketAddr::ip).collect();
                reach.may_connect(host, addresses)?;
            }
            let found: Addrs = Box::new(found.into_iter());
            Ok(found)
        })
    }
}
