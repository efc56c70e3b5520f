//! What waits to be sent: bounded, and kept in a file that survives a restart.
//!
//! A message is in the file before it is sent for the first time, and leaves it when it was taken. So
//! it is sent at least once; and twice only after a crash in between, with the same Message-ID then.
//! What is still to become a message, and what lasts, is in the file with it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::alert::grouping::{Kept, Withheld};
use crate::fs::atomic::{DirHandle, log_unsupported};

/// The file's name; hidden, so that no file service has it.
const FILE: &str = ".handout-alerts.json";

/// What it is called if it cannot be read, so that somebody may look at it.
const UNREADABLE: &str = ".handout-alerts.json.unreadable";

/// The largest file that is read, in bytes.
const MAX_FILE: u64 = 64 << 20;

/// How many messages may wait for one channel.
pub(crate) const MAX_WAITING: usize = 100;

/// A message that is to be sent over one channel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Message {
    /// By which it is known, here and as its Message-ID.
    pub id: String,
    /// The channel, as `mail.ops`.
    pub channel: String,
    /// What it is about.
    pub subject: String,
    /// What it says.
    pub text: String,
    /// When it was written, in seconds since 1970.
    pub date: i64,
    /// What is attached, as far as it is there when it is sent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<PathBuf>,
    /// Who has not got it yet, in the order in which it is tried; none before it was tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Vec<String>>,
    /// How often it was not taken, if to go on for ever does no good.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub tries: u32,
    /// When it came here, by the clock of whoever has the queue: nobody sets it, as they do that of
    /// the day.
    #[serde(skip)]
    pub since: Duration,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as it is called")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl Message {
    fn is(&self, channel: &str, id: &str) -> bool {
        self.channel == channel && self.id == id
    }
}

/// What is in the file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Contents {
    messages: VecDeque<Message>,
    /// When messages were made for a channel lately, in seconds since 1970.
    #[serde(default)]
    made: BTreeMap<String, Vec<i64>>,
    /// What was not told over a channel.
    #[serde(default)]
    withheld: BTreeMap<String, Withheld>,
    /// What goes on.
    #[serde(default)]
    incidents: Kept,
}

impl Contents {
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

/// Two would overwrite each other's. The kernel gives it back, whatever becomes of the process.
fn lock(folder: &Path) -> Result<Option<File>, OpenError> {
    let Ok(folder) = File::open(folder) else { return Ok(None) };
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(OpenError::Taken),
        locked => {
            log_unsupported("flock", locked);
            Ok(Some(folder))
        }
    }
}

/// The queue of all channels.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    /// None if nothing is kept.
    folder: Option<PathBuf>,
    /// The folder, locked for as long as the queue is there; not every file system has locks.
    _lock: Option<File>,
    contents: Contents,
    changed: bool,
}

/// Why there is no queue.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    /// It is somebody else's.
    #[error("another handout has it: give each a `state` of its own")]
    Taken,
    /// The content cannot be read.
    #[error("cannot be read: {0}")]
    Unreadable(#[from] io::Error),
}

impl Queue {
    /// Takes up the queue of a folder.
    ///
    /// # Errors
    /// If it is somebody else's, or cannot be read. In the latter case one can still be had without
    /// what is there: see [`Queue::begin_anew`].
    pub(crate) fn open(folder: &Path) -> Result<Self, OpenError> {
        let lock = lock(folder)?;
        let contents = Contents::read(folder)?;
        Ok(Self { folder: Some(folder.to_owned()), _lock: lock, contents, changed: false })
    }

    /// An empty queue in a folder; what is there and cannot be read is put aside.
    ///
    /// # Errors
    /// If it is somebody else's.
    pub(crate) fn begin_anew(folder: &Path) -> Result<Self, OpenError> {
        let lock = lock(folder)?;
        // If that fails, it is replaced.
        let _ = fs::rename(folder.join(FILE), folder.join(UNREADABLE));
        Ok(Self { folder: Some(folder.to_owned()), _lock: lock, ..Self::default() })
    }

    /// Takes everything that waits in another queue, which is empty then. What has no place is lost.
    ///
    /// # Errors
    /// Whatever the disk says. What waits is then in both.
    pub(crate) fn take_over(&mut self, other: Self) -> io::Result<()> {
        for message in other.contents.messages {
            self.add(message);
        }
        for (channel, made) in other.contents.made {
            self.set_made(&channel, made);
        }
        for (channel, withheld) in other.contents.withheld {
            self.set_withheld(&channel, withheld);
        }
        // First here, and then no longer there; in memory alone, it is not safe.
        self.save()?;
        if self.folder.is_none() {
            return Ok(());
        }
        match other.folder.map_or(Ok(()), |folder| fs::remove_file(folder.join(FILE))) {
            // Nothing was ever kept there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            removed => removed,
        }
    }

