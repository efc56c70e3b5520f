//! Attempts to send a message, and their retries.
//!
//! A failing channel is logged, counted and reported over the other channels.

use std::sync::Arc;
use std::time::Duration;

use super::{DispatchTask, channel_failed};
use crate::alert::delivery::deliver;
use crate::fs::filename::escape;
use crate::http::retry;
use crate::notify::outcome::{Failure, FailureKind, Sent};
use crate::telemetry::event::{AlertOutcome, Change, Event};

/// Delay after the first failed attempt.
const INITIAL_BACKOFF: Duration = Duration::from_secs(5);

/// Maximum delay after a failed attempt.
const MAX_BACKOFF: Duration = Duration::from_mins(15);

/// Maximum number of attempts that the server rejects or leaves unconfirmed: each SMS is paid for.
/// With the backoff they take three quarters of an hour.
const MAX_REJECTIONS: u32 = 10;

/// Time without success after which a channel has failed; greylisting takes less.
const FAILED_AFTER: Duration = Duration::from_mins(10);

/// A message that is being sent.
#[derive(Debug)]
pub(super) struct Attempt {
    channel: Arc<str>,
    id: String,
    /// Escaped for the log.
    subject: String,
    rejections: u32,
}

impl DispatchTask {
    pub(super) fn send_next(&mut self, name: &Arc<str>, now: Duration, flush: bool) {
        let Some(state) = self.channels.get(name) else { return };
        // On shutdown, a failing channel is not waited for.
        if state.retry_at > now || flush && state.failures > 0 {
            return;
        }
        let next = self.outbox.next(name).filter(|message| message.retry_at <= now);
        let Some(message) = next.cloned() else { return };
        if !self.in_flight.insert(Arc::clone(name)) {
            return;
        }
        let channel = state.channel.clone();
        let attempt = Attempt {
            channel: Arc::clone(name),
            id: message.id.clone(),
            subject: escape(&message.subject),
            rejections: message.rejections,
        };
        self.attempts.spawn(async move {
            // A separate task, so that a panic fails the attempt only.
            let result = tokio::spawn(async move { deliver(&channel, message).await }).await;
            let panicked = |_| Err(Failure::transient("a fault of the program; see the log"));
            (attempt, result.unwrap_or_else(panicked))
        });
    }

    pub(super) fn finish_attempt(&mut self, attempt: &Attempt, result: Result<Sent, Failure>) {
        self.in_flight.remove(&attempt.channel);
        match result {
            Ok(sent) => self.finish_sent(attempt, &sent),
            Err(failure) => self.finish_failed(attempt, failure),
        }
        self.save();
    }

    fn finish_sent(&mut self, attempt: &Attempt, sent: &Sent) {
        let Attempt { channel: name, id, subject, .. } = attempt;
        let (channel, ids) = (&**name, sent.ids.join(" "));
        tracing::info!(channel, id = ids, subject, "alert sent over {channel}: {subject}");
        self.outbox.remove(id);
        // The channel may have been removed meanwhile.
        let Some(state) = self.channels.get_mut(name) else { return };
        state.reset_backoff();
        state.failing_since = None;
        state.counters.outcomes.add(AlertOutcome::Sent);
        self.add(channel_failed(Arc::clone(name), Change::Ended));
    }

