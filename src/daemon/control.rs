//! The control socket: reload requests, and their outcome for the clients that wait for it.
//!
//! Protocol: the client connects to a Unix socket and sends one line, `reload`. The daemon answers
//! with one line, a [`Reply`] in JSON, when the reload has ended, and closes. Requests that are
//! pending at the same time share one reload, which begins after the last of them.
//!
//! The socket is for its owner and root: its mode is 0600, and the credentials of each client are
//! checked (`SO_PEERCRED` in unix(7)), because a mode alone does not hold while the file is created.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::geteuid;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::{sleep, timeout};

use crate::fs::filename::escape;
use crate::net::sockets::{SocketFile, bind_unix};

/// The folder of the control socket, unless `RUNTIME_DIRECTORY` names another.
const DEFAULT_DIR: &str = "/run/handout";

/// The request for a reload.
const RELOAD: &str = "reload";

/// Maximum length of a request, in bytes.
const MAX_REQUEST: u64 = 64;

/// Maximum length of the faults in a reply, in bytes. JSON may take six bytes for one.
const MAX_FAULTS: usize = 1 << 20;

/// Maximum length of a reply, in bytes.
const MAX_REPLY: u64 = 8 << 20;

/// Maximum number of clients that are served at the same time; more wait in the accept queue.
const MAX_CLIENTS: usize = 16;

/// Reload requests that wait for the daemon; more than there can be clients, so that a client waits
/// only if signals fill the queue.
const MAX_REQUESTS: usize = 2 * MAX_CLIENTS;

/// Time for a client to send its request, and to take the reply.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a failed accept, as when descriptors have run out.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// The new configuration is in force.
    Reloaded {
        /// Summary of the changes, in one line.
        summary: String,
    },
    /// The daemon rejected the configuration and keeps the old one.
    Rejected {
        /// Every fault, one line each.
        faults: Vec<String>,
    },
    /// No reload was carried out.
    Refused {
        /// The reason.
        reason: String,
    },
}

impl Reply {
    /// A rejection with the faults in the lines of `text`, cut at the maximum length of a reply.
    pub(crate) fn rejected(text: &str) -> Self {
        let fitting = text.get(..text.floor_char_boundary(MAX_FAULTS)).unwrap_or(text);
        let mut faults: Vec<_> = fitting.lines().map(str::to_owned).collect();
        if fitting.len() < text.len() {
            faults.push("and more, which the daemon has logged".to_owned());
        }
        Self::Rejected { faults }
    }
}

/// A request that waits for a reload; `None` for a signal, which gets no reply.
type Request = Option<oneshot::Sender<Reply>>;

/// Hands reload requests to the daemon.
#[derive(Debug, Clone)]
pub(crate) struct ReloadSender(mpsc::Sender<Request>);

/// Reload requests, as the daemon takes them.
#[derive(Debug)]
pub(crate) struct ReloadQueue(mpsc::Receiver<Request>);

/// Creates the queue of reload requests.
pub(crate) fn reload_queue() -> (ReloadSender, ReloadQueue) {
    let (sender, receiver) = mpsc::channel(MAX_REQUESTS);
    (ReloadSender(sender), ReloadQueue(receiver))
}

impl ReloadSender {
    /// Requests a reload without waiting for it.
    pub(crate) fn notify(&self) {
        // If the queue is full, a reload is about to begin.
        let _ = self.0.try_send(None);
    }

    async fn reload(&self) -> Reply {
        let (sender, outcome) = oneshot::channel();
        let stopping = || Reply::Refused { reason: "the daemon is stopping".to_owned() };
        match self.0.send(Some(sender)).await {
            Ok(()) => outcome.await.unwrap_or_else(|_| stopping()),
            Err(_) => stopping(),
        }
    }
}

impl ReloadQueue {
    /// Waits for requests, and takes all that one reload can serve. `None` if there can be none any
    /// more.
    pub(crate) async fn next(&mut self) -> Option<Waiting> {
        let mut waiting = Waiting(self.0.recv().await?.into_iter().collect());
        while let Ok(request) = self.0.try_recv() {
            waiting.0.extend(request);
        }
        Some(waiting)
    }
}

