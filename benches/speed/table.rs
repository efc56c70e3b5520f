//! Prints the rows of a run as a Markdown table.

/// A figure beside another of the same run, or beside its limit.
pub struct Row {
    pub what: String,
    pub unit: Unit,
    pub figure: f64,
    pub beside: String,
    pub other: f64,
    /// Target of the ratio; `None` for a peer.
    pub target: Option<f64>,
}

impl Row {
    pub fn new(what: &str, unit: Unit, figure: f64, beside: (&str, f64), target: f64) -> Self {
        let (beside, other) = (beside.0.to_owned(), beside.1);
        Self { what: what.to_owned(), unit, figure, beside, other, target: Some(target) }
    }

    /// The figure of a peer.
    pub fn peer(what: &str, unit: Unit, figure: f64, beside: (&str, f64)) -> Self {
        Self { target: None, ..Self::new(what, unit, figure, beside, 0.0) }
    }

    pub fn limit(what: &str, unit: Unit, figure: f64, limit: f64) -> Self {
        Self::new(what, unit, figure, ("the limit", limit), 1.0)
    }

    pub fn ratio(&self) -> f64 {
        self.figure / self.other
    }

    pub fn met(&self) -> Option<bool> {
        self.target.map(|target| self.ratio() <= target)
    }

    fn cells(&self) -> [String; 6] {
        let met = self.met().map_or("", |met| if met { "yes" } else { "no" });
        [
            self.what.clone(),
            self.unit.show(self.figure),
            format!("{}: {}", self.beside, self.unit.show(self.other)),
            format!("{:.2}", self.ratio()),
            self.target.map_or(String::new(), |target| format!("{target:.2}")),
            met.to_owned(),
        ]
    }
}

#[derive(Clone, Copy)]
pub enum Unit {
    Microseconds,
    Milliseconds,
    Seconds,
    Bytes,
    Mebibytes,
}

impl Unit {
    pub fn show(self, figure: f64) -> String {
        match self {
            Self::Microseconds => format!("{:.1} µs", figure * 1e6),
            Self::Milliseconds => format!("{:.1} ms", figure * 1e3),
            Self::Seconds => format!("{figure:.2} s"),
            Self::Bytes => format!("{figure:.0} B"),
            Self::Mebibytes => format!("{:.1} MiB", figure / f64::from(1 << 20)),
        }
    }
}

pub fn print(rows: &[Row]) {
    let head = ["what", "figure", "beside", "ratio", "at most", "met"].map(str::to_owned);
    let lines: Vec<_> = std::iter::once(head).chain(rows.iter().map(Row::cells)).collect();
    let mut widths = [0; 6];
    for (width, column) in widths.iter_mut().zip(0..) {
        *width = lines
            .iter()
            .map(|cells: &[String; 6]| cells[column].chars().count())
            .max()
            .unwrap_or(0);
    }
    println!();
    for (number, cells) in lines.iter().enumerate() {
        println!("{}", line(cells, widths, ' '));
        if number == 0 {
            println!("{}", line(&[const { String::new() }; 6], widths, '-'));
        }
    }
}

/// Aligns figures to the right.
fn line(cells: &[String; 6], widths: [usize; 6], fill: char) -> String {
    let cells = cells.iter().zip(widths).enumerate().map(|(column, (cell, width))| {
        let free: String = std::iter::repeat_n(fill, width - cell.chars().count()).collect();
        match [1, 3, 4].contains(&column) {
            true if fill == '-' => format!("{fill}{free}:"),
            true => format!("{fill}{free}{cell}{fill}"),
            false => format!("{fill}{cell}{free}{fill}"),
        }
    });
    format!("|{}|", cells.collect::<Vec<_>>().join("|"))
}
