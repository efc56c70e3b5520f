//! The sections of the feature `gateway`, and their stubs in a build without it.

#[cfg(feature = "gateway")]
pub(crate) use crate::alert::config::Settings as AlertSettings;
#[cfg(feature = "gateway")]
pub(crate) use crate::mirror::config::Settings as MirrorSettings;

#[cfg(not(feature = "gateway"))]
pub(crate) use missing::{AlertSettings, MirrorSettings};

#[cfg(not(feature = "gateway"))]
#[expect(clippy::needless_pass_by_value, reason = "the signatures of the feature")]
mod missing {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    use crate::config_reader::{Reported, Table};
    use crate::telemetry::event::Kind;

    const MISSING: &str = "this build has neither mirrors, mail, SMS nor alerts: it was built \
                           without the feature `gateway`";

    /// The settings of a mirror, which no build without the feature has.
    #[derive(Debug, Clone, PartialEq)]
    pub(crate) enum MirrorSettings {}

    impl MirrorSettings {
        pub(crate) fn read(_: &str, table: Table<'_>) -> Result<Self, Reported> {
            Err(table.report_here(MISSING))
        }

        pub(crate) fn name(&self) -> &Arc<str> {
            match *self {}
        }

        pub(crate) fn folder(&self) -> &Path {
            match *self {}
        }

        pub(crate) fn set_folder(&mut self, _: PathBuf) {
            match *self {}
        }
    }

    /// The settings of channels and alerts, which are empty without the feature.
    #[derive(Debug, Clone, Default, PartialEq, Eq)]
    pub(crate) struct AlertSettings {}

    impl AlertSettings {
        pub(crate) fn read(root: &mut Table<'_>) -> Result<Self, Reported> {
            let mut settings = Ok(Self {});
            for kind in ["mail", "sms"] {
                for (_, table) in root.tables(kind) {
                    settings = Err(table.report_here(MISSING));
                }
            }
            if let Some(table) = root.table("alert") {
                settings = Err(table.report_here(MISSING));
            }
            settings
        }

        pub(crate) fn channel_count(&self) -> usize {
            0
        }

        /// The kinds of events that are sent.
        pub(crate) fn event_kinds(&self) -> BTreeSet<Kind> {
            BTreeSet::new()
        }

        pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
            std::iter::empty()
        }
    }
}