/// Clients that wait for the outcome of one reload. Dropped unanswered, they learn that the daemon is
/// stopping.
#[derive(Debug)]
pub(crate) struct Waiting(Vec<oneshot::Sender<Reply>>);

impl Waiting {
    /// Sends the outcome to all.
    pub(crate) fn answer(self, reply: &Reply) {
        for client in self.0 {
            // Fails only if the client has disconnected.
            let _ = client.send(reply.clone());
        }
    }
}

/// Path of the control socket if no argument names it: in the service manager's runtime directory, of
/// which `RUNTIME_DIRECTORY` lists one or several (systemd.exec(5)).
pub(crate) fn default_path() -> PathBuf {
    let dirs = env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let dir = env::split_paths(&dirs).find(|dir| dir.is_absolute());
    dir.unwrap_or_else(|| DEFAULT_DIR.into()).join("control")
}

/// A bound control socket. Its file is removed when it is dropped.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    _file: SocketFile,
}

impl ControlSocket {
    /// Binds the socket at `path`, or at the default path if there is none. An unusable default path
    /// is no error: without a service manager, the folder may not exist or belong to another daemon.
    ///
    /// # Errors
    /// If `path` cannot be bound.
    pub(crate) fn open(path: Option<&Path>) -> io::Result<Option<Self>> {
        if let Some(path) = path {
            return Self::bind(path).map(Some);
        }
        let path = default_path();
        Ok(Self::bind(&path)
            .inspect_err(|error| {
                let path = path.display();
                if env::var_os("RUNTIME_DIRECTORY").is_some() {
                    tracing::warn!(
                        cause = %error,
                        "cannot open the control socket {path}: {error}: `handout reload` will not \
                         work, SIGHUP will"
                    );
                } else {
                    tracing::debug!(cause = %error, "no control socket: {path}: {error}");
                }
            })
            .ok())
    }

    fn bind(path: &Path) -> io::Result<Self> {
        let (listener, file) = bind_unix(path, 0o600)?;
        Ok(Self { listener: UnixListener::from_std(listener)?, _file: file })
    }

