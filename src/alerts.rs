//! What the operator is told of, as the rest of the daemon knows it: in builds with the feature
//! `alert` and in those without it.

#[cfg(feature = "alert")]
pub use crate::outbound::alert::Settings;

#[cfg(not(feature = "alert"))]
pub use absent::Settings;

/// What stands for channels and alerts in a build that has none.
#[cfg(not(feature = "alert"))]
mod absent {
    use crate::config::{Context, Noted, Table};

    /// The settings, of which there are none.
    #[derive(Debug, Clone, Default, PartialEq, Eq)]
    pub struct Settings {}

    impl Settings {
        /// Notes that this build tells nobody, if the configuration wants it to.
        ///
        /// # Errors
        /// If it does.
        pub fn read(root: &mut Table<'_>, _: &Context<'_>) -> Result<Self, Noted> {
            let problem = "this build sends neither mail nor SMS: it was built without the feature \
                           `alert`";
            let mut settings = Ok(Self {});
            for kind in ["mail", "sms"] {
                for (_, table) in root.tables(kind) {
                    settings = Err(table.fault_here(problem));
                }
            }
            if let Some(table) = root.table("alert") {
                settings = Err(table.fault_here(problem));
            }
            settings
        }

        /// How many channels there are.
        pub fn channels(&self) -> usize {
            0
        }
    }
}
