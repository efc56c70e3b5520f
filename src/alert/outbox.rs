//! The outbox: messages that wait to be sent, kept in a file that survives a restart.
//!
//! A message is written before its first attempt and removed after the server accepted it, so it is
//! sent at least once, and twice only after a crash in between, with the same Message-ID.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::fs::atomic::{DirHandle, log_unsupported};

/// Hidden, so that no file service lists it.
const FILE: &str = ".handout-alerts.json";

/// Name of an unreadable file that was put aside.
const UNREADABLE: &str = ".handout-alerts.json.unreadable";

/// Maximum size of the file, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// Maximum number of messages per channel.
pub(crate) const MAX_QUEUED: usize = 100;

/// A message to one recipient.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// Also the Message-ID of a mail.
    pub(crate) id: String,
    /// Name of the channel, such as `mail.ops`.
    pub(crate) channel: String,
    pub(crate) to: String,
    pub(crate) subject: String,
    pub(crate) text: String,
    /// In seconds since 1970.
    pub(crate) date: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) files: Vec<PathBuf>,
    /// Attempts that the server rejected or left unconfirmed.
    #[serde(default)]
    pub(crate) rejections: u32,
    /// Time in the outbox of this process, which a changed system clock does not affect.
    #[serde(skip)]
    pub(crate) queued_at: Duration,
    /// Time of the next attempt.
    #[serde(skip)]
    pub(crate) retry_at: Duration,
}

/// The content of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct OutboxState {
    messages: VecDeque<Message>,
    /// Times of the latest notifications by channel, in seconds since 1970.
    #[serde(default)]
    sent: BTreeMap<String, Vec<i64>>,
    /// Suppressed notifications by channel.
    #[serde(default)]
    suppressed: BTreeMap<String, u64>,
}

impl OutboxState {
    fn read(folder: &Path) -> io::Result<Self> {
        match File::open(folder.join(FILE)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            opened => {
                let mut bytes = Vec::new();
                opened?.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
                Ok(serde_json::from_slice(&bytes)?)
            }
        }
    }
}

/// The messages of all channels.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    /// `None` keeps the messages in memory only.
    folder: Option<PathBuf>,
    /// Holds the lock on the folder; not every file system has locks.
    _lock: Option<File>,
    state: OutboxState,
    is_modified: bool,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error("another handout has it: give each a `state` of its own")]
    InUse,
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
}

impl Outbox {
    pub(crate) fn open(folder: &Path) -> Result<Self, OpenError> {
        let lock = lock(folder)?;
        let state = OutboxState::read(folder)?;
        Ok(Self { folder: Some(folder.to_owned()), _lock: lock, state, is_modified: false })
    }

    /// Creates an empty outbox and puts an unreadable file aside.
    pub(crate) fn create(folder: &Path) -> Result<Self, OpenError> {
        let lock = lock(folder)?;
        // The next write replaces the file if this fails.
        let _ = fs::rename(folder.join(FILE), folder.join(UNREADABLE));
        Ok(Self { folder: Some(folder.to_owned()), _lock: lock, ..Self::default() })
    }

    /// Writes the file if something changed. An error is retried by the next call.
    pub(crate) fn save(&mut self) -> io::Result<()> {
        let Some(folder) = self.folder.as_ref().filter(|_| self.is_modified) else { return Ok(()) };
        // Only the owner may read alerts.
        let mode = Mode::RUSR | Mode::WUSR;
        let json = serde_json::to_vec(&self.state)?;
        DirHandle::open(folder)?.write(FILE, mode, &json).map_err(io::Error::other)?;
        self.is_modified = false;
        Ok(())
    }

    /// Adds a message, unless the channel has [`MAX_QUEUED`].
    pub(crate) fn add(&mut self, message: Message) -> bool {
        let fits = self.len(&message.channel) < MAX_QUEUED;
        if fits {
            self.state.messages.push_back(message);
            self.is_modified = true;
        }
        fits
    }

    /// Returns the number of messages of a channel.
    pub(crate) fn len(&self, channel: &str) -> usize {
        self.state.messages.iter().filter(|message| message.channel == channel).count()
    }

    /// Returns the channels that have messages.
    pub(crate) fn channels(&self) -> BTreeSet<&str> {
        self.state.messages.iter().map(|message| &*message.channel).collect()
    }

