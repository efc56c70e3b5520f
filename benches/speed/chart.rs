//! What a run reports, as a picture: for each row a bar as long as its ratio, with a mark where
//! its target stands.

use svg::Document;
use svg::node::element::{Line, Rectangle, Text, Title};

use crate::table::Row;

const WIDTH: f64 = 1040.0;
/// The left and the right end of the scale; what stands beside the bars is written on both sides.
const LEFT: f64 = 330.0;
const RIGHT: f64 = 700.0;
/// The first row, and how far it is from one row to the next.
const TOP: f64 = 76.0;
const STEP: f64 = 24.0;
/// The ratio at the right end; longer bars end there.
const MOST: f64 = 2.0;

/// Legible on white only, so that there is white behind it wherever it is shown.
const BACKGROUND: &str = "#ffffff";
const INK: &str = "#1f2328";
const GREY: &str = "#656d76";
const FAINT: &str = "#d0d7de";
const MET: &str = "#2f81c1";
const MISSED: &str = "#d1602b";
const PEER: &str = "#b4bcc5";

pub fn draw(rows: &[Row]) -> Document {
    let bottom = TOP + STEP * rows.len() as f64;
    let height = bottom + 20.0;
    let mut document = Document::new()
        .set("viewBox", (0.0, 0.0, WIDTH, height))
        .set("width", WIDTH)
        .set("height", height)
        .set("font-family", "system-ui, 'DejaVu Sans', sans-serif")
        .set("font-size", 12)
        .add(Title::new("handout beside the least that the same work can cost"))
        .add(Rectangle::new().set("width", WIDTH).set("height", height).set("fill", BACKGROUND))
        .add(
            text(16.0, 26.0, "What it costs, as a ratio to what stands on the right")
                .set("font-size", 15),
        );
    let mut x = 16.0;
    for (colour, name) in
        [(MET, "handout"), (MISSED, "handout, above its target"), (PEER, "somebody else")]
    {
        document = document
            .add(bar(x, 40.0, 12.0, colour))
            .add(text(x + 18.0, 50.5, name).set("fill", GREY));
        x += 36.0 + 7.0 * name.len() as f64;
    }
    document = document
        .add(line(x, 38.0, 16.0, INK).set("stroke-width", 2.5))
        .add(text(x + 10.0, 50.5, "target: at most").set("fill", GREY));
    for (ratio, colour) in [(0.0, FAINT), (0.5, FAINT), (1.0, GREY), (1.5, FAINT), (2.0, FAINT)] {
        document = document.add(line(place(ratio), TOP - 6.0, bottom - TOP + 6.0, colour)).add(
            text(place(ratio), TOP - 10.0, &ratio.to_string())
                .set("text-anchor", "middle")
                .set("fill", GREY),
        );
    }
    for (row, number) in rows.iter().zip(0..) {
        document = add(document, row, TOP + STEP * f64::from(number));
    }
    document
}

/// Adds a row below this height.
fn add(document: Document, row: &Row, top: f64) -> Document {
    let colour = match row.met() {
        Some(true) => MET,
        Some(false) => MISSED,
        None => PEER,
    };
    let end = place(row.ratio());
    let base = top + 16.0;
    let beside = format!("{} {}", row.beside, row.unit.show(row.other));
    let mut document = document
        .add(text(LEFT - 10.0, base, &row.what).set("text-anchor", "end"))
        .add(bar(LEFT, top + 6.0, end - LEFT, colour));
    if let Some(target) = row.target {
        document = document.add(line(place(target), top + 3.0, 18.0, INK).set("stroke-width", 2.5));
    }
    if row.ratio() > MOST {
        // A gap says that it is cut.
        document = document.add(bar(RIGHT - 14.0, top + 6.0, 4.0, BACKGROUND));
    }
    let ratio = format!("{:.2}", row.ratio());
    document
        .add(text(RIGHT + 46.0, base, &ratio).set("text-anchor", "end").set("font-weight", "bold"))
        .add(text(RIGHT + 58.0, base, &beside).set("fill", GREY).set("font-size", 11))
}

/// Where a ratio stands.
fn place(ratio: f64) -> f64 {
    LEFT + (RIGHT - LEFT) * ratio.clamp(0.0, MOST) / MOST
}

fn text(x: f64, y: f64, content: &str) -> Text {
    Text::new(content).set("x", round(x)).set("y", y).set("fill", INK)
}

fn bar(x: f64, y: f64, width: f64, colour: &str) -> Rectangle {
    let bar = Rectangle::new().set("x", round(x)).set("y", y).set("fill", colour);
    bar.set("width", round(width)).set("height", 12)
}

/// From there down.
fn line(x: f64, y: f64, length: f64, colour: &str) -> Line {
    let line = Line::new().set("x1", round(x)).set("x2", round(x)).set("stroke", colour);
    line.set("y1", y).set("y2", y + length)
}

/// A tenth of a pixel is enough.
fn round(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}
