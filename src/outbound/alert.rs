//! The channels of a configuration, and `[alert]`.

use super::channel::Channel;
use super::{mail, sms};
use crate::config::{Context, Noted, Table, check_name};

/// How the operator is told.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// Every channel, with a name of its own.
    pub channels: Vec<Channel>,
}

impl Settings {
    /// Reads every `[mail.NAME]` and `[sms.NAME]`, and `[alert]`; reports what is wrong to the tables.
    ///
    /// # Errors
    /// If something is.
    pub fn read(root: &mut Table<'_>, context: &Context<'_>) -> Result<Self, Noted> {
        let mut channels = Vec::new();
        for kind in ["mail", "sms"] {
            for (name, table) in root.tables(kind) {
                channels.push(read_channel(kind, name, table, context));
            }
        }
        let channels = channels.into_iter().collect::<Result<Vec<_>, _>>();
        Ok(Self { channels: channels? })
    }

    /// How many channels there are.
    pub fn channels(&self) -> usize {
        self.channels.len()
    }
}

fn read_channel(
    kind: &str,
    name: &str,
    table: Table<'_>,
    context: &Context<'_>,
) -> Result<Channel, Noted> {
    let named = check_name(name).map_err(|expected| table.fault_here(expected));
    let channel = match kind {
        "mail" => mail::Settings::read(name, table, context).map(Channel::Mail),
        _ => sms::Settings::read(name, table, context).map(Channel::Sms),
    };
    named.and(channel)
}

/// Reads one channel alone, as it is named on the command line.
///
/// # Errors
/// If something is wrong with it, or there is none.
pub fn channel(
    root: &mut Table<'_>,
    context: &Context<'_>,
    kind: &'static str,
    name: &str,
) -> Result<Channel, Noted> {
    let names = root.names(kind);
    match root.tables(kind).into_iter().find(|(found, _)| *found == name) {
        Some((name, table)) => read_channel(kind, name, table, context),
        None if names.is_empty() => {
            Err(root.fault(kind, format_args!("no channel; expected a table [{kind}.{name}]")))
        }
        None => {
            let names = names.join(", ");
            Err(root.fault(kind, format_args!("no channel {name:?}; expected one of {names}")))
        }
    }
}