    /// Writes what has changed, whole or not at all.
    ///
    /// # Errors
    /// Whatever the disk says; it is tried again the next time.
    pub(crate) fn save(&mut self) -> io::Result<()> {
        let Some(folder) = &self.folder else { return Ok(()) };
        if !self.changed {
            return Ok(());
        }
        // Alerts are not for everybody who may read the folder.
        let mode = Mode::RUSR | Mode::WUSR;
        let json = serde_json::to_vec(&self.contents)?;
        DirHandle::open(folder)?.write(FILE, mode, &json).map_err(io::Error::other)?;
        self.changed = false;
        Ok(())
    }

    /// Takes a message, if there is a place for it.
    pub(crate) fn add(&mut self, message: Message) -> bool {
        let fits = self.waiting(&message.channel) < MAX_WAITING;
        if fits {
            self.contents.messages.push_back(message);
            self.changed = true;
        }
        fits
    }

    /// How many messages wait for a channel.
    pub(crate) fn waiting(&self, channel: &str) -> usize {
        self.contents.messages.iter().filter(|message| message.channel == channel).count()
    }

    /// The channels for which messages wait.
    pub(crate) fn channels(&self) -> BTreeSet<&str> {
        self.contents.messages.iter().map(|message| &*message.channel).collect()
    }

    /// The next message for a channel.
    pub(crate) fn first(&self, channel: &str) -> Option<&Message> {
        self.contents.messages.iter().find(|message| message.channel == channel)
    }

    /// A message was taken, or never will be.
    pub(crate) fn remove(&mut self, channel: &str, id: &str) {
        self.contents.messages.retain(|message| !message.is(channel, id));
        self.changed = true;
    }

    /// A message is on its way: somebody has got it, and these have not.
    pub(crate) fn go_on(&mut self, channel: &str, id: &str, to: Vec<String>) {
        if let Some(message) = self.contents.messages.iter_mut().find(|one| one.is(channel, id)) {
            (message.to, message.tries) = (Some(to), 0);
            self.changed = true;
        }
    }

    /// A message is to be tried again, after those that wait; for these recipients, if not for all.
    pub(crate) fn put_back(
        &mut self,
        channel: &str,
        id: &str,
        to: Option<Vec<String>>,
        tries: u32,
    ) {
        let at = self.contents.messages.iter().position(|one| one.is(channel, id));
        if let Some(mut message) = at.and_then(|at| self.contents.messages.remove(at)) {
            message.to = to.or(message.to);
            message.tries = tries;
            self.contents.messages.push_back(message);
            self.changed = true;
        }
    }

    /// Takes out what came before `since`.
    pub(crate) fn expire(&mut self, since: Duration) -> Vec<Message> {
        let (old, young) = std::mem::take(&mut self.contents.messages)
            .into_iter()
            .partition::<VecDeque<_>, _>(|message| message.since < since);
        self.contents.messages = young;
        self.changed |= !old.is_empty();
        old.into()
    }

    /// When messages were made for a channel lately, in seconds since 1970.
    pub(crate) fn made(&self, channel: &str) -> Vec<i64> {
        self.contents.made.get(channel).cloned().unwrap_or_default()
    }

    /// Messages were made for a channel at these times.
    pub(crate) fn set_made(&mut self, channel: &str, times: Vec<i64>) {
        self.contents.made.insert(channel.to_owned(), times);
        self.changed = true;
    }

    /// What was not told over a channel.
    pub(crate) fn withheld(&self, channel: &str) -> Withheld {
        self.contents.withheld.get(channel).cloned().unwrap_or_default()
    }

    /// What went on when this was written.
    pub(crate) fn incidents(&self) -> &Kept {
        &self.contents.incidents
    }

    /// This goes on now.
    pub(crate) fn set_incidents(&mut self, incidents: Kept) {
        self.changed |= self.contents.incidents != incidents;
        self.contents.incidents = incidents;
    }