    fn finish_failed(&mut self, attempt: &Attempt, failure: Failure) {
        let Attempt { channel: name, id, subject, rejections } = attempt;
        let Failure { kind, message: error } = failure;
        let (now, channel) = (self.now(), &**name);
        let rejections = rejections + u32::from(kind.limits_attempts());
        let backoff = |failures: u32| {
            let delay = retry::backoff(failures, INITIAL_BACKOFF, MAX_BACKOFF);
            retry::around(delay, fastrand::f64())
        };
        if rejections >= MAX_REJECTIONS {
            self.outbox.remove(id);
            tracing::error!(
                channel,
                error,
                subject,
                "alert given up over {channel}: {error} ({subject})"
            );
            if let Some(state) = self.channels.get_mut(name) {
                state.counters.outcomes.add(AlertOutcome::Refused);
                state.reset_backoff();
            }
            // A one-shot event: the next message may be accepted.
            let description = format!("an alert is given up: {error}");
            let change = Change::OneShot { description, files: Vec::new() };
            self.add(channel_failed(Arc::clone(name), change));
            return;
        }
        let Some(state) = self.channels.get_mut(name) else { return };
        state.counters.outcomes.add(AlertOutcome::Failed);
        // A rejection concerns the message, every other failure the channel.
        let pause = if kind.limits_attempts() {
            let pause = backoff(rejections - 1);
            self.outbox.update(id, |message| {
                (message.rejections, message.retry_at) = (rejections, now + pause);
            });
            pause
        } else {
            let pause = backoff(state.failures);
            (state.failures, state.retry_at) = (state.failures.saturating_add(1), now + pause);
            pause
        };
        let next = pause.as_secs_f64();
        tracing::warn!(
            channel,
            error,
            subject,
            next,
            "alert not sent over {channel}: {error} ({subject})"
        );
        let failing_for = now.saturating_sub(*state.failing_since.get_or_insert(now));
        let is_failed = kind == FailureKind::ChannelBroken || failing_for >= FAILED_AFTER;
        if is_failed && !kind.limits_attempts() {
            let event = channel_failed(Arc::clone(name), Change::Begun(error));
            let at = event.at.checked_sub(failing_for).unwrap_or(event.at);
            self.add(Event { at, ..event });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::DispatcherConfig;
    use super::super::tests::{config, message, settings, task_with_message};
    use super::*;
    use crate::alert::config::Settings;
    use crate::alert::outbox::Message;

    #[tokio::test]
    async fn bounds_the_attempts_of_rejected_and_unconfirmed_messages_only() {
        for (failure, is_bounded) in [
            (Failure::unconfirmed("late"), true),
            (Failure::rejected("no"), true),
            (Failure::transient("later"), false),
            (Failure::channel_broken("no login"), false),
        ] {
            let mut task = task_with_message();
            let mut attempts = 0;
            while let Some(Message { rejections, .. }) = task.outbox.next("mail.a").cloned() {
                let (id, subject) = ("1".to_owned(), "gone".to_owned());
                let attempt = Attempt { channel: "mail.a".into(), id, subject, rejections };
                task.finish_attempt(&attempt, Err(failure.clone()));
                attempts += 1;
                if attempts > 100 {
                    break;
                }
            }
            assert_eq!(attempts == MAX_REJECTIONS, is_bounded, "{failure}: {attempts}");
            let refused = task.channels["mail.a"].counters.outcomes.get(AlertOutcome::Refused);
            assert_eq!(refused, u64::from(is_bounded));
        }
    }

    #[tokio::test]
    async fn a_rejected_message_does_not_delay_others() {
        let mut task = task_with_message();
        assert!(task.outbox.add(Message { id: "2".to_owned(), ..message() }));
        let (id, subject) = ("1".to_owned(), "gone".to_owned());
        let attempt = Attempt { channel: "mail.a".into(), id, subject, rejections: 0 };
        task.finish_attempt(&attempt, Err(Failure::rejected("no")));
        assert_eq!(task.outbox.next("mail.a").unwrap().id, "2");
        task.send_next(&"mail.a".into(), task.now(), false);
        assert_eq!(task.attempts.len(), 1);
    }

    #[tokio::test]
    async fn sends_nothing_twice_when_a_channel_is_removed_and_added() {
        let mut task = task_with_message();
        let name: Arc<str> = "mail.a".into();
        task.send_next(&name, Duration::ZERO, false);
        assert_eq!(task.attempts.len(), 1);
        let none = DispatcherConfig { settings: Settings::default(), counters: Vec::new() };
        task.apply_config(none);
        task.apply_config(config(settings()));
        task.send_next(&name, Duration::ZERO, false);
        assert_eq!(task.attempts.len(), 1);
    }
}
