//! Requests of a connection and their answers.

use std::io;
use std::pin::pin;
use std::sync::Arc;

use bytes::BytesMut;
use sha2::{Digest, Sha256};
use tokio_util::codec::{AnyDelimiterCodec, Decoder};

use super::FolderService;
use super::cache::Response;
use crate::document;
use crate::fs::file::OpenFile;
use crate::fs::folder::MAX_NAME;
use crate::net::connection::{Connection, ServeError, Stream};
use crate::services::encoder;

impl FolderService {
    /// Answers each request line until the client half-closes.
    ///
    /// # Errors
    /// If the connection fails or times out, or a file changes or becomes unreadable while it is
    /// sent.
    pub async fn answer<S: Stream>(
        self: &Arc<Self>,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let mut lines =
            AnyDelimiterCodec::new_with_max_length(b"\n".to_vec(), Vec::new(), MAX_NAME);
        let mut input = BytesMut::new();
        let mut ended = false;
        loop {
            let line = if ended { lines.decode_eof(&mut input) } else { lines.decode(&mut input) };
            match line {
                Ok(Some(line)) => {
                    let line = line.strip_suffix(b"\r").unwrap_or(&line);
                    self.reply(line, connection).await?;
                }
                Ok(None) if ended => return Ok(()),
                Ok(None) => {
                    ended = connection.receive(&mut input).await? == 0;
                    // On shutdown, an incomplete line is not a request.
                    if ended && !connection.input_ended() {
                        return Ok(());
                    }
                }
                // The rest of the long line must not be taken for requests.
                Err(_) => {
                    let problem = format!("a request is longer than {MAX_NAME} bytes");
                    return refuse(connection, &problem, None).await;
                }
            }
        }
    }

    async fn reply<S: Stream>(
        self: &Arc<Self>,
        line: &[u8],
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        if line.is_empty() {
            return match connection.with_read_timeout(pin!(self.list())).await? {
                Ok(list) => connection.send(list.as_bytes()).await,
                Err(problem) => refuse(connection, &problem, None).await,
            };
        }
        let Ok(name) = str::from_utf8(line) else {
            let name = String::from_utf8_lossy(line);
            return refuse(connection, "the name is not UTF-8", Some(&name)).await;
        };
        let found = connection.with_read_timeout(pin!(self.find(name))).await?;
        if found.is_ok() {
            self.log_readable(name);
        }
        match found {
            Ok(Response::Document(document)) => connection.send(&document.bytes).await,
            Ok(Response::File(file, digest)) => {
                self.send_file(name, &file, digest, connection).await
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                refuse(connection, "no such file", Some(name)).await
            }
            Err(error) => {
                self.log_unreadable(name, &error);
                refuse(connection, "the file cannot be read", Some(name)).await
            }
        }
    }

    async fn send_file<S: Stream>(
        &self,
        name: &str,
        file: &Arc<OpenFile>,
        digest: Option<[u8; 32]>,
        connection: &mut Connection<S>,
    ) -> Result<(), ServeError> {
        let stamp = file.stamp;
        let opening = document::file_opening(name, stamp.size, stamp.modified());
        connection.send_part(opening.as_bytes()).await?;
        let unknown = digest.is_none().then(Sha256::new);
        let made = encoder::send_encoded(file, (&self.readers, name), unknown, connection).await?;
        let digest = match (digest, made) {
            (Some(known), _) => known,
            (None, made) => {
                let made = made.unwrap_or_default().finalize().into();
                self.digests.insert(stamp, made);
                made
            }
        };
        connection.send(document::file_closing(&digest).as_bytes()).await
    }
}

/// Replies with an error message, and keeps the connection open.
async fn refuse<S: Stream>(
    connection: &mut Connection<S>,
    problem: &str,
    name: Option<&str>,
) -> Result<(), ServeError> {
    connection.send(document::refusal(problem, name).as_bytes()).await
}