    /// Changes what was not told over a channel.
    pub(crate) fn set_withheld(&mut self, channel: &str, withheld: Withheld) {
        self.contents.withheld.insert(channel.to_owned(), withheld);
        self.changed = true;
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
            to: None,
            tries: 0,
            since: Duration::from_secs(id as u64),
        }
    }

    /// What the next one finds.
    fn kept(folder: &Path) -> Contents {
        Contents::read(folder).unwrap()
    }

    /// As [`message`] is known when it has been read again.
    fn read_again(channel: &str, id: usize) -> Message {
        Message { since: Duration::ZERO, ..message(channel, id) }
    }

    #[test]
    fn messages_of_a_channel_wait_in_order_and_are_bounded() {
        let mut queue = Queue::default();
        for id in 0..=MAX_WAITING {
            assert_eq!(queue.add(message("mail.a", id)), id < MAX_WAITING);
        }
        assert!(queue.add(message("sms.a", 0)));
        assert_eq!(queue.first("mail.a").unwrap().id, "0");
        queue.put_back("mail.a", "0", Some(vec!["x".to_owned()]), 1);
        assert_eq!(queue.first("mail.a").unwrap().id, "1");
        queue.remove("mail.a", "1");
        assert_eq!((queue.waiting("mail.a"), queue.waiting("sms.a")), (MAX_WAITING - 1, 1));
        assert_eq!(queue.expire(Duration::from_secs(50)).len(), 50);
        assert_eq!(queue.first("mail.a").unwrap().id, "50");
        assert!(queue.save().is_ok());
    }

    #[test]
    fn what_cannot_be_read_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), "{\"messages\":[").unwrap();
        assert!(matches!(Queue::open(folder.path()), Err(OpenError::Unreadable(_))));
        let mut queue = Queue::begin_anew(folder.path()).unwrap();
        assert!(queue.add(message("mail.a", 1)));
        queue.save().unwrap();
        assert_eq!(kept(folder.path()).messages, [read_again("mail.a", 1)]);
        assert!(folder.path().join(UNREADABLE).exists());
    }

    #[test]
    fn a_queue_is_one_daemon_s_alone() {
        let folder = tempfile::tempdir().unwrap();
        let queue = Queue::open(folder.path()).unwrap();
        assert!(matches!(Queue::open(folder.path()), Err(OpenError::Taken)));
        assert!(matches!(Queue::begin_anew(folder.path()), Err(OpenError::Taken)));
        drop(queue);
        assert!(Queue::open(folder.path()).is_ok());
    }

    #[test]
    fn a_crash_while_it_is_written_leaves_what_was_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut queue = Queue::open(folder.path()).unwrap();
        assert!(queue.add(message("mail.a", 1)));
        queue.save().unwrap();
        let before = kept(folder.path());
        assert!(queue.add(message("mail.a", 2)));
        let whole = serde_json::to_vec(&queue.contents).unwrap();
        for length in 0..=whole.len() {
            fs::write(folder.path().join(format!("{FILE}.new")), &whole[..length]).unwrap();
            assert_eq!(kept(folder.path()), before);
        }
        queue.save().unwrap();
        let both = [read_again("mail.a", 1), read_again("mail.a", 2)];
        assert_eq!(kept(folder.path()).messages, both);
        // Nothing is left but the file.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_queue_can_be_taken_to_another_folder() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut before = Queue::open(from.path()).unwrap();
        assert!(before.add(message("mail.a", 1)));
        before.save().unwrap();
        let contents = kept(from.path());
        let mut queue = Queue::open(to.path()).unwrap();
        queue.take_over(before).unwrap();
        assert_eq!(kept(to.path()), contents);
        assert_eq!(kept(from.path()), Contents::default());
        // What is only in memory is kept where it was.
        let kept_before = kept(to.path());
        let mut memory = Queue::default();
        memory.take_over(queue).unwrap();
        assert_eq!((memory.waiting("mail.a"), kept(to.path())), (1, kept_before));
        let mut queue = Queue::open(to.path()).unwrap();
        // From where nothing was ever kept, too.
        queue.take_over(Queue::open(from.path()).unwrap()).unwrap();
    }

    #[test]
    fn a_disk_that_fails_is_tried_again() {
        let folder = tempfile::tempdir().unwrap();
        let place = folder.path().join("later");
        let mut queue = Queue::open(&place).unwrap();
        assert!(queue.add(message("mail.a", 1)));
        assert!(queue.save().is_err());
        fs::create_dir(&place).unwrap();
        queue.save().unwrap();
        assert_eq!(kept(&place).messages.len(), 1);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Add(usize),
        /// Sent, and noted.
        Send,
        /// Sent, and a crash before it is noted.
        SendAndCrash,
        /// Not sent.
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
        fn every_message_is_sent_and_twice_only_after_a_crash(
            steps in prop::collection::vec(step(), 0..40),
        ) {
            let folder = tempfile::tempdir().unwrap();
            let restart = |queue: Queue| {
                drop(queue);
                Queue::open(folder.path()).unwrap()
            };
            let mut queue = restart(Queue::default());
            let (mut added, mut sent) = (Vec::new(), Vec::new());
            let mut repeated = 0;
            for (number, step) in steps.into_iter().enumerate() {
                let first = queue.first("mail.a").map(|message| message.id.clone());
                match (step, first) {
                    (Step::Add(id), _) => {
                        let id = id * 100 + number;
                        if queue.add(message("mail.a", id)) {
                            added.push(id.to_string());
                        }
                    }
                    (Step::Send, Some(id)) => {
                        sent.push(id.clone());
                        queue.remove("mail.a", &id);
                    }
                    (Step::SendAndCrash, Some(id)) => {
                        sent.push(id.clone());
                        queue.remove("mail.a", &id);
                        queue = restart(queue);
                        repeated += 1;
                    }
                    (Step::Fail, Some(id)) => queue.put_back("mail.a", &id, None, 0),
                    (Step::Crash, _) => queue = restart(queue),
                    (_, None) => {}
                }
                queue.save().unwrap();
            }
            while let Some(id) = queue.first("mail.a").map(|message| message.id.clone()) {
                sent.push(id.clone());
                queue.remove("mail.a", &id);
            }
            prop_assert!(added.iter().all(|id| sent.contains(id)));
            prop_assert_eq!(sent.len(), added.len() + repeated);
        }
    }
}
