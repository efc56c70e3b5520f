//! The control socket: reload requests, and their outcome for the clients that wait for it.
//!
//! A client sends the line `reload` over a Unix socket. The daemon answers with one line, a
//! [`Reply`] in JSON, at the end of the reload. Requests that are pending at the same time share
//! one reload. The socket is for its owner and root: the daemon also checks the credentials of
//! each client (`SO_PEERCRED` in unix(7)), as the file exists before its mode is set.

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

/// Folder of the control socket without `RUNTIME_DIRECTORY`.
const DEFAULT_DIR: &str = "/run/handout";

const RELOAD: &str = "reload";

/// Maximum length of a request, in bytes.
const MAX_REQUEST: u64 = 64;

/// Maximum length of the faults in a reply, in bytes; JSON may take six bytes for one.
const MAX_FAULTS: usize = 1 << 20;

/// Maximum length of a reply, in bytes.
const MAX_REPLY: u64 = 8 << 20;

/// Maximum number of simultaneous clients; more wait in the accept queue.
const MAX_CLIENTS: usize = 16;

/// Capacity of the queue of reload requests; more than clients, so that only signals can fill it.
const MAX_REQUESTS: usize = 2 * MAX_CLIENTS;

/// Time limit for a client to send its request, and to take the reply.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a failed accept, as when descriptors have run out.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

/// The answer to a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub(crate) enum Reply {
    /// The new configuration is in force.
    Reloaded { summary: String },
    /// The daemon keeps the old configuration. Each fault is one line.
    Rejected { faults: Vec<String> },
    /// No reload was attempted.
    Refused { reason: String },
}

impl Reply {
    /// A rejection with one fault per line of `text`, cut at the maximum length of a reply.
    pub(crate) fn rejected(text: &str) -> Self {
        let fitting = text.get(..text.floor_char_boundary(MAX_FAULTS)).unwrap_or(text);
        let mut faults: Vec<_> = fitting.lines().map(str::to_owned).collect();
        if fitting.len() < text.len() {
            faults.push("and more: see the log of the daemon".to_owned());
        }
        Self::Rejected { faults }
    }
}

/// A reload request; `None` is a signal, which gets no reply.
type Request = Option<oneshot::Sender<Reply>>;

#[derive(Debug, Clone)]
pub(crate) struct ReloadSender(mpsc::Sender<Request>);

#[derive(Debug)]
pub(crate) struct ReloadQueue(mpsc::Receiver<Request>);

pub(crate) fn reload_queue() -> (ReloadSender, ReloadQueue) {
    let (sender, receiver) = mpsc::channel(MAX_REQUESTS);
    (ReloadSender(sender), ReloadQueue(receiver))
}

impl ReloadSender {
    /// Requests a reload without waiting for it.
    pub(crate) fn notify(&self) {
        // If the queue is full, a reload is about to start.
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
    /// Waits for requests, and takes all that are pending; `None` if all senders are gone. Clients
    /// whose request is dropped without an answer learn that the daemon is stopping.
    pub(crate) async fn next(&mut self) -> Option<PendingRequests> {
        let mut requests = Vec::new();
        let count = self.0.recv_many(&mut requests, MAX_REQUESTS).await;
        (count > 0).then_some(PendingRequests(requests))
    }
}

/// The requests of one reload.
#[derive(Debug)]
pub(crate) struct PendingRequests(Vec<Request>);

impl PendingRequests {
    pub(crate) fn answer(self, reply: &Reply) {
        for client in self.0.into_iter().flatten() {
            // Fails only if the client has disconnected.
            let _ = client.send(reply.clone());
        }
    }
}

/// The default path of the control socket: in the first directory that `RUNTIME_DIRECTORY` lists
/// (systemd.exec(5)).
pub(crate) fn default_path() -> PathBuf {
    let dirs = env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    let dir = env::split_paths(&dirs).find(|dir| dir.is_absolute());
    dir.unwrap_or_else(|| DEFAULT_DIR.into()).join("control")
}

/// A bound control socket, whose file is removed on drop.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    listener: UnixListener,
    _file: SocketFile,
}

impl ControlSocket {
    /// Binds the socket at `path`, or at the default path. An unusable default path is no error:
    /// without a service manager, the folder may not exist or belong to another daemon.
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
        loop {
            let permit = Arc::clone(&permits).acquire_owned().await;
            let permit = permit.expect("the semaphore is never closed");
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
    let mut line = serde_json::to_vec(&reply).expect("strings always serialize");
    line.push(b'\n');
    // Fails only if the client has disconnected or does not read.
    let _ = timeout(CLIENT_TIMEOUT, client.write_all(&line)).await;
}

/// Reads the request of a client, and checks its credentials.
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

/// The reason why a client has no reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("cannot reach the daemon at {}: {cause}: {}", printable(.path), remedy(.cause.kind()))]
    Connect { path: PathBuf, cause: io::Error },
    #[error("the daemon closed the connection without a reply")]
    NoReply(#[source] io::Error),
    /// Another program listens on the socket.
    #[error("unexpected reply at {}: name the daemon's control socket by --socket", printable(.0))]
    UnexpectedReply(PathBuf),
}

fn printable(path: &Path) -> String {
    escape(&path.to_string_lossy())
}

fn remedy(cause: io::ErrorKind) -> &'static str {
    match cause {
        io::ErrorKind::PermissionDenied => "only root and the user of the daemon may control it",
        _ => "start it, or name its control socket by --socket",
    }
}

/// Requests a reload over the control socket at `path`, and waits for the outcome.
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
    async fn shares_one_reload_among_pending_requests() {
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
    async fn answers_clients_even_if_signals_fill_the_queue() {
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
            // Another signal, so that the queue never stays empty.
            reloads.notify();
        }
        assert_eq!(client.await.unwrap(), reply);
    }

    #[tokio::test]
    async fn refuses_pending_requests_when_the_daemon_stops() {
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
    fn cuts_long_faults_at_a_character() {
        let text = format!("one\n{}", "ä".repeat(MAX_FAULTS));
        let Reply::Rejected { faults } = Reply::rejected(&text) else { panic!() };
        assert_eq!(faults.len(), 3);
        assert_eq!(faults[0], "one");
        assert!(faults[1].len() < MAX_FAULTS && faults[2].starts_with("and more"));
    }
}
