//! The tables `[mail.NAME]`, `[sms.NAME]` and `[alert]`.

use std::collections::BTreeSet;
use std::env;
use std::path::PathBuf;

use crate::alert::grouping::Policy;
use crate::config_reader::{Reported, Table, values};

use crate::notify::Channel;
use crate::notify::{mail, sms};
use crate::telemetry::counters::Label;
use crate::telemetry::event::Kind;

/// The settings of channels and alerts.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Settings {
    pub channels: Vec<Channel>,
    pub(super) alert: Option<Alert>,
}

/// The checked settings of `[alert]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Alert {
    pub to: Vec<String>,
    pub policy: Policy,
    /// Limit of each channel.
    pub max_per_hour: usize,
    /// Whether mails have new files of mirrors attached.
    pub attach: bool,
    /// Configured folder of the outbox.
    pub state: Option<PathBuf>,
}

impl Settings {
    /// Reads every `[mail.NAME]` and `[sms.NAME]`, and `[alert]`.
    pub(crate) fn read(root: &mut Table<'_>) -> Result<Self, Reported> {
        let mut channels = Vec::new();
        let mut names = Vec::new();
        for kind in ["mail", "sms"] {
            for (name, table) in root.tables(kind) {
                names.push(format!("{kind}.{name}"));
                channels.push(read_channel(kind, name, table));
            }
        }
        let channels = channels.into_iter().collect::<Result<Vec<_>, _>>();
        let alert = root.table("alert").map(|table| Alert::read(table, &names));
        Ok(Self { channels: channels?, alert: alert.transpose()? })
    }

    pub(crate) fn channel_count(&self) -> usize {
        self.channels.len()
    }

    /// Returns a line per channel with its server.
    pub(crate) fn lines(&self) -> impl Iterator<Item = String> {
        self.channels.iter().map(|channel| format!("{} over {}", channel.name(), channel.server()))
    }

    pub(crate) fn is_on(&self) -> bool {
        self.alert.is_some()
    }

    pub(crate) fn event_kinds(&self) -> BTreeSet<Kind> {
        self.alert.as_ref().map(|alert| alert.policy.on.clone()).unwrap_or_default()
    }
}

impl Alert {
    fn read(mut table: Table<'_>, channels: &[String]) -> Result<Self, Reported> {
        let to = table.texts("to", |name| match channels.iter().find(|channel| *channel == name) {
            Some(channel) => Ok(channel.clone()),
            None if channels.is_empty() => {
                Err("no such channel; expected a table such as [mail.ops]".to_owned())
            }
            None => Err(format!("no such channel; expected one of {}", channels.join(", "))),
        });
        let on = table.texts("on", kind);
        let wait = table.text_or("wait", "30s", values::duration);
        let repeat = table.text_or("repeat", "4h", values::duration);
        let max_per_hour = table.integer_or("max-per-hour", 10, 1..=1000);
        let attach = table.boolean_or("attach", true);
        let state = table.checked_path("state", |path| {
            let expected = || "expected a folder that is there".to_owned();
            path.is_dir().then_some(()).ok_or_else(expected)
        });
        let to = to.and_then(|to| match to {
            Some(to) if !to.is_empty() => {
                let to: BTreeSet<_> = to.into_iter().map(|to| to.value).collect();
                Ok(to.into_iter().collect())
            }
            _ => Err(table.report("to", "expected at least one channel, as [\"mail.ops\"]")),
        });
        table.finish();
        let all = || Kind::NAMED.iter().map(|(kind, _)| *kind).collect();
        let on = on?.map_or_else(all, |on| on.into_iter().map(|on| on.value).collect());
        let policy = Policy { on, wait: wait?, repeat: repeat? };
        Ok(Self {
            to: to?,
            policy,
            max_per_hour: usize::try_from(max_per_hour?).unwrap_or(1),
            attach: attach?,
            state: state?,
        })
    }

    /// Returns the folder of the outbox: `state`, or the state directory of the service manager.
    pub(crate) fn folder(&self) -> Option<PathBuf> {
        let manager = || {
            let folders = env::var_os("STATE_DIRECTORY")?;
            env::split_paths(&folders).find(|folder| folder.is_absolute())
        };
        let folder = self.state.clone().or_else(manager)?;
        Some(folder.canonicalize().unwrap_or(folder))
    }
}

fn kind(name: &str) -> Result<Kind, String> {
    let found = Kind::NAMED.iter().find(|(_, known)| *known == name);
    found.map(|(kind, _)| *kind).ok_or_else(|| {
        let known: Vec<_> = Kind::NAMED.iter().map(|(_, name)| *name).collect();
        format!("expected one of {}", known.join(", "))
    })
}

fn read_channel(kind: &str, name: &str, table: Table<'_>) -> Result<Channel, Reported> {
    let named = table.check_name(name);
    let channel = match kind {
        "mail" => mail::Settings::read(name, table).map(Channel::Mail),
        _ => sms::Settings::read(name, table).map(Channel::Sms),
    };
    named.and(channel)
}