    /// Serves clients until the future is dropped; accepted clients still get their reply.
    pub(crate) async fn serve(self, reloads: ReloadSender) {
        let permits = Arc::new(Semaphore::new(MAX_CLIENTS));
        // The semaphore is never closed.
        while let Ok(permit) = Arc::clone(&permits).acquire_owned().await {
            match self.listener.accept().await {
                Ok((client, _)) => {
                    let reloads = reloads.clone();
                    tokio::spawn(async move {
                        serve_client(client, &reloads).await;
                        drop(permit);
                    });
                }
                Err(error) => {
                    tracing::debug!(cause = %error, "control socket: cannot accept: {error}");
                    sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }
}

async fn serve_client(mut client: UnixStream, reloads: &ReloadSender) {
    let reply = match read_request(&mut client).await {
        Ok(request) if request == RELOAD => reloads.reload().await,
        Ok(_) => Reply::Refused { reason: format!("unknown request: expected {RELOAD:?}") },
        Err(error) => Reply::Refused { reason: error.to_string() },
    };
    // Strings always serialize.
    let Ok(mut line) = serde_json::to_vec(&reply) else { return };
    line.push(b'\n');
    // Fails only if the client has disconnected or does not read.
    let _ = timeout(CLIENT_TIMEOUT, client.write_all(&line)).await;
}

/// Reads the request of a client that may make one.
async fn read_request(client: &mut UnixStream) -> io::Result<String> {
    let uid = client.peer_cred()?.uid();
    let mut line = String::new();
    let mut reader = BufReader::new(client.take(MAX_REQUEST));
    timeout(CLIENT_TIMEOUT, reader.read_line(&mut line)).await??;
    // After reading: a reply on a socket with unread input would be lost when it is closed.
    if uid != 0 && uid != geteuid().as_raw() {
        return Err(io::Error::other("only root and the user of the daemon may control it"));
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

/// Why there is no outcome of a request.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    /// The daemon cannot be reached.
    #[error("cannot reach the daemon at {}: {cause}: {}", shown(.path), remedy(.cause.kind()))]
    Connect {
        /// The control socket.
        path: PathBuf,
        /// The cause.
        cause: io::Error,
    },
    /// The connection failed before the reply.
    #[error("the daemon ended the connection without a reply")]
    NoReply(#[source] io::Error),
    /// The reply is not a [`Reply`], as from another program's socket.
    #[error("unexpected reply at {}: name the daemon's control socket by --socket", shown(.0))]
    UnexpectedReply(PathBuf),
}

/// Returns the path in a form that is safe for a terminal.
fn shown(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

fn remedy(cause: io::ErrorKind) -> &'static str {
    match cause {
        io::ErrorKind::PermissionDenied => "only root and the user of the daemon may control it",
        _ => "start it, or name its control socket by --socket",
    }
}

/// Requests a reload from the daemon whose control socket is at `path`, and waits for the outcome.
///
/// # Errors
/// If the daemon cannot be reached or ends before its reply.
pub(crate) async fn request_reload(path: &Path) -> Result<Reply, RequestError> {
    let connect = |cause| RequestError::Connect { path: path.to_owned(), cause };
    let mut stream = UnixStream::connect(path).await.map_err(connect)?;
    stream.write_all(format!("{RELOAD}\n").as_bytes()).await.map_err(RequestError::NoReply)?;
    let mut line = Vec::new();
    let read = stream.take(MAX_REPLY).read_to_end(&mut line).await;
    if read.map_err(RequestError::NoReply)? == 0 {
        return Err(RequestError::NoReply(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&line).map_err(|_| RequestError::UnexpectedReply(path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn pending_requests_share_one_reload() {
        let (reloads, mut queue) = reload_queue();
        let clients: Vec<_> = (0..3)
            .map(|_| {
                let reloads = reloads.clone();
                tokio::spawn(async move { reloads.reload().await })
            })
            .collect();
        reloads.notify();
        while queue.0.len() < 4 {
            tokio::task::yield_now().await;
        }
        let reply = Reply::Reloaded { summary: "reloaded".to_owned() };
        queue.next().await.unwrap().answer(&reply);
        for client in clients {
            assert_eq!(client.await.unwrap(), reply);
        }
        assert!(queue.0.is_empty());
    }

    #[tokio::test]
    async fn signals_never_fill_the_queue_for_clients() {
        let (reloads, mut queue) = reload_queue();
        (0..10 * MAX_REQUESTS).for_each(|_| reloads.notify());
        let client = tokio::spawn({
            let reloads = reloads.clone();
            async move { reloads.reload().await }
        });
        let reply = Reply::rejected("a fault");
        while !client.is_finished() {
            queue.next().await.unwrap().answer(&reply);
            tokio::task::yield_now().await;
            // Another signal, so that there is always something to wait for.
            reloads.notify();
        }
        assert_eq!(client.await.unwrap(), reply);
    }

    #[tokio::test]
    async fn a_daemon_that_stops_answers_whoever_waits() {
        let (reloads, mut queue) = reload_queue();
        let client = tokio::spawn({
            let reloads = reloads.clone();
            async move { reloads.reload().await }
        });
        drop(queue.next().await);
        drop(queue);
        let refused = |reply| matches!(reply, Reply::Refused { .. });
        assert!(refused(client.await.unwrap()));
        assert!(refused(reloads.reload().await));
    }

    #[test]
    fn faults_are_cut_at_a_character() {
        let text = format!("one\n{}", "ä".repeat(MAX_FAULTS));
        let Reply::Rejected { faults } = Reply::rejected(&text) else { panic!() };
        assert_eq!(faults.len(), 3);
        assert_eq!(faults[0], "one");
        assert!(faults[1].len() < MAX_FAULTS && faults[2].starts_with("and more"));
    }
}
