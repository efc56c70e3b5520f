//! Time zones by name, as the system has them at the moment.
//!
//! jiff keeps zones for minutes, and a service would keep them for ever. Here a zone is read again as
//! soon as one of the files that it may come from is another: `/etc/localtime` after
//! `timedatectl set-timezone`, the system's database after an update of tzdata.

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

/// Where jiff looks for the system's database, behind `TZDIR`.
const DATABASES: [&str; 3] = ["/usr/share/zoneinfo", "/usr/share/lib/zoneinfo", "/etc/zoneinfo"];

/// The zones that were read last, by the name that the configuration has for them.
static ZONES: Mutex<BTreeMap<String, Known>> = Mutex::new(BTreeMap::new());

/// A zone with the state of its files before it was read.
#[derive(Clone)]
struct Known {
    zone: TimeZone,
    files: Vec<FileState>,
}

/// A path, where it links to, and the state of the file there.
type FileState = (PathBuf, Option<PathBuf>, Option<Stamp>);

/// Returns the zone that `name` stands for: that of this machine, or one of the system's database or,
/// on a machine without one, of the copy that is built in. Without `/etc/localtime` the zone of this
/// machine is UTC, as localtime(5) has it.
///
/// # Errors
/// A description of the expected names.
pub(crate) fn find_zone(name: &str) -> Result<TimeZone, String> {
    if name == "local" && env::var_os("TZ").is_none() && is_missing(LOCALTIME) {
        return Ok(TimeZone::UTC);
    }
    current_zone(name)
}

/// Returns the zone that `name` stands for, which is read again only if its files changed.
///
/// # Errors
/// A description of the expected names; also if `/etc/localtime` is missing.
pub(crate) fn current_zone(name: &str) -> Result<TimeZone, String> {
    if name == "UTC" {
        return Ok(TimeZone::UTC);
    }
    let known = zones().get(name).cloned();
    if let Some(Known { zone, files }) = known
        && files == files_of(name, &zone)
    {
        return Ok(zone);
    }
    // Which files a zone comes from is known only once it was read, and their state is to be the one
    // before the reading.
    let files = files_of(name, &read_zone(name)?);
    let zone = read_zone(name)?;
    zones().insert(name.to_owned(), Known { zone: zone.clone(), files });
    Ok(zone)
}

fn zones() -> MutexGuard<'static, BTreeMap<String, Known>> {
    ZONES.lock()
}

fn read_zone(name: &str) -> Result<TimeZone, String> {
    tz::db().reset();
    tz::reset_system_time_zone_cache();
    match name {
        "local" => TimeZone::try_system().map_err(|error| {
            format!(
                "the zone of this machine (TZ, /etc/localtime) cannot be read: {error}; \
                 expected one that can, or \"UTC\" instead"
            )
        }),
        name => TimeZone::get(name)
            .map_err(|error| format!("expected \"local\", \"UTC\" or a zone by its name: {error}")),
    }
}

/// Returns the state of every file that decides what `name` stands for, which is `zone` so far.
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