    /// Returns the message of a channel that is due first.
    pub(crate) fn next(&self, channel: &str) -> Option<&Message> {
        let messages = self.state.messages.iter().filter(|message| message.channel == channel);
        messages.min_by_key(|message| message.retry_at)
    }

    pub(crate) fn remove(&mut self, id: &str) {
        self.state.messages.retain(|message| message.id != id);
        self.is_modified = true;
    }

    /// Changes a message, if it is still queued.
    pub(crate) fn update(&mut self, id: &str, change: impl FnOnce(&mut Message)) {
        if let Some(message) = self.state.messages.iter_mut().find(|message| message.id == id) {
            change(message);
            self.is_modified = true;
        }
    }

    /// Addresses messages to removed recipients to the first configured one, which gets each text
    /// only once.
    pub(crate) fn readdress(&mut self, channel: &str, recipients: &[String]) {
        let Some(first) = recipients.first() else { return };
        let mut seen = BTreeSet::new();
        let is_modified = &mut self.is_modified;
        self.state.messages.retain_mut(|message| {
            if message.channel != channel {
                return true;
            }
            if !recipients.contains(&message.to) {
                (message.to, message.retry_at) = (first.clone(), Duration::ZERO);
                *is_modified = true;
            }
            seen.insert((message.to.clone(), message.text.clone(), message.date))
        });
    }

    /// Removes messages queued before `time`.
    pub(crate) fn expire(&mut self, time: Duration) -> Vec<Message> {
        let (old, young) = std::mem::take(&mut self.state.messages)
            .into_iter()
            .partition::<VecDeque<_>, _>(|message| message.queued_at < time);
        self.state.messages = young;
        self.is_modified |= !old.is_empty();
        old.into()
    }

    pub(crate) fn sent(&self, channel: &str) -> Vec<i64> {
        self.state.sent.get(channel).cloned().unwrap_or_default()
    }

    pub(crate) fn set_sent(&mut self, channel: &str, times: Vec<i64>) {
        self.state.sent.insert(channel.to_owned(), times);
        self.is_modified = true;
    }

    pub(crate) fn suppressed(&self, channel: &str) -> u64 {
        self.state.suppressed.get(channel).copied().unwrap_or(0)
    }

    pub(crate) fn set_suppressed(&mut self, channel: &str, count: u64) {
        self.state.suppressed.insert(channel.to_owned(), count);
        self.is_modified = true;
    }
}

