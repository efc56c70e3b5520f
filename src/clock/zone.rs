//! Time zones by name, always in the current version of the system.
//!
//! The crate `jiff` caches zones for minutes. Here a zone is read again as soon as one of its files
//! changes: `/etc/localtime` by `timedatectl set-timezone`, the zone database by an update of
//! tzdata.

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::io;
use std::path::PathBuf;

use jiff::tz::{self, TimeZone};
use parking_lot::{Mutex, MutexGuard};

use crate::fs::file::Stamp;

/// The zone of the machine, unless `TZ` names another; see localtime(5).
const LOCALTIME: &str = "/etc/localtime";

/// Folders in which `jiff` searches the zone database of the system, after `TZDIR`.
const DATABASES: [&str; 3] = ["/usr/share/zoneinfo", "/usr/share/lib/zoneinfo", "/etc/zoneinfo"];

/// Cached zones by their name in the configuration.
static ZONES: Mutex<BTreeMap<String, CachedZone>> = Mutex::new(BTreeMap::new());

/// A zone, with the state of its files before they were read.
#[derive(Clone)]
struct CachedZone {
    zone: TimeZone,
    files: Vec<FileState>,
}

/// A path, the target if it is a link, and the stamp of the file.
type FileState = (PathBuf, Option<PathBuf>, Option<Stamp>);

/// Returns the zone `name`, where `local` is the zone of this machine.
///
/// Without a zone database on the system, the built-in copy is used. Without `/etc/localtime`, the
/// zone of this machine is UTC, as in localtime(5).
///
/// # Errors
/// A description of the expected names.
pub(crate) fn find_zone(name: &str) -> Result<TimeZone, String> {
    if name == "local" && env::var_os("TZ").is_none() && is_missing(LOCALTIME) {
        return Ok(TimeZone::UTC);
    }
    current_zone(name)
}

/// Returns the zone `name` like [`find_zone`], but fails if `/etc/localtime` is missing. The zone
/// is read again only if its files have changed.
///
/// # Errors
/// A description of the expected names.
pub(crate) fn current_zone(name: &str) -> Result<TimeZone, String> {
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    let cached = zones().get(name).cloned();
    if let Some(CachedZone { zone, files }) = cached
        && files == files_of(name, &zone)
    {
        return Ok(zone);
    }
    // The files of a zone are known only after it was read, but their state must be older than the
    // cached zone: read it twice.
    let files = files_of(name, &read_zone(name)?);
    let zone = read_zone(name)?;
    zones().insert(name.to_owned(), CachedZone { zone: zone.clone(), files });
    Ok(zone)
}

fn zones() -> MutexGuard<'static, BTreeMap<String, CachedZone>> {
    ZONES.lock()
}

fn read_zone(name: &str) -> Result<TimeZone, String> {
    tz::db().reset();
    tz::reset_system_time_zone_cache();
    match name {
        "local" => TimeZone::try_system().map_err(|error| {
            format!(
                "the zone of this machine (TZ, /etc/localtime) cannot be read: {error}: set a zone \
                 by name, or \"UTC\" instead"
            )
        }),
        name => TimeZone::get(name)
            .map_err(|error| format!("expected \"local\", \"UTC\" or the name of a zone: {error}")),
    }
}

/// Returns the state of every file that determines the zone `name`. `zone` is its last version.
fn files_of(name: &str, zone: &TimeZone) -> Vec<FileState> {
    let mut paths = Vec::new();
    if name == "local" {
        let tz = env::var_os("TZ");
        let tz = tz.as_ref().map(|tz| tz.to_string_lossy());
        paths.push(PathBuf::from(
            tz.map_or(LOCALTIME.into(), |tz| tz.trim_start_matches(':').to_owned()),
        ));
    }
    if let Some(name) = zone.iana_name() {
        let databases = env::var_os("TZDIR").map(PathBuf::from).into_iter();
        let databases = databases.chain(DATABASES.map(PathBuf::from));
        paths.extend(databases.map(|database| database.join(name)));
    }
    let state = |path: PathBuf| {
        let target = fs::read_link(&path).ok();
        let stamp = fs::metadata(&path).ok().map(|metadata| Stamp::of(&metadata));
        (path, target, stamp)
    };
    paths.into_iter().map(state).collect()
}

fn is_missing(path: &str) -> bool {
    fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}
