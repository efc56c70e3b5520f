//! The stage that performs I/O: reads the file and answers the probes that parsing raised, all at
//! the same time and each within a time limit.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::{Path, PathBuf, absolute};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;

use crate::clock::find_zone;
use crate::config::service::{find_conflicts, served_paths};
use crate::config::{Config, Validated, find_shared_folders, finish};
use crate::config_reader::{
    Diagnostic, Diagnostics, Findings, PathKind, Position, Probe, Question,
};
use crate::fs::blocking_pool::{BlockingPool, UNANSWERED};
use crate::fs::file::{OpenFile, canonical};
use crate::fs::folder::Folder;
use crate::services::Settings;

/// Maximum size of a configuration file, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Time limit of a probe: a file system may first have to be mounted.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Time limit of the probe of a path that is served already, and so was mounted.
const SERVED_TIMEOUT: Duration = Duration::from_secs(2);

/// The text of a configuration file, its name in messages, and the folder of its relative paths.
#[derive(Debug, Default)]
pub(super) struct ConfigText {
    pub name: String,
    pub text: String,
    pub base_dir: PathBuf,
}

impl ConfigText {
    pub(super) fn read(path: &Path) -> Result<Self, Diagnostic> {
        let name = path.display().to_string();
        let fault = |message: String| Diagnostic::of_file(name.clone(), message);
        let mut bytes = Vec::new();
        fs::File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
            .map_err(|error| fault(format!("cannot be read: {error}")))?;
        if bytes.len() as u64 > MAX_FILE {
            return Err(fault(format!("larger than {} KiB: not a configuration", MAX_FILE >> 10)));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let valid = error.as_bytes().iter().take(error.utf8_error().valid_up_to());
            let line = 1 + valid.filter(|byte| **byte == b'\n').count();
            let message = "not UTF-8; expected a TOML file, which is UTF-8 throughout";
            Diagnostic {
                position: Position::Line(name.clone(), line),
                ..Diagnostic::of_file(String::new(), message)
            }
        })?;
        // Absolute, because the address of a Unix socket must not depend on the file's spelling.
        let folder = path.parent().unwrap_or(Path::new(""));
        let base_dir = absolute(folder).unwrap_or_else(|_| folder.to_owned());
        Ok(Self { name, text, base_dir })
    }
}

impl Validated {
    /// Runs the last stage. Paths of `running` services are valid even if their file systems do not
    /// answer.
    pub(crate) async fn probe(
        self,
        pool: &Arc<BlockingPool>,
        running: &[Settings],
    ) -> Result<Config, Diagnostics> {
        let Self { mut config, services, folders, mut diagnostics, probes, no_service } = self;
        let has_contents = !services.is_empty()
            || !config.mirrors.is_empty()
            || config.alerts.channel_count() > 0
            || !diagnostics.is_empty();
        if !has_contents {
            return Err(no_service.into());
        }
        let served = served_paths(running);
        let mirrored = config.mirrors.iter().map(|mirror| mirror.folder().to_owned()).collect();
        let (findings, faults) = run(probes, pool, &served, &mirrored).await;
        diagnostics.extend(faults);
        config.services =
            services.into_iter().filter_map(|service| service.complete(&findings)).collect();
        diagnostics.extend(find_conflicts(&config.services));
        for mirror in &mut config.mirrors {
            if let Some(canonical) = findings.folders.get(mirror.folder()) {
                mirror.set_folder(canonical.clone());
            }
        }
        diagnostics.extend(find_shared_folders(&config.mirrors, &folders));
        finish(config, diagnostics)
    }

    /// Like [`Self::probe`], but requires a service or a mirror.
    pub(crate) async fn probe_to_serve(
        self,
        pool: &Arc<BlockingPool>,
        running: &[Settings],
    ) -> Result<Config, Diagnostics> {
        let no_service = self.no_service.clone();
        let config = self.probe(pool, running).await?;
        if config.services.is_empty() && config.mirrors.is_empty() {
            return Err(no_service.into());
        }
        Ok(config)
    }
}

