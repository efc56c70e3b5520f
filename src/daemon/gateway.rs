//! The parts of the feature `gateway` that the daemon runs, and their stubs in a build without it.

#[cfg(feature = "gateway")]
pub(crate) use crate::alert::dispatcher::AlertDispatcher;
#[cfg(feature = "gateway")]
pub(crate) use crate::mirror::Mirrors;

#[cfg(not(feature = "gateway"))]
pub(crate) use missing::{AlertDispatcher, Mirrors};

#[cfg(not(feature = "gateway"))]
#[expect(clippy::unused_async, reason = "the signatures of the feature")]
mod missing {
    use std::io;
    use std::sync::Arc;

    use crate::config::{AlertSettings, MirrorSettings};
    use crate::telemetry::event::{ChannelCounters, EventSender};
    use crate::telemetry::mirror_stats::MirrorStats;

    /// A stub without mirrors.
    #[derive(Debug, Default)]
    pub(crate) struct Mirrors {}

    impl Mirrors {
        pub(crate) fn prepare(&mut self, _: &[MirrorSettings]) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn apply_config(&mut self, _: &[MirrorSettings], _: &EventSender) {}

        pub(crate) fn stats(&self) -> Vec<Arc<MirrorStats>> {
            Vec::new()
        }

        pub(crate) fn stop(&self) {}

        pub(crate) async fn ended(&mut self) {}
    }

    /// A stub without alerts.
    #[derive(Debug, Default)]
    pub(crate) struct AlertDispatcher {}

    impl AlertDispatcher {
        pub(crate) fn prepare(&mut self, _: &AlertSettings) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn apply_config(&mut self, _: &AlertSettings) {}

        pub(crate) fn events(&self) -> EventSender {
            EventSender::default()
        }

        pub(crate) fn counters(&self) -> Vec<Arc<ChannelCounters>> {
            Vec::new()
        }

        pub(crate) fn stop(&self) {}

        pub(crate) async fn ended(&mut self) {}
    }
}
