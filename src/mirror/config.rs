//! The settings of `[mirror.NAME]`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::AUTHORIZATION;

use crate::config_reader::{Question, Reported, Table, values, values_of};
use crate::fs::atomic::OverwritePolicy;
use crate::http::egress::{self, Host};
use crate::http::tls::CaFile;
use crate::http::{ca_certs, headers, pointer};
use crate::mirror::download::DownloadLimits;
use crate::mirror::listing::Pointers;
use crate::mirror::sync::{Source, SyncOptions, read_token};
use crate::secret;

const MAX_JOBS: u32 = 256;

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Settings {
    /// The name without its kind.
    pub name: Arc<str>,
    pub every: Duration,
    pub sync: SyncOptions,
}

impl Settings {
    pub(crate) fn read(name: &str, mut table: Table<'_>) -> Result<Self, Reported> {
        let source = read_source(&mut table);
        let folder = read_folder(&mut table);
        let every = table.text_or("every", "10m", |text| match values::duration(text) {
            Ok(every) if every < Duration::from_secs(1) => {
                Err("expected at least \"1s\"".to_owned())
            }
            every => every,
        });
        let limits = read_limits(&mut table);
        let jobs = table.integer_or("jobs", 8, 1..=MAX_JOBS);
        let timeout = table.text_or("timeout", "30s", values::duration);
        let max_total = table.text_or("max-total", "1GiB", values::size);
        let max_files = table.integer_or("max-files", 1000, 1..=1_000_000);
        let delete = table.boolean_or("delete", false);
        let hosts = table.texts("hosts", Host::parse);
        let headers = table.entries("header", |name, value| {
            let (name, value) = headers::parse(name, value)?;
            if name == AUTHORIZATION {
                return Err("a secret does not belong here: bearer-token-file".to_owned());
            }
            Ok((name, value))
        });
        let bearer_token = secret::checked_path(&mut table, "bearer-token-file", |path| {
            read_token(path).map(drop)
        });
        let ca_file = table.checked_path("ca-file", ca_certs::read);
        let proxy = read_url(&mut table, "proxy");
        table.finish();
        let sync = SyncOptions {
            source: source?,
            folder: folder?,
            limits: limits?,
            jobs: usize::try_from(jobs?).expect("at most MAX_JOBS"),
            timeout: timeout?,
            max_files: usize::try_from(max_files?).expect("at most one million"),
            max_total: max_total?,
            delete: delete?,
            keep_manifest: true,
            owns_folder: true,
            hosts: values_of(hosts?),
            allow_any_public: false,
            headers: headers?.into_iter().collect(),
            bearer_token: bearer_token?,
            ca_file: CaFile::of_key(ca_file?),
            proxy: proxy?,
        };
        Ok(Self { name: name.into(), every: every?, sync })
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.sync.folder
    }

    /// Replaces the folder by its canonical path.
    pub(crate) fn set_folder(&mut self, canonical: PathBuf) {
        self.sync.folder = canonical;
    }
}

fn read_limits(table: &mut Table<'_>) -> Result<DownloadLimits, Reported> {
    let max_duration = table.text_or("max-duration", "1h", values::duration);
    let retries = table.integer_or("retries", 4, 0..=100);
    let max_file = table.text_or("max-file", "64MiB", values::size);
    let content_types = table.texts("content-types", media_type);
    Ok(DownloadLimits {
        max_file: max_file?,
        max_file_key: "max-file",
        max_duration: max_duration?,
        retries: retries?,
        content_types: values_of(content_types?),
        overwrite: OverwritePolicy::Update,
    })
}

fn read_folder(table: &mut Table<'_>) -> Result<PathBuf, Reported> {
    let text = table.required("into", "the folder for the files", |text| match text {
        "" => Err("expected a folder"),
        text => Ok(text.to_owned()),
    })?;
    let path = table.base_dir().join(&text);
    table.probe("into", &text, Question::Folder(path.clone()));
    Ok(path)
}

/// Reads a URL. The diagnostic does not repeat it, because it may contain a password.
fn read_url(table: &mut Table<'_>, key: &'static str) -> Result<Option<Url>, Reported> {
    let text = table.text(key, |text| Ok::<_, String>(text.to_owned()))?;
    text.map(|text| egress::url(&text).map_err(|error| table.report(key, error))).transpose()
}

fn read_source(table: &mut Table<'_>) -> Result<Source, Reported> {
    let source = read_url(table, "source");
    let urls = read_urls(table);
    let [list, url, filename, sha256] =
        ["list", "url", "filename", "sha256"].map(|key| table.text(key, pointer::parse));
    let (source, urls) = (source?, urls?);
    let (list, url, filename, sha256) = (list?, url?, filename?, sha256?);
    match (source, urls) {
        (Some(source), None) => {
            let expected = "missing; expected the JSON pointer to the URL in an entry of the \
                            listing, as \"/url\", or \"\" if an entry is the URL itself";
            let url = url.ok_or_else(|| table.report("url", expected))?;
            let pointers = Pointers { list: list.unwrap_or_default(), url, filename, sha256 };
            Ok(Source::Listing { url: source, pointers })
        }
        (None, Some(urls)) if urls.is_empty() => {
            Err(table.report("urls", "empty; expected at least one URL"))
        }
        (None, Some(urls)) => {
            let pointers =
                [("list", list), ("url", url), ("filename", filename), ("sha256", sha256)];
            match pointers.iter().find(|(_, pointer)| pointer.is_some()) {
                None => Ok(Source::Urls(urls)),
                Some((key, _)) => Err(table.report(key, "is for a listing, which `source` names")),
            }
        }
        (Some(_), Some(_)) => Err(table.report("urls", "expected either `source` or `urls`")),
        (None, None) => {
            Err(table.report_here("expected `source`, the URL of a JSON listing, or `urls`"))
        }
    }
}

