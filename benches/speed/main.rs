//! Compares handout with the minimum cost of the same work and with its peers, in one run.
//!
//! | file | subject |
//! |---|---|
//! | `short` | short connections, datagrams and a picture; bare loops, nginx, Python |
//! | `folder` | a large file from a folder; encoding, digesting and writing alone |
//! | `fetch` | the client; reading, decoding, digesting and writing alone |
//! | `mirror` | `handout download`; aria2c, wget |
//! | `crowd` | memory of clients that read nothing, and the latency of others |
//! | `start` | time from exec to ready, and the size of the program |
//! | `floors`, `contenders` | the bare loops; starting them, handout and its peers |
//! | `clients`, `rounds` | the exchanges, and the rounds in which contenders alternate |
//! | `machine` | cores and processes |
//! | `table`, `chart` | the results as a table and as a picture |
//!
//! `cargo bench` measures everything, `cargo bench -- datagram crowd` a selection;
//! `cargo bench -- --svg PATH` writes the picture. `--test` only checks that everything works. No
//! figure fails a run.
#![warn(clippy::pedantic)]
#![allow(
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    clippy::cast_possible_truncation,
    reason = "figures are rounded when they are printed"
)]

mod chart;
mod clients;
mod contenders;
mod crowd;
mod fetch;
mod floors;
mod folder;
mod machine;
#[cfg(feature = "gateway")]
mod mirror;
mod rounds;
mod short;
mod start;
mod table;

use std::error::Error;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use floors::Floor;
use machine::Cores;
use table::Row;

/// Errors are only printed.
type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Maximum time of any single wait.
const PATIENCE: Duration = Duration::from_secs(10);

/// Measures handout beside bare loops and its peers.
#[derive(Parser)]
struct Arguments {
    /// Subjects to measure [default: all].
    only: Vec<Subject>,
    /// Path of the picture.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/speed.svg"))]
    svg: PathBuf,
    /// Only check that everything works.
    #[arg(long)]
    test: bool,
    /// Passed by cargo; ignored.
    #[arg(long, hide = true)]
    bench: bool,
    /// Run as a floor that serves standard input.
    #[arg(long, hide = true)]
    floor: Option<Floor>,
    /// Run as the client that only reads.
    #[arg(long, hide = true)]
    read: Option<SocketAddr>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Subject {
    Time,
    Datagram,
    Picture,
    Folder,
    Fetch,
    #[cfg(feature = "gateway")]
    Mirror,
    Crowd,
    Start,
}

/// Settings of every subject.
struct Run {
    /// Measure, instead of only checking that everything works.
    full: bool,
    cores: Cores,
}

impl Run {
    /// Returns the value for a measuring run or for a check.
    fn choose<T>(&self, full: T, smoke: T) -> T {
        if self.full { full } else { smoke }
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(floor) = arguments.floor {
        return Ok(floor.serve()?);
    }
    if let Some(address) = arguments.read {
        return Ok(clients::read_all(address)?);
    }
    let run = Run { full: arguments.bench && !arguments.test, cores: Cores::choose()? };
    println!("\n{}", run.cores);
    if !run.full {
        println!("a short run: its figures are not meaningful");
    }
    let mut rows = Vec::new();
    for subject in Subject::value_variants() {
        if arguments.only.is_empty() || arguments.only.contains(subject) {
            rows.extend(measure(*subject, &run)?);
        }
    }
    table::print(&rows);
    svg::save(&arguments.svg, &chart::draw(&rows))?;
    println!("\nas a picture: {}", arguments.svg.display());
    Ok(())
}

fn measure(subject: Subject, run: &Run) -> Result<Vec<Row>> {
    match subject {
        Subject::Time => short::time(run),
        Subject::Datagram => short::datagram(run),
        Subject::Picture => short::picture(run),
        Subject::Folder => folder::measure(run),
        Subject::Fetch => fetch::measure(run),
        #[cfg(feature = "gateway")]
        Subject::Mirror => mirror::measure(run),
        Subject::Crowd => crowd::measure(run),
        Subject::Start => start::measure(run),
    }
}

/// Returns incompressible bytes from xorshift.
fn pseudo_random(length: usize) -> Vec<u8> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