/// Locks the folder, because two processes would overwrite each other's file.
fn lock(folder: &Path) -> Result<Option<File>, OpenError> {
    let Ok(folder) = File::open(folder) else { return Ok(None) };
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(OpenError::InUse),
        locked => {
            log_unsupported("flock", locked);
            Ok(Some(folder))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(channel: &str, id: usize) -> Message {
        Message {
            id: id.to_string(),
            channel: channel.to_owned(),
            subject: "host: gone".to_owned(),
            text: "host: gone\r\n\"汇\"".to_owned(),
            date: i64::try_from(id).unwrap(),
            files: vec!["/a b/汇".into()],
            to: "a@example.org".to_owned(),
            rejections: 0,
            queued_at: Duration::from_secs(id as u64),
            retry_at: Duration::ZERO,
        }
    }

    /// Returns the state that the next process reads.
    fn kept(folder: &Path) -> OutboxState {
        OutboxState::read(folder).unwrap()
    }

    /// Returns [`message`] as read from the file.
    fn read_again(channel: &str, id: usize) -> Message {
        Message { queued_at: Duration::ZERO, ..message(channel, id) }
    }

    #[test]
    fn orders_and_bounds_the_messages_of_a_channel() {
        let mut outbox = Outbox::default();
        for id in 0..=MAX_QUEUED {
            assert_eq!(outbox.add(message("mail.a", id)), id < MAX_QUEUED);
        }
        assert!(outbox.add(message("sms.a", 0)));
        assert_eq!(outbox.next("mail.a").unwrap().id, "0");
        outbox.update("0", |message| message.retry_at = Duration::from_secs(1));
        assert_eq!(outbox.next("mail.a").unwrap().id, "1");
        outbox.remove("1");
        assert_eq!((outbox.len("mail.a"), outbox.len("sms.a")), (MAX_QUEUED - 1, 1));
        assert_eq!(outbox.expire(Duration::from_secs(50)).len(), 50);
        assert_eq!(outbox.next("mail.a").unwrap().id, "50");
        assert!(outbox.save().is_ok());
    }

    #[test]
    fn puts_an_unreadable_file_aside() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "{\"messages\":[").unwrap();
        assert!(matches!(Outbox::open(folder.path()), Err(OpenError::Unreadable(_))));
        let mut outbox = Outbox::create(folder.path()).unwrap();
        assert!(outbox.add(message("mail.a", 1)));
        outbox.save().unwrap();
        assert_eq!(kept(folder.path()).messages, [read_again("mail.a", 1)]);
        assert!(folder.path().join(UNREADABLE).exists());
    }

    #[test]
    fn is_locked_by_one_daemon() {
        let folder = tempfile::tempdir().unwrap();
        let outbox = Outbox::open(folder.path()).unwrap();
        assert!(matches!(Outbox::open(folder.path()), Err(OpenError::InUse)));
        assert!(matches!(Outbox::create(folder.path()), Err(OpenError::InUse)));
        drop(outbox);
        assert!(Outbox::open(folder.path()).is_ok());
    }

    #[test]
    fn a_crash_during_a_write_keeps_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let mut outbox = Outbox::open(folder.path()).unwrap();
        assert!(outbox.add(message("mail.a", 1)));
        outbox.save().unwrap();
        let before = kept(folder.path());
        assert!(outbox.add(message("mail.a", 2)));
        let whole = serde_json::to_vec(&outbox.state).unwrap();
        for length in 0..=whole.len() {
            fs::write(folder.path().join(format!("{FILE}.new")), &whole[..length]).unwrap();
            assert_eq!(kept(folder.path()), before);
        }
        outbox.save().unwrap();
        let both = [read_again("mail.a", 1), read_again("mail.a", 2)];
        assert_eq!(kept(folder.path()).messages, both);
        // No temporary file remains.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn retries_a_failed_write() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("later");
        let mut outbox = Outbox::open(&place).unwrap();
        assert!(outbox.add(message("mail.a", 1)));
        assert!(outbox.save().is_err());
        fs::create_dir(&place).unwrap();
        outbox.save().unwrap();
        assert_eq!(kept(&place).messages.len(), 1);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(usize),
        Send,
        /// A crash before the sent message is removed.
        SendAndCrash,
        Fail,
        Crash,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0_usize..1000).prop_map(Step::Add),
            Just(Step::Send),
            Just(Step::SendAndCrash),
            Just(Step::Fail),
            Just(Step::Crash),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn sends_every_message_and_twice_only_after_a_crash(
            steps in prop::collection::vec(step(), 0..40),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let restart = |outbox: Outbox| {
                drop(outbox);
                Outbox::open(folder.path()).unwrap()
            };
            let mut outbox = restart(Outbox::default());
            let (mut added, mut sent) = (Vec::new(), Vec::new());
            let mut repeated = 0;
            for (number, step) in steps.into_iter().enumerate() {
                let first = outbox.next("mail.a").map(|message| message.id.clone());
                match (step, first) {
                    (Step::Add(id), _) => {
                        let id = id * 100 + number;
                        if outbox.add(message("mail.a", id)) {
                            added.push(id.to_string());
                        }
                    }
                    (Step::Send, Some(id)) => {
                        sent.push(id.clone());
                        outbox.remove(&id);
                    }
                    (Step::SendAndCrash, Some(id)) => {
                        sent.push(id.clone());
                        outbox.remove(&id);
                        outbox = restart(outbox);
                        repeated += 1;
                    }
                    (Step::Fail, Some(id)) => outbox.update(&id, |message| message.rejections += 1),
                    (Step::Crash, _) => outbox = restart(outbox),
                    (_, None) => {}
                }
                outbox.save().unwrap();
            }
            while let Some(id) = outbox.next("mail.a").map(|message| message.id.clone()) {
                sent.push(id.clone());
                outbox.remove(&id);
            }
            prop_assert!(added.iter().all(|id| sent.contains(id)));
            prop_assert_eq!(sent.len(), added.len() + repeated);
        }
    }
}