/// Reads the channel that the command line names.
pub(crate) fn channel(
    root: &mut Table<'_>,
    kind: &'static str,
    name: &str,
) -> Result<Channel, Reported> {
    let names = root.names(kind);
    match root.tables(kind).into_iter().find(|(found, _)| *found == name) {
        Some((name, table)) => read_channel(kind, name, table),
        None if names.is_empty() => {
            Err(root.report(kind, format_args!("no channel; expected a table [{kind}.{name}]")))
        }
        None => {
            let names = names.join(", ");
            Err(root.report(kind, format_args!("no channel {name:?}; expected one of {names}")))
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use super::*;
    use crate::config::{Config, Sources};

    const SHIPPED: &str = include_str!("../../config/handout.toml");

    pub(crate) const MAIL: &str = "[mail.a]\nserver = \"127.0.0.1:1\"\nsecurity = \"none\"\n\
                        from = \"a@example.org\"\nto = [\"b@example.org\"]\n";

    /// Returns the settings of a configuration, or its faults.
    pub(crate) fn load(text: &str) -> Result<Settings, String> {
        load_in(&tempfile::tempdir().unwrap(), text)
    }

    fn load_in(folder: &tempfile::TempDir, text: &str) -> Result<Settings, String> {
        // The folder of the shipped unit need not exist here.
        let text = text.replace("\"/var/lib/handout\"", "\"state\"");
        for (name, content) in
            [("handout.toml", &*text), ("mail.password", "hush\n"), ("sms.password", "hush\n")]
        {
            fs::write(folder.path().join(name), content).unwrap();
        }
        fs::create_dir_all(folder.path().join("state")).unwrap();
        let file = Some(folder.path().join("handout.toml"));
        Config::load(&Sources { file, ..Sources::default() })
            .map(|config| config.alerts)
            .map_err(|faults| faults.to_string())
    }

    /// The channels and alerts of the shipped configuration, without what comments them out.
    fn shipped() -> Vec<&'static str> {
        let lines = SHIPPED.lines().skip_while(|line| !line.starts_with("#[mail."));
        let lines = lines.filter_map(|line| line.strip_prefix('#'));
        // It names roots, which are not here.
        lines.filter(|line| !line.starts_with(' ') && !line.starts_with("ca-file")).collect()
    }

    #[test]
    fn the_shipped_configuration_says_every_key_and_the_defaults() {
        let lines = shipped();
        let folder = tempfile::tempdir().unwrap();
        let said = load_in(&folder, &lines.join("\n")).unwrap();
        assert_eq!(said.channel_count(), 3);
        let with_default = [
            "security",
            "allow-plaintext",
            "timeout",
            "max-attachment",
            "max-segments",
            "on",
            "wait",
            "repeat",
            "max-per-hour",
            "attach",
        ];
        let key = |line: &str| line.split(' ').next().unwrap_or_default().to_owned();
        let ihuyi = "url       = \"https://106";
        let bare = lines
            .iter()
            .filter(|line| !with_default.contains(&&*key(line)) && !line.starts_with(ihuyi))
            .copied();
        let bare = bare.collect::<Vec<_>>().join("\n");
        assert_eq!(load_in(&folder, &bare).unwrap(), said);
        // Every key that is known is said.
        for table in ["[mail.ops]", "[sms.ops]", "[alert]"] {
            let at = lines.iter().position(|line| line.starts_with(table)).unwrap();
            let mut with_junk = lines.clone();
            with_junk.insert(at + 1, "junk = 1");
            let fault = load(&with_junk.join("\n")).unwrap_err();
            let (_, known) = fault.split_once("unknown key; expected one of ").unwrap();
            for key in known.split(", ").map(str::trim) {
                let said = SHIPPED.contains(&format!("\n#{key} ")) || key == "from";
                assert!(said, "{key}");
            }
        }
    }

    #[test]
    fn a_secret_is_neither_in_the_faults_nor_in_what_is_printed() {
        let said = load(&shipped().join("\n")).unwrap();
        assert!(!format!("{said:?}").contains("hush"));
        let form = "[sms.a]\nprovider = \"form\"\nto = [\"110\"]\n";
        for wrong in [
            "url = \"https://me:hush@example.org/\"",
            "url = \"https://a/\"\nfields = { a = \"hush{\" }",
        ] {
            let faults = load(&format!("{form}{wrong}")).unwrap_err();
            assert!(!faults.contains("hush"), "{faults}");
        }
        let kept = "url = \"https://a/\"\nsuccess = { pointer = \"\", equals = \"1\" }\n\
                    fields = { a = \"hush\", b = \"{to}{text}\" }";
        let said = load(&format!("{form}{kept}")).unwrap();
        assert!(!format!("{said:?}").contains("hush"));
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (text, problem) in [
            ("[alert]\nto = [\"mail.a\"]", "no such channel; expected a table such as [mail.ops]"),
            (&format!("{MAIL}[alert]\nto = [\"sms.a\"]"), "expected one of mail.a"),
            (&format!("{MAIL}[alert]\n"), "alert.to: expected at least one channel"),
            (&format!("{MAIL}[alert]\nto = [\"mail.a\"]\non = [\"x\"]"), "service-failed"),
            (&format!("{MAIL}[alert]\nto = [\"mail.a\"]\nstate = \"x\""), "a folder that is there"),
            (&MAIL.replace("127.0.0.1", "192.0.2.1"), "none is for this machine only"),
            (&MAIL.replace("b@", "b\\r\\n@"), "has the end of a line or a NUL in it"),
            (&format!("{MAIL}username = \"x\""), "password-file: missing"),
            (&format!("{MAIL}password-file = \"x\""), "password-file: \"x\": cannot be read"),
        ] {
            let faults = load(text).unwrap_err();
            assert!(faults.contains(problem), "{text}: {faults}");
        }
        assert!(load(MAIL).is_ok());
    }
}