/// Answers `probes`. A path in `served` keeps its kind if its file system does not answer. A
/// missing folder is valid if a mirror creates it, or one of `mirrored` in it.
pub(super) async fn run(
    probes: Vec<Probe>,
    pool: &Arc<BlockingPool>,
    served: &HashMap<PathBuf, PathKind>,
    mirrored: &Arc<[PathBuf]>,
) -> (Findings, Vec<Diagnostic>) {
    let start = |Probe { origin, text, question }: Probe| {
        let known = match &question {
            Question::PathKind(path) => served.get(path).map(|kind| (path.clone(), *kind)),
            _ => None,
        };
        let unanswered = unanswered(&question);
        let time_limit = if known.is_some() { SERVED_TIMEOUT } else { TIMEOUT };
        let (pool, mirrored, name) = (Arc::clone(pool), Arc::clone(mirrored), text.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(async move {
            timeout(time_limit, pool.run(&name, move || answer(question, &mirrored))).await
        }));
        (origin, text, known, unanswered, task)
    };
    let started: Vec<_> = probes.into_iter().map(start).collect();
    let (mut findings, mut diagnostics) = (Findings::default(), Vec::new());
    for (origin, text, known, unanswered, task) in started {
        let outcome = task.await.expect("the probe task does not panic");
        let (message, is_transient) = match (outcome, known) {
            (Ok(Ok(Ok(found))), _) => {
                findings.extend(found);
                continue;
            }
            (Ok(Ok(Err(message))), _) => (message, false),
            (Ok(Err(error)), _) => (format!("cannot be checked: {error}"), true),
            (Err(_), Some((path, kind))) => {
                findings.path_kinds.insert(path, kind);
                continue;
            }
            (Err(_), None) => (unanswered, true),
        };
        let default = if origin.is_default { "the default " } else { "" };
        let diagnostic = origin.diagnostic(format_args!("{default}{text:?}: {message}"));
        diagnostics.push(Diagnostic { is_transient, ..diagnostic });
    }
    (findings, diagnostics)
}

impl Findings {
    fn extend(&mut self, other: Self) {
        self.addresses.extend(other.addresses);
        self.path_kinds.extend(other.path_kinds);
        self.time_zones.extend(other.time_zones);
        self.folders.extend(other.folders);
    }
}

fn unanswered(question: &Question) -> String {
    match question {
        Question::Resolve { host, .. } => format!("cannot look up {host:?}: no answer"),
        Question::PathKind(_) | Question::Folder(_) => format!("cannot be opened: {UNANSWERED}"),
        Question::TimeZone(_) | Question::Check(_) => format!("cannot be read: {UNANSWERED}"),
    }
}

/// Returns the answer to one question.
fn answer(question: Question, mirrored: &[PathBuf]) -> Result<Findings, String> {
    let mut findings = Findings::default();
    match question {
        Question::Resolve { host, port } => {
            let addresses = resolve(&host, port)?;
            findings.addresses.insert((host, port), addresses);
        }
        Question::PathKind(path) => {
            let kind = path_kind(&path, mirrored)?;
            findings.path_kinds.insert(path, kind);
        }
        Question::TimeZone(name) => {
            let zone = find_zone(&name)?;
            findings.time_zones.insert(name, zone);
        }
        Question::Folder(path) => {
            if fs::metadata(&path).is_ok_and(|metadata| !metadata.is_dir()) {
                return Err("expected a folder, found another file".to_owned());
            }
            let canonical = canonical(&path);
            findings.folders.insert(path, canonical);
        }
        Question::Check(check) => check()?,
    }
    Ok(findings)
}

fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let resolved = (host, port)
        .to_socket_addrs()
        .map_err(|error| format!("cannot look up {host:?}: {error}; expected HOST:PORT"))?;
    let mut addresses: Vec<_> = resolved.collect();
    addresses.sort();
    addresses.dedup();
    Ok(addresses)
}

/// Opens a path that is to be served, and returns its kind.
fn path_kind(path: &Path, mirrored: &[PathBuf]) -> Result<PathKind, String> {
    let opened = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && is_mirrored(path, mirrored) => {
            Ok(PathKind::Folder)
        }
        Ok(metadata) if metadata.is_dir() => Folder::open(path).map(|_| PathKind::Folder),
        Ok(_) => OpenFile::open(path).map(|_| PathKind::File),
        Err(error) => Err(error),
    };
    opened.map_err(|error| format!("cannot be opened: {error}"))
}

