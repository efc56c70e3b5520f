//! Handle of the daemon to the alert dispatcher.
//!
//! Alerts have their own thread and event loop, so neither a dead mail server nor a slow disk delays
//! a service.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::alert::config::Settings;
use crate::alert::dispatch_task::{DispatchTask, DispatcherConfig};
use crate::runtime::EventLoop;
use crate::telemetry::event::{ChannelCounters, EventSender};

/// The handle of the daemon to the dispatcher.
#[derive(Debug, Default)]
pub(crate) struct AlertDispatcher {
    events: EventSender,
    /// Created when `[alert]` is first configured.
    event_loop: Option<EventLoop>,
    task: Option<TaskHandle>,
    counters: Vec<Arc<ChannelCounters>>,
}

#[derive(Debug)]
struct TaskHandle {
    config: watch::Sender<DispatcherConfig>,
    stop: CancellationToken,
    task: JoinHandle<()>,
    /// Folder of the outbox, which cannot change.
    folder: Option<PathBuf>,
}

impl AlertDispatcher {
    /// Checks that settings can be applied, and starts the thread if it is needed for the first
    /// time.
    pub(crate) fn prepare(&mut self, settings: &Settings) -> io::Result<()> {
        if let (Some(task), Some(alert)) = (&self.task, &settings.alert)
            && task.folder != alert.folder()
        {
            return Err(io::Error::other(
                "alert.state cannot change in a running daemon: restart it, and move \
                 .handout-alerts.json to the new folder before",
            ));
        }
        if settings.is_on() && self.event_loop.is_none() {
            self.event_loop = Some(EventLoop::start("alerts")?);
        }
        Ok(())
    }

    /// Applies settings; queued messages are kept.
    pub(crate) fn apply_config(&mut self, settings: &Settings) {
        let counters = settings.channels.iter().map(|channel| {
            let before = self.counters.iter().find(|counters| counters.channel == *channel.name());
            before
                .cloned()
                .unwrap_or_else(|| Arc::new(ChannelCounters::new(channel.name().clone())))
        });
        self.counters = counters.collect();
        let config =
            DispatcherConfig { settings: settings.clone(), counters: self.counters.clone() };
        if let Some(task) = &self.task {
            task.config.send_replace(config);
        } else if let (Some(event_loop), Some(alert)) = (&self.event_loop, &settings.alert)
            && let Some(events) = self.events.connect()
        {
            let (config, receiver) = watch::channel(config);
            let (stop, folder) = (CancellationToken::new(), alert.folder());
            let task = DispatchTask::new(alert.clone(), self.events.clone(), stop.clone());
            let task = event_loop.handle.spawn(task.run(folder.clone(), events, receiver));
            self.task = Some(TaskHandle { config, stop, task, folder });
        }
    }

    pub(crate) fn events(&self) -> EventSender {
        self.events.clone()
    }

    pub(crate) fn counters(&self) -> Vec<Arc<ChannelCounters>> {
        if self.task.is_some() { self.counters.clone() } else { Vec::new() }
    }

    /// Reports pending events at once and stops.
    pub(crate) fn stop(&self) {
        if let Some(task) = &self.task {
            task.stop.cancel();
        }
    }

    /// Waits for the end. Messages that could not be sent remain in the outbox.
    pub(crate) async fn ended(&mut self) {
        if let Some(task) = self.task.take() {
            // The panic hook has logged a panic.
            let _ = task.task.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::alert::config::tests::{MAIL, load};
    use crate::alert::outbox::Outbox;
    use crate::telemetry::event::{Change, Event, Kind};

    fn event(change: Change) -> Event {
        let at = Timestamp::now();
        Event { kind: Kind::FileMissing, subject: "file.a".into(), at, change }
    }

    fn settings() -> Settings {
        load(&format!("{MAIL}[alert]\nto = [\"mail.a\"]")).unwrap()
    }

    #[tokio::test]
    async fn unsent_messages_remain_in_the_outbox() {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings();
        settings.alert.as_mut().unwrap().state = Some(folder.path().to_owned());
        let run = async |settings: &Settings, events: Vec<Event>| {
            let mut alerts = AlertDispatcher::default();
            alerts.prepare(settings).unwrap();
            alerts.apply_config(settings);
            for event in events {
                assert!(alerts.events().send(event));
            }
            alerts.stop();
            alerts.ended().await;
        };
        // Nothing listens at the address of the channel.
        run(&settings, vec![event(Change::Begun("gone".to_owned()))]).await;
        let outbox = || Outbox::open(folder.path()).unwrap();
        let message = outbox().next("mail.a").unwrap().clone();
        assert!(message.subject.contains("file-missing: file.a, since 20"), "{message:?}");
        assert!(message.text.ends_with(": gone\n"), "{message:?}");
        run(&settings, Vec::new()).await;
        assert_eq!(outbox().next("mail.a"), Some(&message));
        assert_eq!(outbox().len("mail.a"), 1);
    }

    #[tokio::test]
    async fn refuses_another_folder_while_running() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut settings = settings();
        settings.alert.as_mut().unwrap().state = Some(first.path().to_owned());
        let mut alerts = AlertDispatcher::default();
        alerts.prepare(&settings).unwrap();
        alerts.apply_config(&settings);
        assert!(alerts.prepare(&settings).is_ok());
        settings.alert.as_mut().unwrap().state = Some(second.path().to_owned());
        let error = alerts.prepare(&settings).unwrap_err().to_string();
        assert!(error.starts_with("alert.state cannot change in a running daemon"), "{error}");
        alerts.stop();
        alerts.ended().await;
    }

    #[tokio::test]
    async fn starts_no_thread_without_alerts() {
        let settings = load(MAIL).unwrap();
        let mut alerts = AlertDispatcher::default();
        alerts.prepare(&settings).unwrap();
        alerts.apply_config(&settings);
        assert!(alerts.event_loop.is_none() && alerts.counters().is_empty());
        assert!(alerts.events().send(event(Change::Ended)));
        alerts.stop();
        alerts.ended().await;
    }
}
