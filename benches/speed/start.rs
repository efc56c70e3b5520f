//! Time from exec to ready with the shipped configuration, and the size of the program.

use std::fs;

use tempfile::TempDir;

use crate::contenders::Handout;
use crate::rounds::median;
use crate::table::{Row, Unit};
use crate::{Result, Run};

/// Target: time to start, in seconds.
const TIME: f64 = 0.015;

/// Targets: memory after the start and size of the executable, in bytes.
const SIZE: f64 = (8 << 20) as f64;

pub fn measure(run: &Run) -> Result<Vec<Row>> {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/config");
    let mut config = fs::read_to_string(format!("{shipped}/handout.toml"))?;
    // The default ports may be in use.
    for port in [":6789\"", ":5566\"", ":9467\""] {
        config = config.replace(port, ":0\"");
    }
    let mut times = Vec::new();
    let mut sizes = Vec::new();
    for _ in 0..run.choose(20, 2) {
        let folder = TempDir::new()?;
        let file = folder.path().join("handout.toml");
        fs::write(&file, &config)?;
        fs::copy(format!("{shipped}/picture.jpg"), folder.path().join("picture.jpg"))?;
        let handout = run.cores.anywhere(|| Handout::start_with(&file, folder))??;
        sizes.push(handout.server.memory("VmRSS")?);
        times.push(handout.ready_after.as_secs_f64());
    }
    let binary = fs::metadata(env!("CARGO_BIN_EXE_handout"))?.len() as f64;
    Ok(vec![
        Row::limit("from exec to READY=1", Unit::Milliseconds, median(times), TIME),
        Row::limit("resident memory when ready", Unit::Mebibytes, median(sizes), SIZE),
        Row::limit("the binary, stripped", Unit::Mebibytes, binary, SIZE),
    ])
}