/// Whether a mirror creates this folder, or one in it. Canonical paths are compared, as paths lead
/// through links below `/var/lib/handout` under `DynamicUser=`.
fn is_mirrored(path: &Path, mirrored: &[PathBuf]) -> bool {
    let path = canonical(path);
    mirrored.iter().any(|mirrored| canonical(mirrored).starts_with(&path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config_reader::Origin;

    fn probe(text: &str, question: Question) -> Probe {
        let position = Position::Line("x.toml".to_owned(), 7);
        let origin = Origin { position, key: "a.b".to_owned(), is_default: false };
        Probe { origin, text: text.to_owned(), question }
    }

    /// A probe that never ends.
    fn hanging() -> Probe {
        let hang = || loop {
            std::thread::park();
        };
        probe("hangs", Question::Check(Box::new(hang)))
    }

    async fn run_all(probes: Vec<Probe>) -> (Findings, Vec<Diagnostic>) {
        run(probes, &Arc::default(), &HashMap::new(), &Arc::default()).await
    }

    #[tokio::test(start_paused = true)]
    async fn reports_hanging_probes_as_transient_within_one_time_limit() {
        let started = tokio::time::Instant::now();
        let (_, diagnostics) = run_all(vec![hanging(), hanging(), hanging()]).await;
        assert!(started.elapsed() < 2 * TIMEOUT);
        assert_eq!(diagnostics.len(), 3);
        assert!(diagnostics.iter().all(|diagnostic| diagnostic.is_transient));
        let expected = "x.toml:7: a.b: \"hangs\": cannot be read: its file system does not answer";
        assert_eq!(diagnostics[0].to_string(), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn keeps_the_kind_of_served_paths_even_without_threads() {
        let hung = (0..100).map(|number| Probe { text: number.to_string(), ..hanging() });
        let path = PathBuf::from("/nowhere/served");
        let served_probe = probe("served", Question::PathKind(path.clone()));
        let served = HashMap::from([(path.clone(), PathKind::File)]);
        let probes = hung.chain([served_probe]).collect();
        let (findings, diagnostics) = run(probes, &Arc::default(), &served, &Arc::default()).await;
        assert_eq!(
            (findings.path_kinds.get(&path), diagnostics.len()),
            (Some(&PathKind::File), 100)
        );
    }

    #[tokio::test]
    async fn resolves_names_and_opens_paths() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let (findings, diagnostics) = run_all(vec![
            probe("localhost:80", Question::Resolve { host: "localhost".to_owned(), port: 80 }),
            probe("dir", Question::PathKind(dir.path().to_owned())),
            probe("file", Question::PathKind(file.clone())),
            probe("new", Question::Folder(dir.path().join("a/../new"))),
        ])
        .await;
        assert!(diagnostics.is_empty(), "{diagnostics:?}");
        let addresses = &findings.addresses[&("localhost".to_owned(), 80)];
        assert!(addresses.contains(&"127.0.0.1:80".parse().unwrap()));
        assert_eq!(findings.path_kinds[dir.path()], PathKind::Folder);
        assert_eq!(findings.path_kinds[&file], PathKind::File);
        let canonical = &findings.folders[&dir.path().join("a/../new")];
        assert_eq!(*canonical, dir.path().canonicalize().unwrap().join("new"));
    }

    #[tokio::test]
    async fn reports_wrong_values_as_permanent() {
        let missing = PathBuf::from("/nowhere/file");
        let (_, diagnostics) = run_all(vec![
            probe("gone", Question::PathKind(missing)),
            probe("null", Question::PathKind("/dev/null".into())),
            probe("null", Question::Folder("/dev/null".into())),
            probe("x", Question::Check(Box::new(|| Err("expected y".to_owned())))),
        ])
        .await;
        let messages: Vec<_> = diagnostics.iter().map(|one| one.message.as_str()).collect();
        assert!(
            messages[0].starts_with("\"gone\": cannot be opened: No such file"),
            "{messages:?}"
        );
        assert_eq!(messages[1], "\"null\": cannot be opened: not a regular file");
        assert_eq!(messages[2], "\"null\": expected a folder, found another file");
        assert_eq!(messages[3], "\"x\": expected y");
        assert!(diagnostics.iter().all(|diagnostic| !diagnostic.is_transient));
    }

    #[tokio::test]
    async fn accepts_missing_folders_that_mirrors_create() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let mirrored: Arc<[PathBuf]> = [dir.path().join("./new/sub")].into();
        let probes = vec![probe("new", Question::PathKind(path.clone()))];
        let (findings, diagnostics) =
            run(probes, &Arc::default(), &HashMap::new(), &mirrored).await;
        assert!(diagnostics.is_empty(), "{diagnostics:?}");
        assert_eq!(findings.path_kinds.get(&path), Some(&PathKind::Folder));
    }

    #[test]
    fn keeps_the_canonical_path_of_a_folder_when_it_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        fs::create_dir(&real).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let written = ["new/a", "./new//a/", "new/b/../a", "new/../../link/new/a"];
        for text in written {
            assert_eq!(canonical(&link.join(text)), real.join("new/a"), "{text}");
        }
        fs::create_dir_all(real.join("new/a")).unwrap();
        fs::create_dir(real.join("new/b")).unwrap();
        for text in written.iter().take(3) {
            assert_eq!(canonical(&link.join(text)), real.join("new/a"), "{text}");
        }
        let here = Path::new(".").canonicalize().unwrap();
        assert_eq!(canonical(Path::new("no/such")), here.join("no/such"));
    }
}