fn read_urls(table: &mut Table<'_>) -> Result<Option<Vec<Url>>, Reported> {
    let Some(urls) = table.texts("urls", |text| Ok::<_, String>(text.to_owned()))? else {
        return Ok(None);
    };
    let urls = urls
        .into_iter()
        .map(|text| egress::url(&text.value).map_err(|error| table.report_at(&text.origin, error)));
    // Every invalid URL is reported.
    urls.collect::<Vec<_>>().into_iter().collect::<Result<_, _>>().map(Some)
}

fn media_type(text: &str) -> Result<String, String> {
    let is_token = |part: &str| {
        let is_special = |c: char| "!#$&^_.+-".contains(c);
        !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || is_special(c))
    };
    match text.split_once('/') {
        Some((kind, subtype)) if is_token(kind) && (subtype == "*" || is_token(subtype)) => {
            Ok(text.to_owned())
        }
        _ => Err("expected a media type, as \"image/png\" or \"image/*\"".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::config::{Config, Sources};

    const SHIPPED: &str = include_str!("../../config/handout.toml");

    /// Loads a configuration, or returns its diagnostics.
    fn load(text: &str) -> Result<Config, String> {
        let folder = tempfile::tempdir().unwrap();
        for (name, content) in [("handout.toml", text), ("token", "hush\n"), ("picture.jpg", "x")] {
            fs::write(folder.path().join(name), content).unwrap();
        }
        let file = Some(folder.path().join("handout.toml"));
        Config::load(&Sources { file, ..Sources::default() }).map_err(|faults| faults.to_string())
    }

    /// Returns the lines of the mirror in the shipped configuration, uncommented.
    fn shipped() -> Vec<&'static str> {
        let lines = SHIPPED
            .lines()
            .skip_while(|line| *line != "[metrics]" && !line.starts_with("#[mirror."))
            .take_while(|line| !line.starts_with("# A channel"));
        let lines = lines.filter_map(|line| line.strip_prefix('#'));
        // Its certificates do not exist here.
        lines.filter(|line| !line.starts_with(' ') && !line.starts_with("ca-file")).collect()
    }

    #[test]
    fn the_shipped_configuration_lists_all_keys_and_defaults() {
        let lines = shipped();
        let said = load(&lines.join("\n")).unwrap();
        let without_default = ["source", "url", "filename", "sha256", "into", "bearer", "proxy"];
        let bare: Vec<_> = lines
            .iter()
            .filter(|line| {
                line.starts_with('[') || without_default.iter().any(|key| line.starts_with(key))
            })
            .copied()
            .collect();
        let Ok(bare) = load(&bare.join("\n")) else { panic!("{bare:?}") };
        let (said, bare) = (&said.mirrors[0], &bare.mirrors[0]);
        assert_eq!(said.every, bare.every);
        assert_eq!(said.sync.limits, bare.sync.limits);
        // The shipped file lists every known key.
        let fault = load(&format!("{}\njunk = 1", lines.join("\n"))).unwrap_err();
        assert!(fault.contains("mirror.pictures.junk: unknown key"), "{fault}");
        let (_, known) = fault.split_once("expected one of ").unwrap();
        for key in known.split(", ").map(str::trim) {
            assert!(SHIPPED.contains(&format!("\n#{key} ")) || key == "urls", "{key}");
        }
    }

    #[test]
    fn hides_secrets_in_diagnostics_and_debug_output() {
        let mirror = "[mirror.a]\ninto = \"x\"\nurl = \"\"\n";
        for wrong in [
            "source = \"https://me:hush@example.org/\"",
            "urls = [\"https://me:hush@example.org/\"]",
            "source = \"https://a/\"\nproxy = \"http://me:hush@example.org/\"",
            "source = \"https://a/\"\nheader = { X = \"hush\\n\" }",
            "source = \"https://a/\"\nheader = { Authorization = \"hush\" }",
        ] {
            let faults = load(&format!("{mirror}{wrong}")).unwrap_err();
            assert!(!faults.contains("hush"), "{faults}");
        }
        let config = load(&format!(
            "{mirror}source = \"https://a/\"\nheader = {{ X = \"hush\" }}\nbearer-token-file = \"token\""
        ));
        assert!(!format!("{:?}", config.unwrap()).contains("hush"));
    }

    #[test]
    fn media_types_have_two_parts() {
        for good in ["image/png", "image/*", "application/vnd.a+json"] {
            assert!(media_type(good).is_ok(), "{good}");
        }
        for bad in ["", "image", "image/", "/png", "*/*", "image/png; q=1", "a/b/c"] {
            assert!(media_type(bad).is_err(), "{bad}");
        }
    }
}
