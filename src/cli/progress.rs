//! Progress of `handout fetch` for people: a bar on a terminal, otherwise a line per file.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use console::Term;
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use crate::client::fetch::{Error, FetchObserver, SavedFile};
use crate::fs::filename::escape;
use crate::text::error_chain;

/// The progress of a fetch on standard error.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    started: Instant,
    quiet: bool,
}

impl Progress {
    /// Creates a display that prints errors only if `quiet` is set.
    pub(crate) fn new(quiet: bool) -> Self {
        let bar = ProgressBar::with_draw_target(None, draw_target(quiet));
        Self { bar, started: Instant::now(), quiet }
    }

    /// Prints a line above the bar, if there is one.
    fn line(&self, line: &str) {
        self.bar.suspend(|| {
            // If standard error is closed, the exit code reports the outcome.
            let _ = writeln!(io::stderr(), "{line}");
        });
    }
}

/// Maximum number of redraws of the bars per second.
const REDRAWS_PER_SECOND: u8 = 20;

/// Returns the target of the bars: hidden if `quiet` is set or standard error is not a terminal.
pub(super) fn draw_target(quiet: bool) -> ProgressDrawTarget {
    if quiet || !io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        let terminal = BarTerminal(Term::buffered_stderr());
        ProgressDrawTarget::term_like_with_hz(Box::new(terminal), REDRAWS_PER_SECOND)
    }
}

/// A terminal that keeps the cursor at the start of the last bar. indicatif leaves it behind the
/// bar, at the right edge, where the echo of Ctrl-C would wrap and keep the bar from being cleared.
#[derive(Debug)]
struct BarTerminal(Term);

impl TermLike for BarTerminal {
    fn width(&self) -> u16 {
        self.0.size().1
    }

    fn height(&self) -> u16 {
        self.0.size().0
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_up(n)
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_down(n)
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_right(n)
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        self.0.move_cursor_left(n)
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.0.write_line(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.0.write_str(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.0.clear_line()
    }

    fn flush(&self) -> io::Result<()> {
        self.0.write_str("\r")?;
        self.0.flush()
    }
}

/// Returns the style of a bar.
pub(super) fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl FetchObserver for Progress {
    fn started(&mut self, name: Option<&str>) {
        self.started = Instant::now();
        self.bar.reset();
        self.bar.unset_length();
        self.bar.set_style(style("{msg} {spinner} {bytes} {bytes_per_sec}"));
        self.bar.set_message(name.map(escape).unwrap_or_default());
    }

    fn stalled(&mut self, server: &str, duration: Duration) {
        if !self.quiet {
            self.line(&format!(
                "handout: {} sent nothing for {} s: a folder service waits for requests: \
                 try --list or --all",
                escape(server),
                duration.as_secs()
            ));
        }
    }

    fn advanced(&mut self, length: u64, size: Option<u64>) {
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

    fn saved(&mut self, file: &SavedFile) {
        self.bar.reset();
        let Some(path) = &file.path else { return };
        if self.quiet {
            return;
        }
        let path = escape(&path.to_string_lossy());
        let size = HumanBytes(file.length);
        let seconds = self.started.elapsed().as_secs_f64();
        if file.is_unchanged {
            self.line(&format!("{path}: {size}, unchanged"));
        } else {
            self.line(&format!("{path}: {size} in {seconds:.1} s"));
        }
    }

    fn failed(&mut self, name: Option<&str>, error: &Error) {
        self.bar.reset();
        match name {
            Some(name) => self.line(&format!("handout: {}: {}", escape(name), error_chain(error))),
            None => self.line(&format!("handout: {}", error_chain(error))),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
