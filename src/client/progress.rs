//! Tells a person how the fetching goes: a bar on a terminal, a line for each file elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::Instant;

use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::errors::chain;

use super::fetch::{Error, Report, Saved};
use super::names::escape;

/// Reports to standard error.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    begun: Instant,
    quiet: bool,
}

impl Progress {
    /// A quiet one says only what failed.
    pub fn new(quiet: bool) -> Self {
        let target = if quiet || !io::stderr().is_terminal() {
            ProgressDrawTarget::hidden()
        } else {
            ProgressDrawTarget::stderr()
        };
        Self { bar: ProgressBar::with_draw_target(None, target), begun: Instant::now(), quiet }
    }

    /// Prints a line above the bar, if there is one.
    fn line(&self, line: &str) {
        self.bar.suspend(|| {
            // If standard error is closed, the exit code has to do.
            let _ = writeln!(io::stderr(), "{line}");
        });
    }
}

/// A style of a bar.
pub(super) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Report for Progress {
    fn begin(&mut self, name: Option<&str>) {
        self.begun = Instant::now();
        self.bar.reset();
        self.bar.unset_length();
        self.bar.set_style(style("{msg} {spinner} {bytes} {bytes_per_sec}"));
        self.bar.set_message(name.map(escape).unwrap_or_default());
    }

    fn advance(&mut self, length: u64, size: Option<u64>) {
        if let Some(size) = size
            && self.bar.length().is_none()
        {
            self.bar.set_length(size);
            self.bar.set_style(style(
                "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} left",
            ));
        }
        self.bar.set_position(length);
    }

    fn saved(&mut self, saved: &Saved) {
        self.bar.reset();
        let Some(place) = &saved.place else { return };
        if self.quiet {
            return;
        }
        let place = escape(&place.to_string_lossy());
        let size = HumanBytes(saved.length);
        let seconds = self.begun.elapsed().as_secs_f64();
        if saved.unchanged {
            self.line(&format!("{place}: {size}, unchanged"));
        } else {
            self.line(&format!("{place}: {size} in {seconds:.1} s"));
        }
    }

    fn failed(&mut self, name: Option<&str>, error: &Error) {
        self.bar.reset();
        match name {
            Some(name) => self.line(&format!("handout: {}: {}", escape(name), chain(error))),
            None => self.line(&format!("handout: {}", chain(error))),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
